"""What a request sends besides its header: pieces, in memory or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from nbdshard.common.errors import BugError


class Elsewhere:
    """A piece of payload that is not in memory: `data_to_send` yields it in its place, and the shell moves it itself.

    `length` is what it has at the time it is queued, in bytes; a subclass knows where they are (a pipe, say).
    """

    __slots__ = ("length",)

    def __init__(self, length: int = 0) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


Piece: TypeAlias = memoryview | bytes | Elsewhere


def as_bytes(piece: Piece) -> memoryview | Elsewhere:
    """`piece` with its length in bytes. Raises BugError where it is not one run of memory."""
    if isinstance(piece, Elsewhere):
        return piece
    view = memoryview(piece)
    if not view.c_contiguous:
        raise BugError("payload that is not contiguous")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def in_memory(pieces: Sequence[Piece]) -> list[memoryview | bytes]:
    """`pieces` for a caller that queues nothing else. Raises BugError where one is elsewhere."""
    found = [piece for piece in pieces if not isinstance(piece, Elsewhere)]
    if len(found) < len(pieces):
        raise BugError("payload that is not in memory")
    return found
