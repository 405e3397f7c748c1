"""One connection of a worker on a real ring, turned by the test: what is asked of it, and all its listener hears."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdshard.common.errors import NbdshardError, RequestError
from nbdshard.common.messages import EndpointAddress, EndpointDescription, Side
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Ring, open_ring
from nbdshard.worker.opening import OpenConnection, make_connection
from nbdshard.worker.ports import Extents
from support.waiting import WAIT_SECONDS

RINGS = ("io_uring", "epoll")
HANDLES = 65
TURN_SECONDS = 0.05


class Answer:
    """What the listener heard of one request."""

    def __init__(self) -> None:
        self.sent = 0
        self.done = 0
        self.error: RequestError | None = None
        self.count = -1
        self.extents: Extents | None = None


class Driver:
    """Starts `connection` and turns its loop. Is the connection's `ports.Listener`."""

    def __init__(self, ring: Ring, address: EndpointAddress, side: Side) -> None:
        self.ring = ring
        self.answers: dict[int, Answer] = {}
        self.events: list[str] = []
        self.ready = 0
        self.lost: list[NbdshardError] = []
        self.now = time.monotonic
        options = None  # only NBD connections have any
        self.connection = make_connection(ring, address, side, options, self._on_ready, self._on_lost)  # type: ignore[arg-type]
        self.connection.listener = self
        self.inside = False  # a method of the connection is running that must not call back
        self._next = 0

    def _on_ready(self, connection: OpenConnection) -> None:
        assert not self.inside
        assert connection is self.connection
        self.ready += 1

    def _on_lost(self, connection: OpenConnection, error: NbdshardError) -> None:
        assert not self.inside
        assert connection is self.connection
        self.lost.append(error)

    @property
    def description(self) -> EndpointDescription:
        return self.connection.description

    # -- ports.Listener

    def sent(self, handle: int) -> None:
        assert not self.inside
        self.events.append(f"sent {handle}")
        self.answers[handle].sent += 1

    def arriving(self, handle: int) -> None:
        assert not self.inside

    def done(self, handle: int, error: RequestError | None, count: int, extents: Extents | None) -> None:
        assert not self.inside
        self.events.append(f"done {handle}")
        answer = self.answers[handle]
        answer.done += 1
        answer.error, answer.count, answer.extents = error, count, extents

    # -- the loop

    def turn(self, timeout: float = TURN_SECONDS) -> None:
        """One turn, as the worker's loop does it."""
        self.connection.pump(self.now())
        for operation in self.ring.wait(0.0 if self.connection.has_work else timeout):
            if operation.owner is not None:
                operation.owner(operation)

    def until(self, what: str, condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
        """Turn until `condition` holds. Raises TimeoutError naming `what`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s in vain for {what}; lost: {self.lost}")
            self.turn()

    def start(self) -> None:
        with self._quiet():
            self.connection.start(self.now(), HANDLES)

    def open(self) -> None:
        """Start, and turn until the connection is up."""
        self.start()
        self.until("the connection to be ready", lambda: self.ready or self.lost)
        assert not self.lost, self.lost

    def refused(self) -> NbdshardError:
        """Start, and turn until the connection has failed; why it did."""
        self.start()
        self.until("the connection to fail", lambda: self.ready or self.lost)
        assert self.ready == 0
        return self.lost[0]

    def leave(self) -> None:
        """Disconnect softly, and turn until the descriptor is gone."""
        with self._quiet():
            self.connection.disconnect()
        self.until("the connection to be closed", lambda: self.connection.closed)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    # -- requests

    def ask(self, method: str, *arguments: object, **options: object) -> Answer:
        """Queue one request under a new handle."""
        handle, self._next = self._next, self._next + 1
        answer = self.answers[handle] = Answer()
        with self._quiet():
            getattr(self.connection, method)(handle, *arguments, **options)
        return answer

    def answered(self, *answers: Answer) -> None:
        """Turn until all of `answers` are done; each is so exactly once, after exactly one `sent`."""
        self.until("the answers", lambda: all(answer.done for answer in answers))
        assert [(answer.sent, answer.done) for answer in answers] == [(1, 1)] * len(answers)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there, or as many as came; the error is raised."""
        buffer = bytearray(length)
        answer = self.ask("read", Range.of(offset, length), memoryview(buffer))
        self.answered(answer)
        if answer.error is not None:
            raise answer.error
        return bytes(buffer[: answer.count])

    def write(self, offset: int, data: bytes) -> Answer:
        answer = self.ask("write", Range.of(offset, len(data)), memoryview(data))
        self.answered(answer)
        return answer

    def zero(self, offset: int, length: int, *, allocated: bool) -> Answer:
        answer = self.ask("zero", Range.of(offset, length), allocated=allocated)
        self.answered(answer)
        return answer

    def extents(self, offset: int, length: int) -> Extents:
        answer = self.ask("extents", Range.of(offset, length))
        self.answered(answer)
        assert answer.error is None
        assert answer.extents is not None
        return answer.extents

    def flush(self) -> Answer:
        answer = self.ask("flush")
        self.answered(answer)
        return answer


@contextlib.contextmanager
def driver(ring: str, address: EndpointAddress, side: Side) -> Iterator[Driver]:
    """A connection not yet started; closed, and its ring with it, when the block ends."""
    loop, _ = open_ring(ring)
    try:
        one = Driver(loop, address, side)
        yield one
        one.connection.close()
        one.until("the connection to be closed", lambda: one.connection.closed)
    finally:
        loop.close()


def file_address(path: Path) -> EndpointAddress:
    """The address of what is at `path` now."""
    status = os.stat(path)
    return EndpointAddress(kind="file", address=str(path), identity=f"{status.st_dev}:{status.st_ino}")
