"""A worker that is stopped with writes prepared, is given up, and wakes up when the job is over: real processes."""

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
from nbdshard.common.messages import DataPath, EndpointAddress, JobOptions
from nbdshard.coordinator.job import Job, Verdict
from nbdshard.coordinator.service import Shell, run_job
from nbdshard.coordinator.signals import SignalWatch
from support import images, processes
from support.choreography import Choreography, is_connected, on_the_way
from support.command import Run, started
from support.images import MIB
from support.servers import nbdkit
from support.sides import RINGS
from support.waiting import wait_for

SIZE = 96 * MIB
PREPARED_BYTES = 4 * MIB  # that were read and not written, and are in no socket: they wait in the worker


def begun(log: Path, what: str) -> int:
    """How many requests of this kind nbdkit's log filter has seen."""
    return len(re.findall(rf"connection=\d+ {what} id=", log.read_text()))


def ended(log: Path, what: str) -> int:
    """How many of them were carried out."""
    return len(re.findall(rf"\.\.\.{what} id=\d+ return=0", log.read_text()))


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("data_path", ["splice", "buffer"])
def test_a_worker_that_wakes_up_when_the_job_is_over_writes_nothing_more(
    tmp_path: Path, data_path: DataPath, ring: str
) -> None:
    image, log, reads = images.filled_image(tmp_path / "image", SIZE), tmp_path / "log", tmp_path / "reads"
    options = JobOptions(request_size=MIB, requests=64, queue_size=64 * MIB, sparse_unit=0, data_path=data_path)
    with ExitStack() as stack:
        # A source that is slow to answer has many requests under way, a slow destination leaves them waiting.
        source = stack.enter_context(
            nbdkit(
                "pattern",
                str(SIZE),
                "delay-read=50ms",
                f"logfile={reads}",
                filters=["log", "delay"],
                tcp=True,
                threads=64,
            )
        )
        destination = stack.enter_context(
            nbdkit(
                "file",
                str(image),
                "delay-write=30ms",
                f"logfile={log}",
                filters=["log", "delay"],
                tcp=True,
                threads=1,
            )
        )
        read_port, port = (int(server.uri.rpartition(":")[2].strip("/")) for server in (source, destination))
        channel = CoordinatorChannel(ControlUrl("tcp", "127.0.0.1", 0))
        stack.callback(channel.close)
        signals = stack.enter_context(SignalWatch())

        def start_worker() -> Run:
            return stack.enter_context(started("worker", "--connect", str(channel.url), "--ring", ring))

        sleeper = start_worker()

        def prepared() -> int:
            if not log.exists():
                return 0
            held = (ended(reads, "Read") - begun(log, "Write")) * MIB
            return held - on_the_way(read_port, to_server=False) - on_the_way(port, to_server=True)

        def is_drained() -> bool:
            return on_the_way(port, to_server=True) == 0 and ended(log, "Write") == begun(log, "Write")

        def steps() -> Iterator[None]:
            while prepared() < PREPARED_BYTES:
                yield
            os.kill(sleeper.pid, signal.SIGSTOP)
            wait_for("the worker to stand still", lambda: processes.state(sleeper.pid) == "T")
            start_worker()
            while display.status is None or display.status.phase != "stopping":
                yield
            signal.raise_signal(signal.SIGINT)  # nobody waits for the one that stands still

        display = Choreography(steps())
        ends = (EndpointAddress("nbd", source.uri), (EndpointAddress("nbd", destination.uri),))
        job = Job(
            *("job", 1, *ends, options),
            connections=2,
            workers=2,
            range_size=32 * MIB,
            local_workers=False,
            machine=machine_id(),
            lease_seconds=1.5,
            heartbeat_seconds=0.3,
        )
        outcome = run_job(job, Shell(channel, None, lambda _: None, (), display, signals))
        assert outcome.verdict is Verdict.UNFENCED, outcome.error
        assert [name.rpartition("/")[2] for name in outcome.unfenced] == [str(sleeper.pid)]
        wait_for("the server to be done", is_drained)
        assert image.read_bytes() == images.pattern(0, SIZE)

        writes = begun(log, "Write")
        with image.open("r+b") as file:  # the disk is in use by now
            file.write(b"\x99" * SIZE)
        os.kill(sleeper.pid, signal.SIGCONT)
        wait_for("the worker to close its connections", lambda: not is_connected(sleeper.pid, port))
        wait_for("the server to be done", is_drained)
        assert begun(log, "Write") == writes
        assert image.read_bytes() == b"\x99" * SIZE
        os.kill(sleeper.pid, signal.SIGINT)
        sleeper.wait(30)
