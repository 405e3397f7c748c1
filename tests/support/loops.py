"""A ring, and what tests do with one again and again. Every wait has a deadline; every completion is counted."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from nbdshard.common.ring import Descriptor, Kind, Operation, Ring, Splice
from nbdshard.common.ring.choose import Unusable, open_io_uring
from support.waiting import WAIT_SECONDS

SECONDS_MAX = WAIT_SECONDS


def _io_uring_refusal() -> str:
    try:
        open_io_uring().close()
    except Unusable as reason:
        return str(reason)
    return ""


IO_URING_REFUSAL = _io_uring_refusal()  # why io_uring cannot be tested here; "" if it can


class Loop:
    """Runs one ring. An operation that completes without having been submitted here, or twice, fails the test."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.pending: set[Operation] = set()

    def submit(self, *operations: Operation) -> None:
        for operation in operations:
            self.ring.submit(operation)
            self.pending.add(operation)

    def turn(self, seconds: float = SECONDS_MAX) -> list[Operation]:
        """One wait."""
        done = self.ring.wait(seconds)
        for operation in done:
            assert operation in self.pending, f"{operation.kind} completed twice, or was never submitted"
            assert not operation.pending
            self.pending.remove(operation)
        return done

    def until(self, reached: Callable[[], bool]) -> None:
        """Turn until `reached()`."""
        deadline = time.monotonic() + SECONDS_MAX
        while not reached():
            assert time.monotonic() < deadline, f"not reached; pending: {[one.kind.name for one in self.pending]}"
            self.turn(0.05)

    def finish(self, *operations: Operation) -> list[int]:
        """Turn until all of `operations` (pending already) have completed; their results."""
        self.until(lambda: self.pending.isdisjoint(operations))
        return [operation.result for operation in operations]

    def run(self, *operations: Operation) -> list[int]:
        """Submit and finish."""
        self.submit(*operations)
        return self.finish(*operations)

    def idle(self) -> None:
        """Give the kernel the time to complete what could complete: a few turns in which nothing must happen."""
        for _ in range(3):
            assert self.turn(0.01) == []

    # -- making descriptors

    def attach(self, end: socket.socket) -> Descriptor:
        end.setblocking(False)
        return self.ring.attach(end.detach(), is_socket=True)

    def connection(self) -> tuple[Descriptor, socket.socket]:
        """One end attached, the other a plain blocking socket with a timeout."""
        ours, theirs = socket.socketpair()
        theirs.settimeout(SECONDS_MAX)
        return self.attach(ours), theirs

    def tcp(self) -> tuple[Descriptor, socket.socket]:
        """As `connection`, over loopback TCP."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname(), SECONDS_MAX)
            theirs, _ = listener.accept()
        theirs.settimeout(SECONDS_MAX)
        return self.attach(ours), theirs

    def file(self, path: os.PathLike[str] | str, flags: int) -> Descriptor:
        return self.ring.attach(os.open(path, flags | os.O_CLOEXEC, 0o600), is_socket=False)


def receive(descriptor: Descriptor, *buffers: bytearray | memoryview) -> Operation:
    return Operation(Kind.RECEIVE, descriptor, buffers=[memoryview(buffer) for buffer in buffers])


def send(descriptor: Descriptor, *buffers: bytes | memoryview) -> Operation:
    return Operation(Kind.SEND, descriptor, buffers=list(buffers))


def read(descriptor: Descriptor, offset: int, *buffers: bytearray | memoryview) -> Operation:
    return Operation(Kind.READ, descriptor, buffers=[memoryview(buffer) for buffer in buffers], offset=offset)


def write(descriptor: Descriptor, offset: int, *buffers: bytes | memoryview) -> Operation:
    return Operation(Kind.WRITE, descriptor, buffers=list(buffers), offset=offset)


def splice_in(pipe: int, disk: Descriptor, offset: int, length: int) -> Splice:
    """From the file into the pipe."""
    return Splice(disk, pipe, offset=offset, length=length, into_pipe=True)


def splice_out(pipe: int, disk: Descriptor, offset: int, length: int) -> Splice:
    """Out of the pipe into the file."""
    return Splice(disk, pipe, offset=offset, length=length, into_pipe=False)


def poll(descriptor: Descriptor, mask: int) -> Operation:
    return Operation(Kind.POLL, descriptor, mask=mask)


def sync(descriptor: Descriptor) -> Operation:
    return Operation(Kind.SYNC, descriptor)


def call(function: Callable[[], object], descriptor: Descriptor | None = None) -> Operation:
    return Operation(Kind.CALL, descriptor, function=function)


def close(descriptor: Descriptor) -> Operation:
    return Operation(Kind.CLOSE, descriptor)
