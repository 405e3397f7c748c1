"""A destination that takes one writer only, which stands still: its role waits for it to be gone. Real processes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdshard.common.channel import CoordinatorChannel
from nbdshard.common.control_url import ControlUrl
from nbdshard.common.machine import machine_id
from nbdshard.common.messages import EndpointAddress, JobOptions
from nbdshard.coordinator.job import Job, Verdict
from nbdshard.coordinator.service import Shell, run_job
from nbdshard.coordinator.signals import SignalWatch
from support import images, processes
from support.choreography import Choreography, is_connected
from support.command import Run, started
from support.images import MIB
from support.servers import nbdkit
from support.sides import RINGS
from support.waiting import wait_for

SIZE = 32 * MIB
LEASE_SECONDS = 1.5


def connections_most(log: Path) -> int:
    """How many clients were connected at one time, by nbdkit's log filter."""
    now = most = 0
    for line in log.read_text().splitlines():
        now += bool(re.search(r" Connect ", line)) - bool(re.search(r" Disconnect ", line))
        most = max(most, now)
    return most


@pytest.mark.parametrize("ring", RINGS)
def test_the_role_of_a_writer_that_is_stopped_moves_when_it_has_let_go(tmp_path: Path, ring: str) -> None:
    image, log = images.random_image(tmp_path / "image", SIZE), tmp_path / "log"
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with ExitStack() as stack:
        source = stack.enter_context(
            nbdkit("file", str(image), "rate=96M", "burstiness=0.2", filters=["rate"], tcp=True, threads=1)
        )
        single = ("multi-conn-mode=disable", f"logfile={log}")
        destination = stack.enter_context(
            nbdkit("file", str(copied), *single, filters=["log", "multi-conn"], tcp=True, threads=1)
        )
        port = int(destination.uri.rpartition(":")[2].strip("/"))
        channel = CoordinatorChannel(ControlUrl("tcp", "127.0.0.1", 0))
        stack.callback(channel.close)
        signals = stack.enter_context(SignalWatch())
        words = ("worker", "--connect", str(channel.url), "--ring", ring)
        workers = [stack.enter_context(started(*words)) for _ in range(2)]

        def writers() -> list[Run]:
            return [worker for worker in workers if is_connected(worker.pid, port)]

        def steps() -> Iterator[None]:
            while images.allocated_bytes(copied) < 4 * MIB:
                yield
            (writer,) = writers()
            os.kill(writer.pid, signal.SIGSTOP)
            wait_for("the writer to stand still", lambda: processes.state(writer.pid) == "T")
            while display.status is None or display.status.destination_connections:
                assert writers() == [writer]
                yield
            for _ in range(20):  # it is given up, and nobody takes its place: it may still write
                assert writers() == [writer]
                yield
            given_up.append(writer.pid)
            os.kill(writer.pid, signal.SIGCONT)
            while writers() == [writer]:
                yield

        given_up: list[int] = []
        display = Choreography(steps())
        ends = (EndpointAddress("nbd", source.uri), (EndpointAddress("nbd", destination.uri),))
        job = Job(
            *("job", 1, *ends, JobOptions(request_size=MIB, requests=16, queue_size=16 * MIB, sparse_unit=None)),
            connections=4,
            workers=2,
            range_size=4 * MIB,
            local_workers=False,
            machine=machine_id(),
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=0.3,
        )
        outcome = run_job(job, Shell(channel, None, lambda _: None, (), display, signals))
        assert outcome.verdict is Verdict.COMPLETE, outcome.error
        for worker in workers:
            worker.process.wait(30)
    assert given_up
    images.assert_identical(image, copied)
    assert connections_most(log) == 1


def test_a_local_writer_that_is_stopped_for_too_long_is_killed_and_replaced(tmp_path: Path) -> None:
    """It may be silent for ten seconds; its role, and its ranges, move when it is reaped."""
    image, log = images.random_image(tmp_path / "image", SIZE), tmp_path / "log"
    copied = images.empty_image(tmp_path / "copy", SIZE)
    with (
        nbdkit("file", str(image), "rate=96M", "burstiness=0.2", filters=["rate"], threads=1) as source,
        nbdkit(
            "file",
            str(copied),
            "multi-conn-mode=disable",
            f"logfile={log}",
            filters=["log", "multi-conn"],
            tcp=True,
            threads=1,
        ) as destination,
        started("copy", "-T", "2", "--range-size", "4M", source.uri, destination.uri) as run,
    ):
        port = int(destination.uri.rpartition(":")[2].strip("/"))
        wait_for("a beginning", lambda: images.allocated_bytes(copied) > 4 * MIB or run.process.poll() is not None)
        (writer,) = [pid for pid in run.workers() if is_connected(pid, port)]
        os.kill(writer, signal.SIGSTOP)
        run.wait(60).succeeded()
        assert not processes.alive(writer)
    images.assert_identical(image, copied)
    assert connections_most(log) == 1
