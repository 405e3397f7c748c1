"""A worker that is stopped with writes prepared, is given up, and wakes up when the job is over: real processes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from nbdshard.common.messages import JobOptions
from nbdshard.coordinator.job import Verdict
from support import images, processes
from support.choreography import Choreography, FarWorkers, is_connected, on_the_way
from support.gates import Gate
from support.images import MIB
from support.servers import nbdkit, private_folder
from support.sides import RINGS
from support.waiting import wait_for

SIZE = 96 * MIB
SPLICE = JobOptions(request_size=MIB, requests=64, queue_size=64 * MIB, sparse_unit=0, data_path="splice")


class Way(msgspec.Struct, frozen=True):
    """How payload goes, and how much of it must be in the worker itself, in no socket, when it is stopped."""

    options: JobOptions
    prepared_bytes: int


WAYS = {
    "lane": Way(SPLICE, 1),  # it reads no further while a payload is half sent
    "buffer": Way(replace(SPLICE, data_path="buffer"), 4 * MIB),
}


def begun(log: Path, what: str) -> int:
    """How many requests of this kind nbdkit's log filter has seen."""
    return len(re.findall(rf"connection=\d+ {what} id=", log.read_text()))


def ended(log: Path, what: str) -> int:
    """How many of them were carried out."""
    return len(re.findall(rf"\.\.\.{what} id=\d+ return=0", log.read_text()))


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_worker_that_wakes_up_when_the_job_is_over_writes_nothing_more(tmp_path: Path, way: str, ring: str) -> None:
    image, log, reads = images.filled_image(tmp_path / "image", SIZE), tmp_path / "log", tmp_path / "reads"
    options, prepared_bytes = WAYS[way].options, WAYS[way].prepared_bytes
    with ExitStack() as stack:
        # A slow source has many requests under way, and a destination that takes nothing leaves their data waiting.
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
        gate = Gate(stack.enter_context(private_folder()))
        destination = stack.enter_context(
            nbdkit(
                "file",
                str(image),
                gate.option,
                f"logfile={log}",
                filters=["log", "pause"],
                tcp=True,
                threads=1,
            )
        )
        gate.shut()
        read_port, port = (int(server.uri.rpartition(":")[2].strip("/")) for server in (source, destination))
        workers = FarWorkers(stack, ring)
        sleeper = workers.start_one()

        def buffered() -> int:
            """What is read and neither sent nor being sent; it is known while the source has nothing to say."""
            is_silent = on_the_way(read_port, to_server=False) == 0 and processes.threads_are(source.pid, "S")
            reads_ended, writes_begun = ended(reads, "Read"), begun(log, "Write")
            if not is_silent or reads_ended < begun(reads, "Read"):
                return 0
            in_bytes = (reads_ended - writes_begun) * options.request_size
            return in_bytes - on_the_way(port, to_server=True)

        def is_prepared() -> bool:
            held = buffered() if way == "buffer" else processes.piped_bytes(sleeper.pid, MIB)
            return log.exists() and held >= prepared_bytes

        def is_drained() -> bool:
            """In this order: what is in no socket has been received, and a thread that has all of a request and has not
            told the log yet does not sleep."""
            return (
                on_the_way(port, to_server=True) == 0
                and processes.threads_are(destination.pid, "S")
                and ended(log, "Write") == begun(log, "Write")
            )

        def steps() -> Iterator[str]:
            while True:
                while not is_prepared():
                    yield f"{prepared_bytes} bytes that are read and cannot be written"
                os.kill(sleeper.pid, signal.SIGSTOP)
                wait_for("the worker to stand still", lambda: processes.threads_are(sleeper.pid, "T"))
                if is_prepared():  # still: until the sockets are full it comes and goes
                    break
                os.kill(sleeper.pid, signal.SIGCONT)
            gate.open()
            workers.start_one()
            while display.status is None or display.status.phase != "stopping":
                yield "the other worker to copy everything"
            signal.raise_signal(signal.SIGINT)  # nobody waits for the one that stands still

        display = Choreography(steps())
        ends = (source.uri, destination.uri)
        outcome = workers.run_job(*ends, options, display, connections=2, range_size=32 * MIB)
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
        sleeper.wait()
