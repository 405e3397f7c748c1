"""A coordinator of workers elsewhere that is killed, and resumed while they still run: over TCP, as on machines."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

from support import images
from support.command import Run, started
from support.journals import durable_bytes
from support.servers import nbdkit
from support.waiting import wait_for

SIZE = 48 * images.MIB
SECONDS = 90.0
OPTIONS = ("--listen", "tcp://127.0.0.1:0", "--range-size", "1M", "--checkpoint", "0.2", "-T", "2")


def test_the_next_coordinator_goes_on_when_leases_of_the_one_that_was_killed_have_ended(tmp_path: Path) -> None:
    image = images.random_image(tmp_path / "image", SIZE)
    copied, journal = images.empty_image(tmp_path / "copy", SIZE), tmp_path / "journal"
    with ExitStack() as stack:
        slow = ("rate=64M", "burstiness=0.2")
        source = stack.enter_context(nbdkit("file", str(image), *slow, filters=["rate"], threads=1, tcp=True))
        destination = stack.enter_context(nbdkit("file", str(copied), threads=1, tcp=True))

        def begin(*more: str) -> Run:
            """A coordinator, and two workers that start when it says where."""
            words = ("coordinator", *OPTIONS, "--journal", str(journal), *more, source.uri, destination.uri)
            run = stack.enter_context(started(*words))
            address = wait_for("the address", lambda: (re.findall(r"listening on (\S+)", run.err()) or [""])[0])
            for _ in range(2):
                stack.enter_context(started("worker", "--connect", address))
            return run

        first = begin()
        first.until("something to be durable", lambda: durable_bytes(journal))
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(SECONDS)
        kept = durable_bytes(journal)
        outcome = begin("--resume").wait(SECONDS).succeeded()
    assert "workers of an earlier run may write for 10 s more: nothing is leased sooner" in outcome.err, str(outcome)
    assert 0 < kept < SIZE
    assert f"{kept // images.MIB} MiB resumed" in outcome.last_line
    images.assert_identical(image, copied)
