"""Where payload of a reply goes: one small class per kind of place.

The client announces each piece (`begin`), asks where its next bytes go (`target`), and reports what came
(`advance`). A sink that wants its payload spliced instead of received gives an empty target: the shell then
moves up to `Client.payload_left` bytes from socket to pipe itself and reports their number in the same way.
"""

from __future__ import annotations

from typing import Final, Protocol

from nbdshard.common.errors import BugError
from nbdshard.common.limits import DRAIN_BUFFER_BYTES, ZERO_FILL_BYTES

_ZEROES: Final = memoryview(bytes(ZERO_FILL_BYTES))


class Sink(Protocol):
    """The place of one request's payload; offsets count from the start of the request."""

    def begin(self, at: int, length: int) -> None:
        """`length` bytes come next, for offset `at`; the client has checked that they fit."""

    def target(self) -> memoryview:
        """Where the rest of the piece goes, or the beginning of it; empty: move it without us."""

    def advance(self, count: int) -> None:
        """`count` bytes of the piece have arrived where `target` said."""

    def take(self, data: memoryview) -> None:
        """The piece's next bytes, which came along with a header: at most HEAD_BYTES_MAX of them."""

    def zeroes(self, at: int, length: int) -> None:
        """`length` bytes at offset `at` read as zeroes; nothing arrives for them."""


class BufferSink:
    """Payload is received straight into the caller's buffer."""

    __slots__ = ("_at", "_end", "_view")

    def __init__(self, buffer: memoryview) -> None:
        if buffer.readonly or not buffer.c_contiguous:
            raise BugError("a read needs a buffer that is writable and contiguous")
        self._view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        self._at = 0
        self._end = 0

    def __len__(self) -> int:
        return len(self._view)

    def begin(self, at: int, length: int) -> None:
        self._at = at
        self._end = at + length

    def target(self) -> memoryview:
        return self._view[self._at : self._end]

    def advance(self, count: int) -> None:
        self._at += count

    def take(self, data: memoryview) -> None:
        self._view[self._at : self._at + len(data)] = data
        self._at += len(data)

    def zeroes(self, at: int, length: int) -> None:
        end = at + length
        while at < end:
            piece = min(end - at, ZERO_FILL_BYTES)
            self._view[at : at + piece] = _ZEROES[:piece]
            at += piece


class DrainSink:
    """Payload nobody wants: it goes into one small buffer over and over."""

    __slots__ = ("_left", "_view")

    def __init__(self) -> None:
        self._view = memoryview(bytearray(DRAIN_BUFFER_BYTES))
        self._left = 0

    def begin(self, at: int, length: int) -> None:
        del at
        self._left = length

    def target(self) -> memoryview:
        return self._view[: self._left]

    def advance(self, count: int) -> None:
        self._left -= count

    def take(self, data: memoryview) -> None:
        self._left -= len(data)

    def zeroes(self, at: int, length: int) -> None:
        """Nothing to forget."""
