"""One leased range as the comparer works on it: what both sides say of their zeroes, what is left, what is found. Pure.

::

    first     |  data   |  zero        |    data    |  zero ...        what its block status says
    second    |  data        |  zero        | data  |                  ... and it ends here: the rest counts as zeroes
    pieces    |  both   | 2nd| neither | 1st| both  |   neither
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import msgspec

from nbdshard.common.differences import Differences
from nbdshard.common.messages import Counters, ErrorReport
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork, Segment


class Piece(msgspec.Struct, frozen=True):
    """A stretch to compare; `zero` says of each side whether all of it is known to read as zeroes."""

    where: Range
    zero: tuple[bool, bool]


class CompareWork:
    """The work of one lease. It is over when `exhausted` and nothing is `outstanding`."""

    __slots__ = (
        "lease",
        "where",
        "maps",
        "alignment",
        "position",
        "outstanding",
        "compared",
        "skipped",
        "differences",
        "abandoned",
        "error",
        "reported",
    )

    def __init__(self, lease: int, where: Range, sizes: Sequence[int], *, alignment: int, hole_min: int) -> None:
        """`sizes`: where either side ends; behind that it counts as zeroes."""
        self.lease = lease
        self.where = where
        # What is learnt of either side's extents, as a copy learns its source's; None where the side has no bytes.
        self.maps = [_map(lease, where, size, alignment, hole_min) for size in sizes]
        self.alignment = alignment
        self.position = where.start  # everything before it was begun
        self.outstanding = 0  # pieces under way
        self.compared = self.skipped = 0
        self.differences = Differences()
        self.abandoned = False
        self.error: ErrorReport | None = None
        self.reported = Counters()

    @property
    def counters(self) -> Counters:
        return Counters(skipped=self.skipped, compared=self.compared)

    @property
    def exhausted(self) -> bool:
        """Nothing is left to begin."""
        return self.position == self.where.end

    def next_piece(self, unit: int, may_read: Callable[[], bool]) -> Piece | None:
        """Take the next stretch: what is zero on both sides whole, other up to the next multiple of `unit` bytes.

        None while a side's block status is still to come, when nothing is left, and when a side would have to be read
        and `may_read` says no.
        """
        if self.exhausted:
            return None
        stretches = [self._stretch(each) for each in self.maps]
        if None in stretches:
            return None
        first, second = (each for each in stretches if each is not None)
        end, zero = min(first[0], second[0]), (first[1], second[1])
        if not all(zero):
            if not may_read():
                return None
            end = min(end, (self.position // unit + 1) * unit)
        piece = Piece(Range(self.position, end), zero)
        self.position = end
        for each in self.maps:
            if each is not None:
                _take(each, end)
        return piece

    def _stretch(self, side: LeaseWork | None) -> tuple[int, bool] | None:
        """Where the stretch of one kind ends that begins at `position`, and whether it is zeroes."""
        if side is None or self.position >= side.where.end:
            return self.where.end, True
        if not side.segments:
            return None
        segment = side.segments[0]
        end = segment.where.end
        if end == side.where.end:
            # The last block of a side that ends inside it, with the zeroes behind: cut there, the other would be read
            # off its alignment.
            end = min(end + -end % self.alignment, self.where.end)
        return end, segment.zero


def _map(lease: int, where: Range, size: int, alignment: int, hole_min: int) -> LeaseWork | None:
    if size <= where.start:
        return None
    inside = Range(where.start, min(where.end, size))
    return LeaseWork(lease, inside, expires=inf, alignment=alignment, hole_min=hole_min)


def _take(side: LeaseWork, end: int) -> None:
    """Drop what is known of the bytes before `end`: they were begun."""
    while side.segments and side.segments[0].where.start < end:
        segment = side.segments.popleft()
        if end < segment.where.end:
            side.segments.appendleft(Segment(Range(end, segment.where.end), segment.zero))
