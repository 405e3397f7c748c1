"""Another layer: `python cow_layer.py -e disk raw scratch:file:IMAGE --unix SOCKET` lets clients write, IMAGE unharmed.

Copy on write, to memory: a block that is written is copied first, and forgotten with the server. (`nbdshard serve` has
a layer `cow` that can also keep what was written.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence

from nbdshard.cli.extended import serve_extended
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import LAYERS
from nbdshard.server.device import Hole
from nbdshard.server.extensions import Extensions
from nbdshard.server.layers.base import Passing
from nbdshard.server.opening import Layer

BLOCK = 1 << 16


class Scratch(Passing):
    """Passes on what it does not say itself; `below` is only read."""

    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.CAN_MULTI_CONN

    def __init__(self, below: Backend) -> None:
        super().__init__(below)
        self._written: dict[int, bytearray] = {}
        self._lock = threading.Lock()

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        parts: list[memoryview | bytes | Hole] = []
        with self._lock:
            for number, piece in blocks(where):
                if number in self._written:
                    start = piece.start - number * BLOCK
                    parts.append(bytes(self._written[number][start : start + piece.length]))
                else:
                    parts += self.below.read(piece)
        return parts

    def write(self, where: Range, data: memoryview) -> None:
        with self._lock:
            for number, piece in blocks(where):
                if number not in self._written:
                    self._written[number] = self._copy(Range.of(number * BLOCK, BLOCK))
                start, at = piece.start - number * BLOCK, piece.start - where.start
                self._written[number][start : start + piece.length] = data[at : at + piece.length]

    def _copy(self, block: Range) -> bytearray:
        parts = self.below.read(Range(block.start, min(block.end, self.size)))
        return bytearray(b"".join(bytes(part.length) if isinstance(part, Hole) else part for part in parts))

    def extents(self, where: Range) -> Extents:
        with self._lock:
            is_as_it_was = not any(number in self._written for number, _ in blocks(where))
        return self.below.extents(where) if is_as_it_was else [(where, 0)]

    def flush(self) -> None:
        return None


def blocks(where: Range) -> Iterator[tuple[int, Range]]:
    """For each block that `where` touches its number, and which part of `where` is in it."""
    for number in range(where.start // BLOCK, -(-where.end // BLOCK)):
        yield number, Range(max(where.start, number * BLOCK), min(where.end, (number + 1) * BLOCK))


SCRATCH = Layer(lambda below, _opening: Scratch(below), only_reads=True)

if __name__ == "__main__":
    sys.exit(serve_extended(Extensions(layers={**LAYERS, "scratch": SCRATCH})))
