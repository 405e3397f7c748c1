"""The ledger against a list with one entry for each unit of the export."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdshard.common.limits import ATTEMPTS_PER_RANGE, KIB, RETURNS_PER_RANGE
from nbdshard.common.messages import Counters
from nbdshard.common.ranges import Range
from nbdshard.coordinator.leases import Granted, Ledger
from nbdshard.coordinator.planner import check_job
from nbdshard.coordinator.states import RangeState
from support.schedules import job, server

UNIT = 64 * KIB
UNITS = 12
WORKERS = ("a", "b", "c")


class LedgerMachine(RuleBasedStateMachine):
    """The model: for each unit its state, and who holds it under which number."""

    @initialize(resumed=st.sets(st.integers(0, UNITS - 1)))
    def begin(self, resumed: set[int]) -> None:
        end = server(UNITS * UNIT)
        durable = tuple(Range.of(unit * UNIT, UNIT) for unit in resumed)
        what = job(range_size=UNIT, durable=durable)
        self.ledger = Ledger(check_job(what, end, end), durable)
        self.resumed = resumed
        self.states = [RangeState.DURABLE if unit in resumed else RangeState.PENDING for unit in range(UNITS)]
        self.flushes = 0
        self.covered: dict[int, int] = {}  # unit -> flushes that had been sent
        self.granted: dict[int, Granted] = {}
        self.numbers_seen: set[int] = set()
        self.attempts = [0] * UNITS
        self.returns = [0] * UNITS

    def held(self, state: RangeState) -> list[int]:
        return [unit for unit in range(UNITS) if self.states[unit] is state]

    def settle_model(self, unit: int, *, attempt: bool) -> None:
        tries, most = (self.attempts, ATTEMPTS_PER_RANGE) if attempt else (self.returns, RETURNS_PER_RANGE)
        tries[unit] += 1
        self.states[unit] = RangeState.FAILED if tries[unit] == most else RangeState.PENDING

    @precondition(lambda self: self.held(RangeState.PENDING))
    @rule(worker=st.sampled_from(WORKERS))
    def grant(self, worker: str) -> None:
        granted = self.ledger.grant(worker)
        unit = granted.range.start // UNIT
        assert granted.number not in self.numbers_seen
        assert unit == min(self.held(RangeState.PENDING)), "the lowest pending range comes first"
        self.numbers_seen.add(granted.number)
        self.states[unit] = RangeState.LEASED
        self.granted[unit] = granted

    @precondition(lambda self: self.held(RangeState.LEASED))
    @rule(data=st.data(), done=st.integers(0, UNIT))
    def progress(self, data: st.DataObject, done: int) -> None:
        granted = self.granted[data.draw(st.sampled_from(self.held(RangeState.LEASED)))]
        is_news = granted.done.total != done
        assert self.ledger.progress(granted, Counters(copied=done)) is is_news

    @precondition(lambda self: self.held(RangeState.LEASED))
    @rule(data=st.data(), zeroed=st.integers(0, UNIT))
    def wrote(self, data: st.DataObject, zeroed: int) -> None:
        unit = data.draw(st.sampled_from(self.held(RangeState.LEASED)))
        self.ledger.wrote(self.granted[unit], Counters(copied=UNIT - zeroed, zeroed=zeroed), None)
        self.states[unit] = RangeState.WRITTEN

    @precondition(lambda self: self.held(RangeState.WRITTEN))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(self.held(RangeState.WRITTEN)))
        self.ledger.settle(self.granted.pop(unit))
        self.states[unit] = RangeState.DURABLE

    @precondition(lambda self: self.held(RangeState.WRITTEN))
    @rule(data=st.data(), flushes=st.integers(1, 3))
    def cover(self, data: st.DataObject, flushes: int) -> None:
        """As many flushes were sent, and one of those sent until now is answered."""
        unit = data.draw(st.sampled_from(self.held(RangeState.WRITTEN)))
        self.flushes += flushes
        self.ledger.cover(self.granted.pop(unit), self.flushes)
        self.states[unit] = RangeState.DURABLE
        self.covered[unit] = self.flushes

    @precondition(lambda self: self.covered)
    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        oldest = data.draw(st.integers(min(self.covered.values()), self.flushes + 1))
        settled = {unit for unit, after in self.covered.items() if after < oldest}
        assert {granted.range.start // UNIT for granted in self.ledger.confirm(oldest)} == settled
        self.covered = {unit: after for unit, after in self.covered.items() if unit not in settled}

    @precondition(lambda self: self.flushes)
    @rule(data=st.data())
    def demote(self, data: st.DataObject) -> None:
        flush = data.draw(st.integers(1, self.flushes))
        since = {unit for unit, after in self.covered.items() if after >= flush}
        assert {piece.start // UNIT for piece in self.ledger.covered_since(flush)} == since
        back = since | set(self.held(RangeState.WRITTEN))
        assert {granted.range.start // UNIT for granted in self.ledger.demote(flush)} == back
        for unit in back:
            self.settle_model(unit, attempt=False)
            self.granted.pop(unit, None)
            self.covered.pop(unit, None)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), attempt=st.booleans())
    def give_back(self, data: st.DataObject, attempt: bool) -> None:
        unit = data.draw(st.sampled_from(sorted(self.granted)))
        self.settle_model(unit, attempt=attempt)
        may_try_again = self.ledger.give_back(self.granted.pop(unit), attempt=attempt)
        assert may_try_again is (self.states[unit] is RangeState.PENDING)

    @rule(worker=st.sampled_from(WORKERS))
    def page(self, worker: str) -> None:
        """Possible at any time, also when all is over."""
        holding = self.ledger.holding(worker)
        mine = {granted.number for granted in self.granted.values() if granted.worker == worker}
        assert holding.leased.keys() | holding.written.keys() == mine

    @invariant()
    def the_ranges_are_where_the_model_has_them(self) -> None:
        self.ledger.validate()
        assert self.ledger.pending is bool(self.held(RangeState.PENDING))
        assert self.ledger.leased_count == len(self.held(RangeState.LEASED))
        assert self.ledger.written_count == len(self.held(RangeState.WRITTEN))
        assert self.ledger.unsettled_bytes == len(self.held(RangeState.WRITTEN)) * UNIT
        done = {RangeState.WRITTEN, RangeState.DURABLE}
        assert self.ledger.unwritten is any(state not in done for state in self.states)
        for unit, granted in self.granted.items():
            assert granted.state is self.states[unit]

    @invariant()
    def counters_are_what_is_written_and_under_way(self) -> None:
        whole = len(self.held(RangeState.WRITTEN)) + len(self.held(RangeState.DURABLE)) - len(self.resumed)
        partly = sum(self.granted[unit].done.total for unit in self.held(RangeState.LEASED))
        assert self.ledger.counters.total == whole * UNIT + partly
        assert self.ledger.resumed_bytes == len(self.resumed) * UNIT
        assert self.ledger.covered_count == len(self.covered)


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestLedger = LedgerMachine.TestCase
