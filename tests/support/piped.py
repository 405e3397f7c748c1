"""Payload on its way from a source to a destination through real pipes, and plumbing with faults of its own."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from nbdshard.common.nbd.client import Client, Done
from nbdshard.common.nbd.payload import Piece
from nbdshard.common.nbd.wire import pack_hole
from nbdshard.common.ranges import Range
from nbdshard.worker.piped import PipedPayload, PipePool, PipeRun
from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support.arrival import Arrival, arrival
from support.images import MIB
from support.nbd_feeding import an_export, chunk, data_chunk, send_all

OFFSET = 4096  # of every read in the export
HOLE = 2  # NBD_REPLY_TYPE_OFFSET_HOLE


class Counted(SystemPlumbing):
    """Knows the pipes that are open, in the order they were opened.

    Beyond `open_max` a pipe is refused with `refusal` (-errno), or has only so many bytes.
    """

    def __init__(self, open_max: int = 1000, refusal: int = -errno.EMFILE) -> None:
        super().__init__()
        self.pipes: list[Pipe] = []
        self.attempts = 0
        self._open_max = open_max
        self._refusal = refusal

    def open_pipe(self, size: int) -> Pipe | int:
        self.attempts += 1
        if len(self.pipes) >= self._open_max:
            return self._refusal if self._refusal < 0 else super().open_pipe(self._refusal)
        pipe = super().open_pipe(size)
        assert isinstance(pipe, Pipe)
        self.pipes.append(pipe)
        return pipe

    def close_pipe(self, pipe: Pipe) -> None:
        super().close_pipe(pipe)
        if pipe in self.pipes:
            self.pipes.remove(pipe)


class Shallow(SystemPlumbing):
    """tee(2) duplicates no more than `depth` bytes at a time, or fails with `-depth`."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self._depth = depth

    def sample(self, pipe: Pipe, unit: int) -> bytes:
        return b""

    def peek(self, pipe: Pipe, buffer: memoryview) -> int:
        if self._depth < 0:
            return self._depth
        whole = memoryview(bytearray(pipe.held))
        assert super().peek(pipe, whole) == pipe.held
        seen = min(self._depth, pipe.held)
        buffer[:seen] = whole[:seen]
        return seen


class World:
    """A pool, a connection to a source, and one to a destination."""

    def __init__(self, plumbing: SystemPlumbing, source: Arrival, target: Arrival, size: int) -> None:
        self.plumbing = plumbing
        self.pool = PipePool(plumbing, size)
        self.pool.grow(4)
        self.source = source
        self.target = target
        self.client = Client(an_export(), "srv", 4)

    def begin(self, length: int, client: Client | None = None) -> PipedPayload:
        """A read of `length` bytes is under way."""
        payload = self.pool.take(length)
        assert payload is not None
        client = client or self.client
        client.read(0, Range.of(OFFSET, length), payload)
        send_all(client)
        return payload

    def filled(self, length: int, *pieces: bytes) -> PipedPayload:
        """The payload of a read that was answered with `pieces`."""
        payload = self.begin(length)
        events = self.source.come(self.client, *pieces)
        assert events[-1] == Done(0), events
        return payload

    def left(self, payload: PipedPayload) -> bytes:
        """All of `payload`, as a destination gets it."""
        return self.target.leave(list[Piece](payload.pieces))

    def give_back(self, payload: PipedPayload) -> None:
        """The pool must find nothing in a pipe it uses again."""
        self.pool.give(payload)
        assert payload.pipe.held == 0


@contextlib.contextmanager
def world(size: int = MIB, plumbing: SystemPlumbing | None = None) -> Iterator[World]:
    """Pipes of `size` bytes."""
    plumbing = plumbing or SystemPlumbing()
    with arrival(plumbing) as source, arrival(plumbing) as target:
        one = World(plumbing, source, target, size)
        try:
            yield one
        finally:
            one.pool.close()


def data(at: int, content: bytes, *, done: bool = False) -> bytes:
    """A chunk of data at `at`, counted from the read's offset."""
    return data_chunk(0, OFFSET + at, content, done=done)


def hole(at: int, length: int, *, done: bool = False) -> bytes:
    return chunk(1 if done else 0, HOLE, 0, pack_hole(OFFSET + at, length))


def done() -> bytes:
    """The end of a reply: a chunk without content."""
    return chunk(1, 0, 0)


def shape_of(payload: PipedPayload) -> list[tuple[str, int]]:
    """Where its pieces are, and how long."""
    return [("pipe" if isinstance(piece, PipeRun) else "memory", len(piece)) for piece in payload.pieces]
