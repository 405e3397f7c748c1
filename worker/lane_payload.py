"""Where a lane holds its one payload: in its pipe, in its buffer, or the beginning in one and the rest in the other.

The calls that take it from the source wait, LANE_LOOK_SECONDS at a time; `stuck(result)` is called each time nothing
came, with -EAGAIN or what else the source answered, and raises if that was the end.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from nbdshard.worker.lending import LaneSource
from nbdshard.worker.pipes import NO_LOOK, SAMPLE_BYTES, SAMPLES_MAX, Pipe, small_pieces

_ZERO_SAMPLE: Final = bytes(SAMPLE_BYTES)
_NO_PIPE: Final = -1

Stuck = Callable[[int], None]


class Looks(Protocol):
    """What a lane needs of the kernel's pipes (plumbing.SystemPlumbing)."""

    def open_pipe(self, size: int) -> Pipe | int: ...
    def close_pipe(self, pipe: Pipe) -> None: ...
    def sample(self, pipe: Pipe, unit: int) -> bytes: ...
    def close(self) -> None: ...


class LanePayload:
    """Room for `size` bytes. `buffer` is empty until something has to go there."""

    def __init__(self, size: int, plumbing: Looks, tell: Callable[[str], None]) -> None:
        """`tell`: why not all goes through the pipe, once, for the log."""
        self.pipe = Pipe(_NO_PIPE, _NO_PIPE, 0)
        self.buffer = bytearray(0)
        self.is_poor = False  # what has to be looked at is better off in the buffer at once
        self._size = size
        self._plumbing = plumbing
        self._tell = tell
        self._poll = select.poll()

    def open(self) -> str:
        """Open the pipe: "" or why there is none."""
        pipe = self._plumbing.open_pipe(self._size)
        if isinstance(pipe, int):
            return "no pipe can be opened"
        if pipe.capacity < self._size:
            self._plumbing.close_pipe(pipe)
            return f"a pipe can hold only {pipe.capacity} bytes (pipe-max-size, pipe-user-pages-soft)"
        os.set_blocking(pipe.write_end, True)  # or else nothing that fills it waits
        self._poll.register(pipe.write_end, select.POLLOUT)
        self.pipe = pipe
        return ""

    def close(self) -> None:
        """Idempotent."""
        if self.pipe.capacity:
            self._poll.unregister(self.pipe.write_end)
            self._plumbing.close_pipe(self.pipe)
            self.pipe = Pipe(_NO_PIPE, _NO_PIPE, 0)
        self._plumbing.close()

    def fill(self, source: LaneSource, start: int, length: int, stuck: Stuck) -> int:
        """Into the pipe: all of it, or as much as the pipe had room for; the rest goes into the buffer then."""
        pipe, moved = self.pipe, 0
        while moved < length:
            count = source.fill(pipe, start + moved, length - moved)
            if count > 0:
                moved += count
                pipe.held = moved
                if moved < length and not self._poll.poll(0):
                    self._be_poor(small_pieces(self._size, moved))
                    self.receive(source, start, length, stuck, at=moved)
                    return moved
            else:
                stuck(count)
        return moved

    def receive(self, source: LaneSource, start: int, length: int, stuck: Stuck, *, at: int = 0) -> None:
        """Into the buffer, from offset `at` on, where it is if all goes there."""
        view = self._memory()
        while at < length:
            count = source.receive(view[at:length], start + at)
            if count > 0:
                at += count
            else:
                stuck(count)

    def _be_poor(self, why: str) -> None:
        if not self.is_poor:
            self.is_poor = True
            self._tell(why)

    def _memory(self) -> memoryview:
        if not self.buffer:
            self.buffer = bytearray(self._size)
        return memoryview(self.buffer)

    def seems_dense(self, unit: int, start: int, in_pipe: int, length: int) -> bool:
        """As `PipedPayload.seems_dense`: samples show that no unit is zero."""
        if in_pipe < length or start % unit or length % unit or length > SAMPLES_MAX * unit:
            return False
        samples = self._plumbing.sample(self.pipe, unit)
        if not samples:
            self._be_poor(f"{NO_LOOK}; what is searched for zeroes goes through a buffer")
        return samples != b"" and _ZERO_SAMPLE not in samples

    def unload(self) -> None:
        """What is in the pipe into the buffer, in front of what has spilled there."""
        held, at = self.pipe.held, 0
        while at < held:
            view = self._memory()
            at += os.readv(self.pipe.read_end, [view[at:held]])
        self.pipe.held = 0


def rest_of(pieces: Sequence[bytes | memoryview], count: int) -> list[bytes | memoryview]:
    """`pieces` without the first `count` bytes."""
    for index, piece in enumerate(pieces):
        if count < len(piece):
            return [memoryview(piece)[count:], *pieces[index + 1 :]]
        count -= len(piece)
    return []
