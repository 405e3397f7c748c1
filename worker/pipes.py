"""Pipes that payload goes through past user space, and the calls that move it. Pure: the calls are in plumbing.py.

Nothing here waits: a call moves what can be moved at once and returns its number of bytes, or -errno (-EAGAIN: nothing
can be moved now). So all of it may be called between two turns of the ring. `Plumbing` is what a simulation replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

SAMPLE_BYTES: Final = 8  # random data has as many zero bytes in a row once in 2**64
SAMPLES_MAX: Final = 500  # two vectors for each, and IOV_MAX is 1024


class Pipe:
    """An open pipe. `capacity` is what it holds if it is filled by whole pages, `held` the bytes that are in it now.

    `is_full`: at the last `fill` there was more than it had room for. `is_unknown`: a call failed in the middle, and
    nobody knows what is in it any more.
    """

    __slots__ = ("capacity", "held", "is_full", "is_unknown", "read_end", "write_end")

    def __init__(self, read_end: int, write_end: int, capacity: int) -> None:
        self.read_end = read_end
        self.write_end = write_end
        self.capacity = capacity
        self.held = 0
        self.is_full = False
        self.is_unknown = False


class Plumbing(Protocol):
    """The system calls of a spliced copy. Counts are bytes; every `int` may be -errno."""

    def open_pipe(self, size: int) -> Pipe | int:
        """An empty pipe with `size` bytes of capacity, or less where the user's share is used up (pipe(7))."""

    def close_pipe(self, pipe: Pipe) -> None:
        """Close both ends."""

    def fill(self, pipe: Pipe, number: int, count: int) -> int:
        """splice(2) what has arrived at socket `number`, up to `count` bytes; 0 at the end of its stream.

        Less than `count`: the socket is empty, or has ended or failed, or `pipe.is_full`. -EAGAIN: nothing was moved.
        """

    def drain(self, pipe: Pipe, number: int, count: int, *, more: bool) -> int:
        """splice(2) up to `count` bytes from the pipe to socket `number`; `more`: something follows at once."""

    def peek(self, pipe: Pipe, buffer: memoryview) -> int:
        """Copy what is in the pipe into `buffer`, and leave it there: all of it, or as much as tee(2) gave."""

    def sample(self, pipe: Pipe, unit: int) -> bytes:
        """SAMPLE_BYTES out of each `unit` bytes in the pipe, of which there are SAMPLES_MAX at most, without a rest.

        All stays in the pipe. b"" where the bytes could not be had.
        """

    def read(self, pipe: Pipe, buffer: memoryview) -> int:
        """Take bytes out of the pipe into `buffer`."""

    def discard(self, pipe: Pipe) -> int:
        """Throw away what is in the pipe."""

    def receive(self, number: int, buffers: Sequence[memoryview]) -> int:
        """readv(2) from socket `number`; 0 at the end of its stream."""

    def send(self, number: int, pieces: Sequence[bytes | memoryview], *, more: bool) -> int:
        """Send from `pieces`, in order, to socket `number`; `more`: something follows at once (MSG_MORE)."""

    def close(self) -> None:
        """Close what it opened for its own use. Idempotent."""


# For the log, behind a peer's name.
NO_LOOK: Final = "no pipe could be had to look at spliced payload with"


def small_pieces(capacity: int, held: int) -> str:
    """A pipe of `capacity` bytes was full when it held less."""
    return (
        f"its data comes in small pieces: a pipe of {capacity} bytes was full with {held}; "
        "the rest of such payload goes through a buffer"
    )
