"""A server's disk: what reads see, and what would be left after a power cut."""

from __future__ import annotations

from collections.abc import Iterator

HOLE, ZERO = 1, 2  # flags of base:allocation
DATA = 0

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

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """What the layout says of these bytes, in order without gaps."""
        for first, last, flags in self.layout:
            if first < end and start < last:
                yield max(first, start), min(last, end), flags
