"""The copier's half of its lanes: which connections are lent, what they are fed, and what comes back. Pure.

A pair is a source and a destination connection with a lane of their own. It is lent when both are idle and there is
enough data to copy, and comes back when there is none left, when the copier needs it, or when something other than
success was met. Then what is unanswered becomes operations like any others: from that moment it is as if the copier had
asked for it itself. So retries, errors, zeroes, expiry and the end of a connection are one piece of code for both.

Where there are two pairs or more, the last one is never lent: block status, zeroes and retries go there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from errno import ECANCELED
from itertools import islice
from typing import Protocol

from nbdshard.common.bucket import Bucket
from nbdshard.common.errors import BugError, RequestError
from nbdshard.common.limits import (
    LANE_BYTES_MIN,
    LANE_FEED_BYTES,
    LANE_FEED_MAX,
    LANE_REQUESTS_MIN,
    LANE_STRETCH_BYTES,
    LANE_STRIKES_MAX,
    RATE_STRETCH_SECONDS,
)
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork, Segment
from nbdshard.worker.lending import LanePort, Lendable
from nbdshard.worker.operation import Gone, Operation, Part
from nbdshard.worker.payloads import Payloads
from nbdshard.worker.shape import CopyShape
from nbdshard.worker.sides import Source, Target
from nbdshard.worker.states import OperationEvent
from nbdshard.worker.stretch import Outcome, Stretch, Unanswered

_SEGMENTS_LOOKED_AT = 32  # to see whether there is enough data for a lane

MakeLane = Callable[[CopyShape], LanePort]


class Owner(Protocol):
    """What the lanes need of the copier."""

    now: float
    draining: bool
    leases: dict[int, LeaseWork]
    sources: list[Source]
    payloads: Payloads
    bucket: Bucket

    @property
    def targets(self) -> list[Target]: ...
    def begin(self, lease: LeaseWork, where: Range) -> Operation: ...
    def note_zeroes(self, lease: LeaseWork, where: Range) -> None: ...
    def stretch_over(self, lease: LeaseWork) -> None: ...
    def part_done(self, target: Target, part: Part, error: RequestError | None) -> None: ...
    def flush_done(self, target: Target, error: RequestError | None) -> None: ...


class Pair:
    """A source and a destination connection, and their lane."""

    def __init__(self, lane: LanePort, source: Source, target: Target, ends: tuple[Lendable, Lendable]) -> None:
        self.lane = lane
        self.source = source
        self.target = target
        self.ends = ends
        self.stretches: dict[Stretch, None] = {}  # with the lane, in the order they were given
        self.strikes = 0
        self.is_stopping = False
        self.is_fit = True  # else it is not lent any more

    @property
    def may_be_lent(self) -> bool:
        """Whether nothing is under way on either connection; of one that is shared, no read."""
        if not self.is_fit or self.lane.is_out:
            return False
        is_reading = self.source.active or (not self.ends[0].is_shared and self.source.vector.used)
        is_writing = not self.ends[1].is_shared and (self.target.vector.used or self.target.waiting)
        return not is_reading and not is_writing

    def stop(self) -> None:
        if self.lane.is_out and not self.is_stopping:
            self.is_stopping = True
            self.lane.stop()


class Lanes:
    """All lanes of one copier. `make` makes one; None where there are to be none."""

    def __init__(self, shape: CopyShape, make: MakeLane | None, owner: Owner) -> None:
        self._shape = shape
        self._owner = owner
        self._pairs: list[Pair] = []
        self._is_allowed = make is not None and shape.splice and shape.requests >= LANE_REQUESTS_MIN
        self._make = make
        # A multiple of every request size, so that no stretch ends inside a request.
        self._stretch_bytes = max(LANE_STRETCH_BYTES, shape.request_size)
        self.remarks: list[str] = []  # for the log

    def join(self) -> None:
        """A connection has come up: there may be one pair more."""
        if not self._is_allowed or self._make is None:
            return
        pairs = min(len(self._owner.sources), len(self._owner.targets))
        while self._is_allowed and len(self._pairs) < max(min(pairs, 1), pairs - 1):
            source, target = self._owner.sources[len(self._pairs)], self._owner.targets[len(self._pairs)]
            one, other = source.connection, target.connection
            if not isinstance(one, Lendable) or not isinstance(other, Lendable):
                self._is_allowed = False
                return
            lane = self._make(self._shape)
            if why := lane.prepare():
                self._is_allowed = False
                self.remarks.append(f"{why}: payload is copied without lanes")
                lane.close()
                return
            target.is_laned = True
            self._pairs.append(Pair(lane, source, target, (one, other)))

    def close(self) -> None:
        """No connection is open any more, so no lane is out."""
        for pair in self._pairs:
            pair.lane.close()
        self._pairs.clear()

    @property
    def idle(self) -> bool:
        """Every connection is with the copier."""
        return not any(pair.lane.is_out for pair in self._pairs)

    def serves(self, lease: LeaseWork) -> bool:
        """Whether what `lease` has next is left to the lanes."""
        if lease.abandoned or not lease.has_data or not any(pair.is_fit for pair in self._pairs):
            return False
        where = lease.segments[0].where
        if self._end_of_stretch(where) <= where.start:
            return False
        if any(pair.lane.is_out and not pair.is_stopping for pair in self._pairs):
            return True
        first = islice(lease.segments, _SEGMENTS_LOOKED_AT)
        return sum(segment.where.length for segment in first if not segment.zero) >= LANE_BYTES_MIN

    def is_writing(self, leases: Collection[LeaseWork]) -> bool:
        """Whether a lane has sent a WRITE of theirs, or begun to, that is not answered."""
        return any(
            stretch.lease in leases
            for pair in self._pairs
            if pair.lane.is_out
            for stretch in pair.lane.stretches_written()
        )

    def stop(self, lease: LeaseWork | None = None) -> None:
        """Have the connections back soon: of the lanes that work on `lease`, or all."""
        for pair in self._pairs:
            if lease is None or any(stretch.lease is lease for stretch in pair.stretches):
                pair.stop()

    def flush(self, target: Target) -> bool:
        """Have the lane that `target` is lent to flush it; False where the copier has to."""
        for pair in self._pairs:
            if pair.target is target and target.is_lent:
                pair.ends[1].lane_flushes()
                target.flushing = pair.lane.wants_flush = True
                return True
        return False

    # -- giving --------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Lend what can be lent, and feed what is out; nothing, while there are reads to be cut."""
        is_salvaging = any(lease.suspects for lease in self._owner.leases.values())
        for pair in self._pairs:
            if pair.lane.is_out:
                if is_salvaging or (pair.target.waiting and not pair.ends[1].is_shared):
                    pair.stop()  # no other connection can take those
                elif not pair.is_stopping:
                    self._feed(pair)
            elif (
                not is_salvaging
                and pair.may_be_lent
                and any(self.serves(lease) for lease in self._owner.leases.values())
                and self._owner.bucket.admits(self._stretch_unit, self._owner.now)
            ):
                self._lend(pair)

    def _lend(self, pair: Pair) -> None:
        lane, (source, target) = pair.lane, pair.ends
        reads = source.lend_source(lane, self._shape.request_size)
        if reads is None:
            return
        writes = target.lend_target(lane)
        if writes is None:
            source.take_back(b"", None)
            return
        pair.is_stopping = False
        pair.source.is_lent = not source.is_shared
        pair.target.is_lent = not target.is_shared
        self._feed(pair)
        lane.begin(reads, writes)

    def _feed(self, pair: Pair) -> None:
        feed = pair.lane.feed
        room = LANE_FEED_BYTES - sum(stretch.end - stretch.start for stretch in list(feed))
        while room > 0 and len(feed) < LANE_FEED_MAX and (stretch := self._next_stretch()):
            room -= stretch.end - stretch.start
            pair.ends[0].lane_reads(Range(stretch.start, stretch.end))
            pair.stretches[stretch] = None
            feed.append(stretch)
        pair.lane.feed_low = len(feed) // 2

    def _next_stretch(self) -> Stretch | None:
        """Take data off the front of a lease; zeroes met on the way are noted."""
        for lease in list(self._owner.leases.values()):
            while lease.segments and not lease.abandoned:
                segment = lease.segments[0]
                if segment.zero:
                    lease.segments.popleft()
                    self._owner.note_zeroes(lease, segment.where)
                    continue
                where = segment.where
                end = self._end_of_stretch(where)
                if end <= where.start:
                    break  # the copier's own: it is to be merged
                bucket, length = self._owner.bucket, end - where.start
                if not bucket.admits(length, self._owner.now):
                    return None
                bucket.take(length)
                lease.segments.popleft()
                if end < where.end:
                    lease.segments.appendleft(Segment(Range(end, where.end), zero=False))
                lease.outstanding += 1
                lease.reads += 1
                stretch = Stretch(lease, Range(where.start, end))
                stretch.is_charged = bucket.rate is not None
                return stretch
        return None

    @property
    def _stretch_unit(self) -> int:
        """Bytes of the longest stretch: a multiple of the request size, and no more than the bucket holds."""
        rate, request = self._owner.bucket.rate, self._shape.request_size
        if rate is None:
            return self._stretch_bytes
        smooth = int(rate * RATE_STRETCH_SECONDS)
        return min(self._stretch_bytes, max(request, smooth - smooth % request))

    def _end_of_stretch(self, where: Range) -> int:
        """Where the next stretch of `where` ends: where a request does, and not inside a block of the destination."""
        unit = self._stretch_unit
        end = min(where.end, (where.start // unit + 1) * unit)
        if end % self._shape.merge_unit:
            end -= end % self._shape.request_size
        return end

    # -- taking back ---------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Take what the lanes have done so far, and the connections of those that are over."""
        for pair in self._pairs:
            lane = pair.lane
            if not lane.is_out:
                continue
            lane.look()
            outcome = lane.take_outcome()
            while lane.finished:
                self._finished(pair, lane.finished.popleft())
            for stretch in pair.stretches:
                _credit(stretch)
            while lane.remarks:
                self.remarks.append(f"{pair.ends[0].description.peer}: {lane.remarks.popleft()}")
            if lane.flushed:
                lane.flushed = False
                pair.ends[1].lane_flushed()
                pair.target.flush_over()
                self._owner.flush_done(pair.target, None)
            if outcome is not None:
                self._take_back(pair, outcome)

    def _finished(self, pair: Pair, stretch: Stretch) -> None:
        lease = stretch.lease
        del pair.stretches[stretch]
        _credit(stretch)
        for end in pair.ends:
            end.lane_moved(Range(stretch.start, stretch.end))
        for zeroes in stretch.zeroes:
            if not lease.abandoned:
                self._owner.note_zeroes(lease, Range(*zeroes))
        lease.reads -= 1
        lease.outstanding -= 1
        self._owner.stretch_over(lease)

    def _take_back(self, pair: Pair, outcome: Outcome) -> None:
        """The loan is over. What is unanswered becomes operations, what was not begun goes back to its lease."""
        if outcome.bug is not None:
            raise BugError(f"a lane failed: {outcome.bug!r}") from outcome.bug
        lane, (source, target) = pair.lane, pair.ends
        pair.source.is_lent = pair.target.is_lent = False
        self._judge(pair, outcome)
        # Rows are taken by their cookies first, then any that are free.
        for each in outcome.reads:
            self._adopt_read(pair, each)
        for each in outcome.writes:
            self._adopt_write(pair, each, outcome)
        for stretch, where in reversed(outcome.unwritten):
            _give_back(stretch, where)
        for stretch in sorted(lane.feed, key=lambda each: -each.start):
            if stretch.is_charged:
                self._owner.bucket.give_back(stretch.end - stretch.at)
            _give_back(stretch, Range(stretch.at, stretch.end))
        lane.feed.clear()
        for stretch in list(pair.stretches):
            if stretch.left:
                raise BugError(f"{stretch}: {stretch.left} bytes are nowhere")
            self._finished(pair, stretch)
        if outcome.is_flushing and not target.is_shared:
            pair.target.adopt_flush(target, lane.flush_cookie)
        if lane.wants_flush:
            lane.wants_flush = False
            pair.target.flush_again()
        source.take_back(outcome.source_bytes, outcome.error if outcome.lost == "source" else None)
        if target.is_shared:
            target.take_back(b"", None)
        elif outcome.is_late:
            target.take_back(b"", 0, "a lease ended in the middle of a write")
        else:
            target.take_back(outcome.target_bytes, outcome.error if outcome.lost == "destination" else None)

    def _judge(self, pair: Pair, outcome: Outcome) -> None:
        """A pair that always meets something odd soon is not lent any more."""
        is_odd = outcome.source_bytes or outcome.target_bytes or outcome.lost
        if not is_odd or pair.lane.copied >= LANE_BYTES_MIN:
            pair.strikes = 0
            return
        pair.strikes += 1
        if pair.strikes >= LANE_STRIKES_MAX:
            pair.is_fit = False
            self.remarks.append(f"{pair.source.connection.description.peer}: replies are seldom plain: no more lanes")

    def _adopt_read(self, pair: Pair, each: Unanswered) -> None:
        stretch, where = each.stretch, each.where
        stretch.left -= where.length
        operation = self._owner.begin(stretch.lease, where)
        stretch.lease.reads += 1
        self._owner.payloads.hold(operation, splice=self._shape.may_splice(where))
        if pair.ends[0].is_shared:  # nobody has asked it, and the row may be in use
            pair.source.begin(operation)
            operation.advance(OperationEvent.BEGIN_READ)
        else:
            pair.source.adopt(operation, each.cookie)
            operation.advance(OperationEvent.BEGIN_READ)
            operation.advance(OperationEvent.REQUEST_SENT)
        into = operation.piped or memoryview(operation.buffer or b"")[: where.length]
        pair.ends[0].adopt_read(operation.handle, where, into)

    def _adopt_write(self, pair: Pair, each: Unanswered, outcome: Outcome) -> None:
        stretch, where = each.stretch, each.where
        stretch.left -= where.length
        operation = self._owner.begin(stretch.lease, where)
        if each.is_zero:
            operation.advance(OperationEvent.BEGIN_ZERO)
        else:
            stretch.lease.reads += 1
            pair.source.begin(operation)
            for event in (OperationEvent.BEGIN_READ, OperationEvent.REQUEST_SENT, OperationEvent.READ_DONE):
                operation.advance(event)
        operation.parts_left = 1
        operation.advance(OperationEvent.WRITES_SENT)
        part = Part(operation, where, None if each.is_zero else Gone(each.spliced), is_zero=each.is_zero)
        if pair.ends[1].is_shared:  # a file has answered when it is over: well, but for one that failed or was not done
            is_whole = each.cookie != outcome.failed_write
            error = None if is_whole else pair.ends[1].refusal(outcome.error or ECANCELED)
            self._owner.part_done(pair.target, part, error)
        else:
            pair.target.adopt(part, each.cookie)
            pair.ends[1].adopt_write(each.cookie, where, is_zero=each.is_zero)


def _credit(stretch: Stretch) -> None:
    """Count what was acknowledged since the last time."""
    copied, spliced, zeroed = stretch.copied, stretch.spliced, stretch.zeroed
    copied_before, spliced_before, zeroed_before = stretch.credited
    stretch.credited = (copied, spliced, zeroed)
    stretch.lease.copied += copied - copied_before
    stretch.lease.spliced += spliced - spliced_before
    stretch.lease.zeroed += zeroed - zeroed_before


def _give_back(stretch: Stretch, where: Range) -> None:
    """`where` was not copied: it is the lease's again."""
    stretch.left -= where.length
    if not stretch.lease.abandoned:
        stretch.lease.segments.appendleft(Segment(where, zero=False))
