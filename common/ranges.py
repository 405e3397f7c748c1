"""Half-open byte ranges, and ordered sets of them. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import msgspec


class Range(msgspec.Struct, frozen=True, order=True):
    """The bytes from `start` up to but not including `end`; never empty, never negative."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a range: [{self.start}, {self.end})")

    @classmethod
    def of(cls, offset: int, length: int) -> Range:
        """The range in the protocol's terms: `offset` and `length`, both in bytes."""
        return cls(offset, offset + length)

    @property
    def length(self) -> int:
        return self.end - self.start

    def __contains__(self, other: Range) -> bool:
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: Range) -> bool:
        return self.start < other.end and other.start < self.end

    def intersection(self, other: Range) -> Range | None:
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end) if start < end else None

    def split(self, unit: int) -> Iterator[Range]:
        """Pieces in order, cut where an offset is a multiple of `unit`: the first and last may be shorter."""
        start = self.start
        while start < self.end:
            end = min(self.end, (start // unit + 1) * unit)
            yield Range(start, end)
            start = end

    def parts(self, unit: int) -> Iterator[Range]:
        """A part of a unit, whole units in one, a part of a unit: those that there are, in order."""
        start, end = self.start + -self.start % unit, self.end - self.end % unit
        if start > end:
            yield self
            return
        for first, last in ((self.start, start), (start, end), (end, self.end)):
            if first < last:
                yield Range(first, last)

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"


def are_apart(pieces: Iterable[Range], within: Range) -> bool:
    """Whether `pieces` are in order, with a gap between any two, and within `within`."""
    end = within.start - 1
    for piece in pieces:
        if piece.start <= end or piece.end > within.end:
            return False
        end = piece.end
    return True


class RangeSet:
    """A set of bytes kept as sorted, disjoint, non-adjacent ranges.

    `add` merges neighbours; every operation is O(log n) to find its place plus the ranges it touches.
    """

    __slots__ = ("_starts", "_ends", "_total")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._total = 0
        for piece in ranges:
            self.add(piece)

    def __iter__(self) -> Iterator[Range]:
        return map(Range, list(self._starts), list(self._ends))

    def __len__(self) -> int:
        """The number of separate ranges."""
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeSet({', '.join(map(str, self))})"

    @property
    def total(self) -> int:
        """The number of bytes in the set."""
        return self._total

    def add(self, piece: Range) -> int:
        """Add `piece`; return how many of its bytes were not in the set before."""
        first = bisect_left(self._ends, piece.start)
        last = bisect_right(self._starts, piece.end)
        start, end, covered = piece.start, piece.end, 0
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
            covered = sum(self._ends[i] - self._starts[i] for i in range(first, last))
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        new = end - start - covered
        self._total += new
        return new

    def remove(self, piece: Range) -> int:
        """Take `piece` out; return how many of its bytes were in the set."""
        first = bisect_right(self._ends, piece.start)
        last = bisect_left(self._starts, piece.end)
        if first >= last:
            return 0
        starts: list[int] = []
        ends: list[int] = []
        old = sum(self._ends[i] - self._starts[i] for i in range(first, last))
        if self._starts[first] < piece.start:
            starts.append(self._starts[first])
            ends.append(piece.start)
        if self._ends[last - 1] > piece.end:
            starts.append(piece.end)
            ends.append(self._ends[last - 1])
        removed = old - sum(end - start for start, end in zip(starts, ends, strict=True))
        self._starts[first:last] = starts
        self._ends[first:last] = ends
        self._total -= removed
        return removed

    def pop_first(self) -> Range:
        """Take out and return the lowest range. Raises IndexError when the set is empty."""
        piece = Range(self._starts.pop(0), self._ends.pop(0))
        self._total -= piece.length
        return piece

    def __contains__(self, piece: Range) -> bool:
        index = bisect_right(self._starts, piece.start) - 1
        return index >= 0 and piece.end <= self._ends[index]

    def overlaps(self, piece: Range) -> bool:
        index = bisect_right(self._ends, piece.start)
        return index < len(self._starts) and self._starts[index] < piece.end

    def gaps(self, within: Range) -> Iterator[Range]:
        """The parts of `within` that are not in the set, in order."""
        start = within.start
        index = bisect_right(self._ends, within.start)
        while index < len(self._starts) and self._starts[index] < within.end:
            if start < self._starts[index]:
                yield Range(start, self._starts[index])
            start = self._ends[index]
            index += 1
        if start < within.end:
            yield Range(start, within.end)

    def clip(self, within: RangeSet) -> RangeSet:
        """A new set: what is in both."""
        both = RangeSet(self)
        if len(self._starts):
            for gap in within.gaps(Range(self._starts[0], self._ends[-1])):
                both.remove(gap)
        return both

    def coarse(self, most: int) -> tuple[Range, ...]:
        """At most `most` ranges, in order, that hold every byte of the set, and the smallest of its gaps."""
        pieces = list(self)
        if len(pieces) <= most:
            return tuple(pieces)
        gaps = sorted(range(1, len(pieces)), key=lambda index: pieces[index].start - pieces[index - 1].end)
        kept = sorted(gaps[len(pieces) - most :])
        return tuple(
            Range(pieces[first].start, pieces[end - 1].end)
            for first, end in zip([0, *kept], [*kept, len(pieces)], strict=True)
        )
