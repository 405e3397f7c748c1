"""One leased range as the copier works on it: what is known of its extents, what is left to do, what is done. Pure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from nbdshard.common.limits import SEGMENTS_LOW, SEGMENTS_MAX
from nbdshard.common.messages import Counters, ErrorReport
from nbdshard.common.nbd.constants import STATE_ZERO
from nbdshard.common.ranges import Range, RangeSet

if TYPE_CHECKING:
    from nbdshard.worker.leaves import LeafDigests


class Segment(msgspec.Struct, frozen=True):
    """A stretch of one kind: `zero` reads as zeroes for certain, everything else is data."""

    where: Range
    zero: bool


class LeaseWork:
    """The work of one lease.

    Between `start` and `known_until` the kinds are known; segments not yet begun wait in `segments`. A lease is over
    when `exhausted` and nothing is `outstanding`.
    """

    __slots__ = (
        "lease",
        "where",
        "until_end",
        "expires",
        "alignment",
        "hole_min",
        "is_dense",
        "segments",
        "suspects",
        "known_until",
        "asking",
        "outstanding",
        "reads",
        "zeroes",
        "digests",
        "copied",
        "zeroed",
        "skipped",
        "spliced",
        "unreadable",
        "error",
        "abandoned",
        "end",
        "reported",
    )

    def __init__(
        self,
        lease: int,
        where: Range,
        *,
        expires: float,
        alignment: int,
        until_end: bool = False,
        hole_min: int = 1,
    ) -> None:
        self.lease = lease
        self.where = where
        self.until_end = until_end
        self.expires = expires  # monotonic seconds; nothing is written for this lease from then on
        self.alignment = alignment
        self.hole_min = hole_min  # shorter zeroes than this, in bytes, are read as if they were data
        self.is_dense = True  # there were no zeroes in the last payload that was searched: none are likely in the next
        self.segments: deque[Segment] = deque()
        self.suspects: list[Range] = []  # of a read that failed, to be read by themselves: the next one is last
        self.known_until = where.start
        self.asking = False  # a block status request is under way
        self.outstanding = 0  # operations under way
        self.reads = 0  # those of them that read
        self.zeroes = RangeSet()  # found, and not yet issued: neighbours may still join
        self.digests: LeafDigests | None = None  # of what is read, if a checksum is wanted
        self.copied = self.zeroed = self.skipped = 0
        self.spliced = 0  # of the copied ones
        self.unreadable = RangeSet()  # zeroes take its place
        self.error: ErrorReport | None = None
        self.abandoned = False
        self.end: int | None = None  # of a stream, once it was met
        self.reported = Counters()

    @property
    def counters(self) -> Counters:
        return Counters(copied=self.copied, zeroed=self.zeroed, skipped=self.skipped, spliced=self.spliced)

    @property
    def unknown(self) -> Range | None:
        """The part whose extents are still to be asked."""
        return Range(self.known_until, self.where.end) if self.known_until < self.where.end else None

    @property
    def wants_extents(self) -> bool:
        """More is to be asked, and few enough of what was learnt is left."""
        return self.known_until < self.where.end and not self.asking and len(self.segments) <= SEGMENTS_LOW

    @property
    def has_data(self) -> bool:
        """The next stretch is to be read."""
        return bool(self.segments) and not self.segments[0].zero

    @property
    def exhausted(self) -> bool:
        """Nothing is left to begin (what is under way may still fail, and come back as its own retry)."""
        known = self.known_until >= self.where.end and not (self.segments or self.suspects or self.asking)
        return known and (self.end is not None or not self.until_end)

    @property
    def wants_probe(self) -> bool:
        """A stream has filled all there is room for: one more byte must be asked for, to see that it ends here."""
        return self.until_end and self.end is None and not self.segments and self.reads == 0

    def learn_data(self) -> None:
        """All that is unknown is to be read: no extents were asked for, or they could not be had."""
        if unknown := self.unknown:
            self._append(unknown, zero=False)

    def learn(self, extents: list[tuple[Range, int]]) -> None:
        """Take over what the source said of the bytes from `known_until` on.

        Zeroes are cut to the alignment from within, what is cut off is data; so are those shorter than `hole_min`. An
        answer that ends off the alignment is believed only up to there, so that the next question starts aligned; one
        too short for that is taken as data.
        No more than SEGMENTS_MAX stretches are kept: what is behind them is asked again when its turn comes.
        """
        limit = min(extents[-1][0].end, self.where.end)
        if limit < self.where.end:
            limit -= limit % self.alignment
            if limit <= self.known_until:
                limit = min(self.where.end, self.known_until + self.alignment)
                self._append(Range(self.known_until, limit), zero=False)
                return
        for extent, flags in extents:
            if extent.start >= limit:
                break
            if flags & STATE_ZERO and (zero := self._aligned(extent, limit)):
                if self.known_until < zero.start:
                    self._append(Range(self.known_until, zero.start), zero=False)
                self._append(zero, zero=True)
                if len(self.segments) >= SEGMENTS_MAX:
                    return
        if self.known_until < limit:
            self._append(Range(self.known_until, limit), zero=False)

    def _aligned(self, extent: Range, limit: int) -> Range | None:
        start = max(extent.start, self.known_until)
        start += -start % self.alignment
        end = min(extent.end, limit)
        end -= end % self.alignment
        return Range(start, end) if start + self.hole_min <= end else None

    def _append(self, where: Range, *, zero: bool) -> None:
        assert where.start == self.known_until
        self.known_until = where.end
        if self.segments and self.segments[-1].zero == zero:
            where = Range(self.segments.pop().where.start, where.end)
        self.segments.append(Segment(where, zero))

    def next_piece(self, unit: int) -> Segment | None:
        """Take the next stretch to work on: zeroes whole, data up to the next multiple of `unit` bytes."""
        if not self.segments:
            return None
        segment = self.segments.popleft()
        if segment.zero:
            return segment
        where = segment.where
        end = min(where.end, (where.start // unit + 1) * unit)
        if end < where.end:
            self.segments.appendleft(Segment(Range(end, where.end), zero=False))
        return Segment(Range(where.start, end), zero=False)
