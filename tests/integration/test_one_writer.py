"""A destination that takes one writer only, which stands still: its role waits for it to be gone. Real processes."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdshard.common.messages import JobOptions
from nbdshard.coordinator.job import Verdict
from support import images, processes
from support.choreography import Choreography, FarWorkers
from support.command import started
from support.doubles import CAN_MULTI_CONN, CMD_WRITE, double
from support.hesitant import Hesitates
from support.images import MIB
from support.servers import nbdkit
from support.sides import RINGS
from support.waiting import wait_for

SIZE = 32 * MIB
FIRST_WRITES = 4


class OneWriter(Hesitates):
    """Does not say CAN_MULTI_CONN, and sees who is connected, and how many at one time.

    It answers the first writes, and the others when it is released. It listens on a unix socket, where a connection
    that was closed is seen to be at once, whatever the machine is busy with.
    """

    def __init__(self, content: bytearray) -> None:
        super().__init__(content, CMD_WRITE, first=FIRST_WRITES)
        self.flags &= ~CAN_MULTI_CONN
        self.clients_most = 0
        self._connections: dict[socket.socket, int] = {}

    def serve(self, connection: socket.socket) -> None:
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        with self.lock:
            self._connections[connection] = pid
        self.clients_most = max(self.clients_most, len(self.clients()))
        try:
            super().serve(connection)
        finally:
            with self.lock:
                del self._connections[connection]

    def clients(self) -> list[int]:
        """The processes that are connected, one for each connection that its other end has not closed."""
        with self.lock:
            poll = select.poll()
            for connection in self._connections:
                poll.register(connection, select.POLLRDHUP)
            gone = {number for number, _ in poll.poll(0)}
            return [pid for connection, pid in self._connections.items() if connection.fileno() not in gone]


@pytest.mark.parametrize("ring", RINGS)
def test_the_role_of_a_writer_that_is_stopped_moves_when_it_has_let_go(tmp_path: Path, ring: str) -> None:
    image, target = images.random_image(tmp_path / "image", SIZE), OneWriter(bytearray(SIZE))
    with ExitStack() as stack:
        source = stack.enter_context(nbdkit("file", str(image), tcp=True, threads=1))
        destination = stack.enter_context(double(target))
        workers = FarWorkers(stack, ring)
        runs = [workers.start_one() for _ in range(2)]

        def steps() -> Iterator[str]:
            while workers.joined < 2:
                yield "both workers"
            while target.count(CMD_WRITE) <= FIRST_WRITES:
                yield "a write that is not answered"
            (writer,) = target.clients()
            os.kill(writer, signal.SIGSTOP)
            wait_for("the writer to stand still", lambda: processes.threads_are(writer, "T"))
            target.released.set()
            while display.status is None or display.status.destination_connections:
                assert target.clients() == [writer]
                yield "the writer to be given up"
            for turn in range(20):  # it is given up, and nobody takes its place: it may still write
                assert target.clients() == [writer]
                yield f"turn {turn} of 20"
            os.kill(writer, signal.SIGCONT)
            while target.clients() == [writer]:
                yield "the writer to let go"

        display = Choreography(steps())
        options = JobOptions(request_size=MIB, requests=16, queue_size=16 * MIB, sparse_unit=None)
        outcome = workers.run_job(source.uri, destination, options, display, connections=4, range_size=4 * MIB)
        assert outcome.verdict is Verdict.COMPLETE, outcome.error
        for run in runs:
            run.wait()
    assert target.content == image.read_bytes()
    assert target.clients_most == 1


def test_a_local_writer_that_is_stopped_for_too_long_is_killed_and_replaced(tmp_path: Path) -> None:
    """It may be silent for ten seconds; its role, and its ranges, move when it is reaped."""
    image, target = images.random_image(tmp_path / "image", SIZE), OneWriter(bytearray(SIZE))
    with (
        nbdkit("file", str(image), threads=1) as source,
        double(target) as destination,
        started("copy", "-T", "2", "--range-size", "4M", source.uri, destination) as run,
    ):
        wait_for("a write that is not answered", lambda: target.count(CMD_WRITE) > FIRST_WRITES)
        (writer,) = target.clients()
        os.kill(writer, signal.SIGSTOP)
        wait_for("the writer to stand still", lambda: processes.threads_are(writer, "T"))
        target.released.set()
        run.wait().succeeded()
        assert not processes.alive(writer)
    assert target.content == image.read_bytes()
    assert target.clients_most == 1
