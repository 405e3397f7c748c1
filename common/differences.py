"""Where two sides differ: how much in all, and the first ranges of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from nbdshard.common.limits import DIFFERENCES_MAX
from nbdshard.common.ranges import Range, RangeSet


class Differences:
    """Gathers ranges that differ, each told once, in any order; keeps the first DIFFERENCES_MAX, neighbours as one.

    `total_bytes` counts them all. `is_cut`: there are more than those kept, and none of them lies before one that is.
    """

    __slots__ = ("_cut", "_kept", "total_bytes")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self.total_bytes = 0
        self._kept = RangeSet()
        self._cut: int | None = None  # whatever starts from here on is only counted
        for piece in ranges:
            self.add(piece)

    def add(self, piece: Range) -> None:
        """`piece` differs; it overlaps with nothing that was added before."""
        self.total_bytes += piece.length
        self._keep(piece)

    def merge(self, ranges: Iterable[Range], total_bytes: int) -> None:
        """Take over what another one gathered elsewhere: the ranges it kept, and its total."""
        self.total_bytes += total_bytes
        told = 0
        end = 0
        for piece in ranges:
            told += piece.length
            end = piece.end
            self._keep(piece)
        if told < total_bytes and (self._cut is None or end < self._cut):
            self._cut = end  # what it did not keep lies somewhere behind
            self._drop_behind()

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The first ones, in order; none touches another."""
        return tuple(self._kept)

    @property
    def is_cut(self) -> bool:
        return self._cut is not None

    def _keep(self, piece: Range) -> None:
        if self._cut is not None and piece.start >= self._cut:
            return
        self._kept.add(piece)
        if len(self._kept) > DIFFERENCES_MAX:
            last = self.ranges[-1]
            self._kept.remove(last)
            self._cut = last.start

    def _drop_behind(self) -> None:
        for piece in self.ranges:
            if self._cut is not None and piece.start >= self._cut:
                self._kept.remove(piece)
