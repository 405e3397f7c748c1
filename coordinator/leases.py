"""The ledger: which bytes are pending, leased, written and durable, and under whose lease. Pure.

Pending ranges are no objects: a cursor walks over the export, and ranges that came back wait in a heap, lowest first.
A lease is an object from its grant until it is settled; settled bytes are kept as merged intervals. So millions of
ranges cost what is under way, and every operation costs the same however many there are (the heap's logarithm aside).

What an earlier run made durable is settled from the start, and the cursor walks over the gaps::

    | resumed |  gap  |     resumed     |        gap        |
              ^ cursor

Settling has two steps. A flush that was acknowledged covers a range: it is durable as far as that server's answer goes.
But a flush that was sent earlier and is not answered yet may still fail, and the kernel may have told of a lost
write-back only once, to that one. So a covered range stays an object until every flush sent before is answered; only
then it is settled, and can go to the journal. A flush that fails takes back all that is written or covered since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

import msgspec

from nbdshard.common.errors import BugError
from nbdshard.common.limits import (
    ATTEMPTS_PER_RANGE,
    RANGE_UNITS_MAX,
    RETURNS_BEFORE_FLUSH,
    RETURNS_PER_RANGE,
    UNREADABLE_MAX,
)
from nbdshard.common.messages import Counters, LeafRun
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.states import RANGES, RangeEvent, RangeState

NOTHING = Counters()


class Granted(msgspec.Struct, eq=False):
    """One lease. `end` is where the bytes end that are written under it: a stream's end, else the range's."""

    number: int
    range: Range
    worker: str
    until_end: bool = False
    state: RangeState = RangeState.PENDING
    gains_before: int = 0  # of its worker, when it was granted
    done: Counters = NOTHING
    end: int = 0
    unreadable: tuple[Range, ...] = ()  # zeroes were written there for what the source could not read
    is_kept: bool = False  # its connections are gone, and the server proves that what it acknowledged is still there
    covered_after: int = 0  # the last flush that had been sent when one covered it
    leaves: dict[int, LeafRun] | None = None  # by their start, in a job with a checksum: what has come so far

    @property
    def runs(self) -> list[LeafRun]:
        """The digests of its leaves, in order."""
        return [run for _, run in sorted((self.leaves or {}).items())]

    @property
    def leaf_bytes(self) -> int:
        """Of memory, for the digests of its leaves."""
        return sum(run.memory_bytes for run in (self.leaves or {}).values())

    @property
    def written(self) -> tuple[Range, ...]:
        """The bytes that were written under it, once they are: none, of an empty stream."""
        return (Range(self.range.start, self.end),) if self.end > self.range.start else ()

    def step(self, event: RangeEvent) -> None:
        self.state = RANGES.step(self.state, event, self)

    def __str__(self) -> str:
        return f"lease {self.number} of {self.range} held by {self.worker}"


class Holding(msgspec.Struct, eq=False):
    """What one worker holds: its valid leases, and what it wrote and no flush covers. By lease number."""

    leased: dict[int, Granted] = msgspec.field(default_factory=dict)
    written: dict[int, Granted] = msgspec.field(default_factory=dict)
    gains: int = 0  # reports that told of more
    dataless: int = 0  # leases written in a row without any data


class Intervals:
    """A growing set of disjoint intervals, merged with their neighbours in constant time; not ordered."""

    __slots__ = ("_end_of", "_start_of", "total")

    def __init__(self) -> None:
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self.total = 0

    def add(self, start: int, end: int) -> None:
        """Add [start, end), which must not overlap what is there (`Ledger.validate` would show it)."""
        self.total += end - start
        start = self._start_of.pop(start, start)
        end = self._end_of.pop(end, end)
        self._end_of[start] = end
        self._start_of[end] = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._end_of.items())


class Ledger:
    """Every byte of the export in exactly one place. Lease numbers grow and are never used twice."""

    def __init__(self, plan: Plan, durable: Iterable[Range] = (), unreadable: Iterable[Range] = ()) -> None:
        """`durable`: what an earlier run made durable; as much of it as whole blocks allow is not copied again.

        `unreadable`: where that run wrote zeroes for what it could not read.
        """
        self._plan = plan
        self._bound = plan.bound
        self._taken_over = plan.usable(durable)
        self._cursor = self._gap_end = 0
        gaps = self._taken_over.gaps(Range(0, self._bound)) if self._bound else ()
        self._gaps = [(gap.start, gap.end) for gap in gaps]
        self._gaps.reverse()  # the lowest is last
        self._left = self._bound - self._taken_over.total  # bytes the cursor has still to come to
        self._returned: list[tuple[int, int]] = []
        self._attempts: dict[int, int] = {}  # by the start of a range that came back
        self._returns: dict[int, int] = {}
        self._shrunk: dict[int, int] = {}  # at most so many bytes of a range that came back are leased at once
        self._holdings: dict[str, Holding] = {}
        self._failed: list[Granted] = []
        self._settled = Intervals()
        for piece in self._taken_over:
            self._settled.add(piece.start, piece.end)
        self.unreadable = RangeSet(unreadable).clip(self._taken_over)  # of what is written
        self._covered: deque[Granted] = deque()  # `covered_after` never falls from left to right
        self._done = [0, 0, 0, 0, 0]  # copied, zeroed, skipped, spliced, compared
        self.next_number = 1
        self.leased_count = 0
        self.written_count = 0
        self.unsettled_bytes = 0  # written, and not yet covered by a flush
        self.leaf_bytes = 0  # of memory, for digests of what is not settled
        self.resumed_bytes = self._taken_over.total  # not in `counters`: nobody copied them in this run
        self.size = plan.size

    # -- questions -----------------------------------------------------------------------------------------------------

    @property
    def taken_over(self) -> RangeSet:
        """What an earlier run made durable, and is not copied again. Not to be changed by the caller."""
        return self._taken_over

    @property
    def returned(self) -> bool:
        """Whether a range that came back waits to be granted: it is granted before any new one."""
        return bool(self._returned)

    @property
    def pending(self) -> bool:
        """Whether a range can be granted."""
        return bool(self._returned) or self._left > 0

    @property
    def unwritten(self) -> bool:
        """Whether any range is still to be written."""
        return self.pending or self.leased_count > 0 or bool(self._failed)

    @property
    def counters(self) -> Counters:
        """Bytes completed in this run: settled, covered, written, and of leases under way."""
        return Counters(*self._done)

    @property
    def covered_count(self) -> int:
        """Leases that a flush covered, and that an earlier one without an answer may still take back."""
        return len(self._covered)

    def holding(self, worker: str) -> Holding:
        """The page of `worker`, which stays the same object; not to be changed by the caller."""
        return self._holdings.setdefault(worker, Holding())

    @property
    def holders(self) -> set[str]:
        """The workers that have a page."""
        return set(self._holdings)

    # -- the way of a range --------------------------------------------------------------------------------------------

    def grant(self, worker: str, most: float | None = None) -> Granted:
        """Lease the next pending range to `worker`, or so much of it as it is to have at a time. There must be one.

        `most`: no more bytes than that, if nobody has asked for ranges of a certain size, and as requests allow it.
        """
        if self._returned:
            where = self._again(*heappop(self._returned), most)
        elif self._left:
            if self._cursor == self._gap_end:
                self._cursor, self._gap_end = self._gaps.pop()
            # Where there is no data a range is over at once: most of what it costs is to be leased.
            units = min(RANGE_UNITS_MAX, 1 << self.holding(worker).dataless)
            length = self._plan.next_length(self._left, self._cursor, self._gap_end, units, most)
            where = Range.of(self._cursor, length)
            self._cursor = where.end
            self._left -= length
        else:
            raise BugError("a lease was asked of a ledger without pending ranges")
        granted = Granted(self.next_number, where, worker, until_end=self._plan.size is None)
        granted.step(RangeEvent.GRANT)
        self.next_number += 1
        self.leased_count += 1
        holding = self.holding(worker)
        granted.gains_before = holding.gains
        holding.leased[granted.number] = granted
        return granted

    def _again(self, start: int, end: int, most: float | None) -> Range:
        """The first part of a range that came back; the rest stays with those that did."""
        bounds = (self._shrunk.pop(start, None), most if self._plan.may_grow else None)
        smallest = min((bound for bound in bounds if bound is not None), default=None)
        if smallest is not None and (length := self._plan.again_length(start, end, smallest)) < end - start:
            heappush(self._returned, (start + length, end))
            end = start + length
        return Range(start, end)

    def progress(self, granted: Granted, done: Counters) -> bool:
        """Take over how far a lease is; True when that is news."""
        old = granted.done
        self._count(old, -1)
        self._count(done, 1)
        granted.done = done
        if done != old:
            self._holdings[granted.worker].gains += 1
        return done != old

    def hold(self, granted: Granted, runs: Iterable[LeafRun]) -> None:
        """Keep digests of its leaves. What has come before is left as it is: messages come again."""
        held = granted.leaves = granted.leaves or {}
        for run in runs:
            if run.start not in held:
                held[run.start] = run
                self.leaf_bytes += run.memory_bytes

    def wrote(self, granted: Granted, done: Counters, end: int | None, unreadable: tuple[Range, ...] = ()) -> None:
        """The destination acknowledged the whole lease. `end`: where the stream ended, else None."""
        granted.step(RangeEvent.WRITTEN)
        self.progress(granted, done)
        granted.end = granted.range.end if end is None else end
        if unreadable and len(self.unreadable) >= UNREADABLE_MAX:
            unreadable = RangeSet(unreadable).coarse(1)
        for where in unreadable:
            self.unreadable.add(where)
        granted.unreadable = unreadable
        if granted.until_end:
            self.size = granted.end
        holding = self._holdings[granted.worker]
        holding.written[granted.number] = holding.leased.pop(granted.number)
        holding.dataless = min(holding.dataless + 1, RANGE_UNITS_MAX) if not done.copied + done.compared else 0
        self.leased_count -= 1
        self.written_count += 1
        self.unsettled_bytes += granted.end - granted.range.start

    def settle(self, granted: Granted) -> None:
        """There is no better end for a written lease than that it is written. It is forgotten as an object."""
        granted.step(RangeEvent.SETTLED)
        self._leave_written(granted)
        self._forget(granted)

    def cover(self, granted: Granted, last_flush: int) -> None:
        """A flush on the connections that wrote the lease covered it. `last_flush`: the last one sent until now."""
        granted.step(RangeEvent.SETTLED)
        self._leave_written(granted)
        granted.covered_after = last_flush
        self._covered.append(granted)

    def covered_since(self, flush: int) -> list[Range]:
        """What was covered since `flush` was sent, and waits for its answer."""
        found: list[Range] = []
        for granted in reversed(self._covered):
            if granted.covered_after < flush:
                break
            found += granted.written
        return found

    def confirm(self, oldest_flush: float) -> list[Granted]:
        """Settle what was covered before `oldest_flush`, the oldest without an answer, was sent. Returns that."""
        settled: list[Granted] = []
        while self._covered and self._covered[0].covered_after < oldest_flush:
            granted = self._covered.popleft()
            self._forget(granted)
            settled.append(granted)
        return settled

    def demote(self, flush: int) -> list[Granted]:
        """`flush` failed, or nobody will ever know: take back all that is written, and what was covered since it was
        sent. Those whose returns are spent have FAILED. Looks at every worker: that is no everyday event."""
        demoted: list[Granted] = []
        while self._covered and self._covered[-1].covered_after >= flush:
            demoted.append(self._covered.pop())
        for holding in self._holdings.values():
            demoted += holding.written.values()
        for granted in demoted:
            self.give_back(granted, attempt=False)
        return demoted

    def give_back(self, granted: Granted, *, attempt: bool) -> bool:
        """What was done under a leased or written range, or one that `demote` takes back, does not count any more.

        `attempt`: it used up one of the range's attempts; otherwise it came back with a lost connection. False when
        that was once too often: the range has failed, for good.
        """
        start = granted.range.start
        tries, most = (self._attempts, ATTEMPTS_PER_RANGE) if attempt else (self._returns, RETURNS_PER_RANGE)
        tries[start] = tries.get(start, 0) + 1
        if tries[start] >= most:
            self.fail(granted)
            return False
        if self.often_lost(granted):
            self._shrunk[start] = granted.range.length // 2
        self._come_back(granted)
        return True

    def _come_back(self, granted: Granted) -> None:
        self._take_back(granted, RangeEvent.GIVEN_BACK)
        heappush(self._returned, (granted.range.start, granted.range.end))

    def often_lost(self, granted: Granted) -> bool:
        """Whether a range of a known end came back so often that it is to be tried by halves, and flushed at once."""
        return self._returns.get(granted.range.start, 0) >= RETURNS_BEFORE_FLUSH and not granted.until_end

    def cut_off(self, granted: Granted) -> bool:
        """The connection of a leased range is lost. As `give_back`; but where its worker has got on since it was
        granted, with this range or another, it was too long for a connection that lasts so long: half of it is leased
        next, and that does not count, until it cannot be halved."""
        start, end, half = granted.range.start, granted.range.end, granted.range.length // 2
        has_gained = self._holdings[granted.worker].gains > granted.gains_before
        is_shortest = self._plan.again_length(start, end, half) == end - start  # one request, and an odd end with it
        if not has_gained or is_shortest or granted.until_end:
            return self.give_back(granted, attempt=False)
        self._shrunk[start] = half
        self._come_back(granted)
        return True

    def fail(self, granted: Granted) -> None:
        """A leased or written range has failed for good, and the job with it."""
        self._take_back(granted, RangeEvent.SPENT)
        self._failed.append(granted)

    def close_holding(self, worker: str) -> None:
        """`worker` is gone, and holds nothing any more."""
        holding = self._holdings.get(worker)
        if holding is not None and not holding.leased and not holding.written:
            del self._holdings[worker]

    def _take_back(self, granted: Granted, event: RangeEvent) -> None:
        before = granted.state
        granted.step(event)
        self._count(granted.done, -1)
        for where in granted.unreadable:
            self.unreadable.remove(where)
        if granted.leaves is not None:
            self.leaf_bytes -= granted.leaf_bytes
            granted.leaves = None
        if before is RangeState.WRITTEN:
            self._leave_written(granted)
        elif before is RangeState.LEASED:
            del self._holdings[granted.worker].leased[granted.number]
            self.leased_count -= 1
        if granted.until_end:
            self.size = None

    def _leave_written(self, granted: Granted) -> None:
        del self._holdings[granted.worker].written[granted.number]
        self.written_count -= 1
        self.unsettled_bytes -= granted.end - granted.range.start

    def _forget(self, granted: Granted) -> None:
        self._attempts.pop(granted.range.start, None)
        self._returns.pop(granted.range.start, None)
        for where in granted.written:
            self._settled.add(where.start, where.end)
        if granted.leaves is not None:
            self.leaf_bytes -= granted.leaf_bytes

    def _count(self, done: Counters, sign: int) -> None:
        self._done[0] += sign * done.copied
        self._done[1] += sign * done.zeroed
        self._done[2] += sign * done.skipped
        self._done[3] += sign * done.spliced
        self._done[4] += sign * done.compared

    # -- the invariants ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise BugError unless the ranges partition the export and the sums are right. Costs a look at everything."""
        pieces = list(self._settled) + list(self._returned)
        pieces += [(where.start, where.end) for item in self._covered for where in item.written]
        pieces += [(failed.range.start, failed.range.end) for failed in self._failed]
        written = unsettled = leased = 0
        for worker, holding in self._holdings.items():
            leased += len(holding.leased)
            written += len(holding.written)
            for granted in (*holding.leased.values(), *holding.written.values()):
                if granted.worker != worker:
                    raise BugError(f"lease {granted.number} of {granted.worker} is held by {worker}")
                end = granted.end if granted.state is RangeState.WRITTEN else granted.range.end
                if end > granted.range.start:
                    pieces.append((granted.range.start, end))
            unsettled += sum(item.end - item.range.start for item in holding.written.values())
            if any(item.state is not RangeState.LEASED for item in holding.leased.values()) or any(
                item.state is not RangeState.WRITTEN for item in holding.written.values()
            ):
                raise BugError(f"a lease of {worker} is kept in the wrong place for its state")
        if (leased, written, unsettled) != (self.leased_count, self.written_count, self.unsettled_bytes):
            raise BugError("the ledger's counts do not agree with what is held")
        unsettled_leases = [*self._covered]
        for holding in self._holdings.values():
            unsettled_leases += (*holding.leased.values(), *holding.written.values())
        if self.leaf_bytes != sum(item.leaf_bytes for item in unsettled_leases):
            raise BugError("the ledger's count of digests does not agree with what is held")
        order = [item.covered_after for item in self._covered]
        if order != sorted(order) or any(item.state is not RangeState.DURABLE for item in self._covered):
            raise BugError("the covered leases are not in the order in which flushes covered them")
        settled = RangeSet(Range(start, end) for start, end in self._settled)
        if any(piece not in settled for piece in self._taken_over):
            raise BugError("something that an earlier run made durable is not settled any more")
        self._check_partition(pieces)

    def _check_partition(self, pieces: list[tuple[int, int]]) -> None:
        end_of_all = self._bound
        if self._plan.size is None and self.size is not None:
            end_of_all = self.size
        unseen = list(self._gaps)
        if self._cursor < self._gap_end:
            unseen.append((self._cursor, self._gap_end))
        if sum(end - start for start, end in unseen) != self._left:
            raise BugError(f"{self._left} bytes are left to the cursor, and not those of the gaps {unseen}")
        pieces += unseen
        expected = 0
        for start, end in sorted(pieces):
            if start != expected:
                kind = "overlap" if start < expected else "leave a gap"
                raise BugError(f"the ranges {kind} at offset {min(start, expected)}")
            expected = end
        if expected != end_of_all:
            raise BugError(f"the ranges end at {expected}, the export at {end_of_all}")
