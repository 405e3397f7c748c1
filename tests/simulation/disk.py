"""A server's disk: what reads see, and what would be left after a power cut."""

from __future__ import annotations

import random
from collections.abc import Iterator

HOLE, ZERO = 1, 2  # flags of base:allocation
DATA = 0
CACHED_BYTES = 512  # what a cache writes back, or loses, as one

Extent = tuple[int, int, int]  # start, end, flags


class Disk:
    """`data` is what reads see; `stable` what a flush has covered. `layout` says what is known to be zero."""

    def __init__(self, data: bytearray, layout: list[Extent] | None = None) -> None:
        self.data = data
        self.stable = bytearray(data)
        self.layout = layout if layout is not None else [(0, len(data), DATA)] if data else []

    def settle(self, start: int, end: int) -> None:
        """A flush has covered these bytes."""
        self.stable[start:end] = self.data[start:end]

    def lose_unflushed(self) -> None:
        """The power was cut: only what was flushed is left."""
        self.data[:] = self.stable

    def crash(self, chance: random.Random) -> None:
        """The cache is lost: of what no flush has covered, each block may have been written back before, or not."""
        lost_share = chance.choice((0.2, 0.5, 1.0))
        for start in range(0, len(self.data), CACHED_BYTES):
            block = slice(start, start + CACHED_BYTES)
            if self.data[block] != self.stable[block]:
                is_lost = chance.random() < lost_share
                older, newer = (self.data, self.stable) if is_lost else (self.stable, self.data)
                older[block] = newer[block]

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """What the layout says of these bytes, in order without gaps."""
        for first, last, flags in self.layout:
            if first < end and start < last:
                yield max(first, start), min(last, end), flags
