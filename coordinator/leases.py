"""The ledger: which bytes are pending, leased, written and durable, and under whose lease. Pure.

Pending ranges are no objects: a cursor walks over the export, and ranges that came back wait in a heap, lowest first.
A lease is an object from its grant until it is settled; settled bytes are kept as merged intervals. So millions of
ranges cost what is under way, and every operation costs the same however many there are (the heap's logarithm aside).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from nbdshard.common.errors import BugError
from nbdshard.common.limits import ATTEMPTS_PER_RANGE, RETURNS_PER_RANGE
from nbdshard.common.messages import Counters
from nbdshard.common.ranges import Range
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.states import RANGES, RangeEvent, RangeState

NOTHING = Counters()


@dataclass(slots=True, eq=False)
class Granted:
    """One lease. `end` is where the bytes end that are written under it: a stream's end, else the range's."""

    number: int
    range: Range
    worker: str
    until_end: bool = False
    state: RangeState = RangeState.PENDING
    done: Counters = NOTHING
    end: int = 0

    def step(self, event: RangeEvent) -> None:
        self.state = RANGES.step(self.state, event, self)

    def __str__(self) -> str:
        return f"lease {self.number} of {self.range} held by {self.worker}"


@dataclass(slots=True, eq=False)
class Holding:
    """What one worker holds: its valid leases, and what it wrote and no flush covers. By lease number."""

    leased: dict[int, Granted] = field(default_factory=dict)
    written: dict[int, Granted] = field(default_factory=dict)


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

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._cursor = 0
        self._bound = plan.bound
        self._returned: list[tuple[int, int]] = []
        self._attempts: dict[int, int] = {}  # by the start of a range that came back
        self._returns: dict[int, int] = {}
        self._holdings: dict[str, Holding] = {}
        self._failed: list[Granted] = []
        self._settled = Intervals()
        self._done = [0, 0, 0, 0]  # copied, zeroed, skipped, spliced
        self.next_number = 1
        self.leased_count = 0
        self.written_count = 0
        self.unsettled_bytes = 0  # written, and not yet covered by a flush
        self.size = plan.size

    # -- questions -----------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether a range can be granted."""
        return bool(self._returned) or self._cursor < self._bound

    @property
    def unwritten(self) -> bool:
        """Whether any range is still to be written."""
        return self.pending or self.leased_count > 0 or bool(self._failed)

    @property
    def counters(self) -> Counters:
        """Completed bytes: settled, written, and of leases under way."""
        return Counters(*self._done)

    def holding(self, worker: str) -> Holding:
        """The page of `worker`, which stays the same object; not to be changed by the caller."""
        return self._holdings.setdefault(worker, Holding())

    @property
    def holders(self) -> set[str]:
        """The workers that have a page."""
        return set(self._holdings)

    # -- the way of a range --------------------------------------------------------------------------------------------

    def grant(self, worker: str) -> Granted:
        """Lease the next pending range to `worker`. There must be one."""
        if self._returned:
            where = Range(*heappop(self._returned))
        elif self._cursor < self._bound:
            where = Range.of(self._cursor, self._plan.next_length(self._bound - self._cursor))
            self._cursor = where.end
        else:
            raise BugError("a lease was asked of a ledger without pending ranges")
        granted = Granted(self.next_number, where, worker, until_end=self._plan.size is None)
        granted.step(RangeEvent.GRANT)
        self.next_number += 1
        self.leased_count += 1
        self.holding(worker).leased[granted.number] = granted
        return granted

    def progress(self, granted: Granted, done: Counters) -> bool:
        """Take over how far a lease is; True when that is news."""
        old = granted.done
        self._count(old, -1)
        self._count(done, 1)
        granted.done = done
        return done != old

    def wrote(self, granted: Granted, done: Counters, end: int | None) -> None:
        """The destination acknowledged the whole lease. `end`: where the stream ended, else None."""
        granted.step(RangeEvent.WRITTEN)
        self.progress(granted, done)
        granted.end = granted.range.end if end is None else end
        if granted.until_end:
            self.size = granted.end
        holding = self._holdings[granted.worker]
        holding.written[granted.number] = holding.leased.pop(granted.number)
        self.leased_count -= 1
        self.written_count += 1
        self.unsettled_bytes += granted.end - granted.range.start

    def settle(self, granted: Granted) -> None:
        """A flush covered a written lease, or there is no better end for it. It is forgotten as an object."""
        granted.step(RangeEvent.SETTLED)
        self._leave_written(granted)
        self._attempts.pop(granted.range.start, None)
        self._returns.pop(granted.range.start, None)
        if granted.end > granted.range.start:
            self._settled.add(granted.range.start, granted.end)

    def give_back(self, granted: Granted, *, attempt: bool) -> bool:
        """What was done under a leased or written range does not count any more.

        `attempt`: it used up one of the range's attempts; otherwise it came back with a lost connection. False when
        that was once too often: the range has failed, for good.
        """
        start = granted.range.start
        tries, most = (self._attempts, ATTEMPTS_PER_RANGE) if attempt else (self._returns, RETURNS_PER_RANGE)
        tries[start] = tries.get(start, 0) + 1
        if tries[start] >= most:
            self.fail(granted)
            return False
        self._take_back(granted, RangeEvent.GIVEN_BACK)
        heappush(self._returned, (start, granted.range.end))
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
        was_written = granted.state is RangeState.WRITTEN
        granted.step(event)
        self._count(granted.done, -1)
        if was_written:
            self._leave_written(granted)
        else:
            del self._holdings[granted.worker].leased[granted.number]
            self.leased_count -= 1
        if granted.until_end:
            self.size = None

    def _leave_written(self, granted: Granted) -> None:
        del self._holdings[granted.worker].written[granted.number]
        self.written_count -= 1
        self.unsettled_bytes -= granted.end - granted.range.start

    def _count(self, done: Counters, sign: int) -> None:
        self._done[0] += sign * done.copied
        self._done[1] += sign * done.zeroed
        self._done[2] += sign * done.skipped
        self._done[3] += sign * done.spliced

    # -- the invariants ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise BugError unless the ranges partition the export and the sums are right. Costs a look at everything."""
        pieces = list(self._settled) + list(self._returned)
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
        self._check_partition(pieces)

    def _check_partition(self, pieces: list[tuple[int, int]]) -> None:
        end_of_all = self._bound
        if self._plan.size is None and self.size is not None:
            end_of_all = self.size
        if self._cursor < end_of_all:
            pieces.append((self._cursor, end_of_all))
        expected = 0
        for start, end in sorted(pieces):
            if start != expected:
                kind = "overlap" if start < expected else "leave a gap"
                raise BugError(f"the ranges {kind} at offset {min(start, expected)}")
            expected = end
        if expected != end_of_all:
            raise BugError(f"the ranges end at {expected}, the export at {end_of_all}")
