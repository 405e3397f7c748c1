"""Coordinators that crash and resume from their journal, over servers that lose what was not flushed.

After each run every unit is on the disk, and at each moment everything that the journal has. The mutants below are
coordinators with one wrong order each: the same world finds every one of them out.
"""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from nbdshard.common.limits import MIB
from nbdshard.common.messages import ErrorReport, Flushed, Written
from nbdshard.coordinator import scheduler
from nbdshard.coordinator.copying import Copying, Trouble
from nbdshard.coordinator.crew import Crew, Outbox
from nbdshard.coordinator.instructions import Journal
from nbdshard.coordinator.job import Job, Verdict
from nbdshard.coordinator.leases import Granted
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.workers import Worker
from support.schedule_world import UNIT, BrokenPromise, Faults, World, small_disk, small_job

SEEDS = range(60)
SECONDS_MAX = 4000.0  # simulated
RUNS_MAX = 60
EVERYTHING = Faults(
    until=40.0,
    crash=0.02,
    freeze=0.02,
    drop_connection=0.05,
    restart_server=0.05,
    loses_message=0.1,
    repeats_message=0.1,
    flush_fails=0.1,
    coordinator_crash=0.01,
)


LIVES = dataclasses.replace(EVERYTHING, tells_lives=True, restart_server=0.2, drop_connection=0.1)


def resumed_until_complete(seed: int, faults: Faults, request_size: int = MIB, **changes: object) -> World:
    """The world in which a job was resumed after each crash and failure until it was complete."""
    changes = {"range_size": 4 * UNIT, "checkpoint_seconds": 1.0, **changes}
    job = small_job(**changes)
    job = replace(job, options=replace(job.options, request_size=request_size))
    world = World(seed, job, small_disk(), small_disk(), faults, remote_workers=0 if job.local_workers else 4)
    for _ in range(RUNS_MAX):
        outcome = world.run(SECONDS_MAX)
        if outcome.verdict is Verdict.COMPLETE:
            assert outcome.done == outcome.size
            assert world.lost_units() == []
            assert len(world.journaled) == world.source.size // UNIT  # type: ignore[operator]
            return world
        world.restart_coordinator()
    raise AssertionError(f"not complete after {RUNS_MAX} runs")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_is_complete_in_the_end_and_nothing_in_the_journal_was_ever_lost(seed: int) -> None:
    resumed_until_complete(seed, EVERYTHING)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_holds_for_workers_elsewhere_that_wait_for_a_lost_server(seed: int) -> None:
    resumed_until_complete(seed, EVERYTHING, local_workers=False, loss_seconds=30.0 * (seed % 3), range_size=2 * UNIT)


@pytest.mark.parametrize("seed", SEEDS)
def test_flushes_that_fail_and_flushes_that_are_lost_cost_no_byte(seed: int) -> None:
    faults = Faults(until=60.0, flush_fails=0.3, drop_connection=0.1, crash=0.05, freeze=0.02)
    resumed_until_complete(seed, faults)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_coordinator_that_crashes_again_and_again_comes_forward(seed: int) -> None:
    world = resumed_until_complete(seed, Faults(until=1000.0, coordinator_crash=0.02))
    assert world.coordinator_crashes <= 200


@pytest.mark.parametrize("seed", SEEDS)
def test_a_server_that_names_its_lives_is_believed_as_far_as_that_proves_something(seed: int) -> None:
    resumed_until_complete(seed, LIVES, loss_seconds=30.0, local_workers=seed % 2 == 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_ranges_that_come_back_and_are_leased_in_parts_cost_no_byte(seed: int) -> None:
    """They are several requests long."""
    faults = EVERYTHING if seed % 2 else LIVES
    resumed_until_complete(seed, faults, UNIT, range_size=8 * UNIT, local_workers=seed % 4 < 2, loss_seconds=30.0)


# -- mutants -----------------------------------------------------------------------------------------------------------


class JournalsWhatIsWritten(Copying):
    """Before any flush."""

    def _written(self, worker: Worker, granted: Granted, message: Written, now: float) -> Trouble | None:
        self._outbox.add(Journal(durable=(granted.range,)))
        return super()._written(worker, granted, message, now)


class CreditsTheFlushOfAnotherWorker(Copying):
    """One flush covers everything that anybody wrote."""

    def flushed(self, worker: Worker, message: Flushed, now: float) -> Trouble | None:
        if worker.flush is not None and message.error is None:
            for other in self._crew.workers.values():
                if other is not worker and other.holding is not None:
                    for granted in list(other.holding.written.values()):
                        self.ledger.cover(granted, self.flushes.number)
                    self.flushes.forget(other)
        return super().flushed(worker, message, now)


class CreditsWhatTheFlushDidNotCover(Copying):
    """What it was asked for, whichever connections answered."""

    def flushed(self, worker: Worker, message: Flushed, now: float) -> Trouble | None:
        if worker.flush is not None and message.error is None:
            message = Flushed(message.job, message.epoch, message.flush, sorted(worker.flush.leases), durable=True)
        return super().flushed(worker, message, now)


class RepeatsAFlushThatFailed(Copying):
    """And believes the second answer."""

    def _flush_failed(self, worker: Worker, error: ErrorReport) -> Trouble | None:
        self._answered(worker)
        if worker.holding is not None and worker.holding.written:
            self.flushes.wait(worker, 0.0)
        return None


class JournalsBeforeOlderFlushesAreAnswered(Copying):
    """One of them may have been told of what was lost."""

    def _answered(self, worker: Worker) -> None:
        del self.flushes.unanswered[worker.identity]
        settled = self.ledger.confirm(float("inf"))
        if settled:
            self._outbox.add(Journal(durable=tuple(where for granted in settled for where in granted.written)))


class ForgetsAFlushThatWasLost(Copying):
    """Its worker is gone, and so is what the kernel told it."""

    def _flush_lost(self, worker: Worker, why: str) -> Trouble | None:
        self._answered(worker)
        if worker.holding is not None and worker.holding.written:
            self.flushes.wait(worker, 0.0)
        return None


class TrustsLeasesUnderWayWhenAFlushWasLost(Copying):
    """Their first part was written before."""

    def _flush_lost(self, worker: Worker, why: str) -> Trouble | None:
        trouble = super()._flush_lost(worker, why)
        self._suspect_before = 0
        return trouble


class ForgetsWhatTheJournalHas(Copying):
    """All is copied again."""

    def __init__(self, job: Job, plan: Plan, crew: Crew, outbox: Outbox) -> None:
        super().__init__(replace(job, durable=()), plan, crew, outbox)


class TakesAnyLifeForTheSame(Copying):
    """A server that was started again has lost what it had not flushed."""

    def connected(self, worker: Worker, instance: str, now: float) -> Trouble | None:
        return super().connected(worker, instance[8:], now)


class TakesSilenceForProof(Copying):
    """Who comes back is taken to have found what it left."""

    def connected(self, worker: Worker, instance: str, now: float) -> Trouble | None:
        return super().connected(worker, "the same", now)


MUTANTS = [
    JournalsWhatIsWritten,
    CreditsTheFlushOfAnotherWorker,
    CreditsWhatTheFlushDidNotCover,
    RepeatsAFlushThatFailed,
    JournalsBeforeOlderFlushesAreAnswered,
    ForgetsAFlushThatWasLost,
    TrustsLeasesUnderWayWhenAFlushWasLost,
    ForgetsWhatTheJournalHas,
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_coordinator_with_a_wrong_order_is_found_out(mutant: type[Copying], monkeypatch: pytest.MonkeyPatch) -> None:
    found_out(mutant, EVERYTHING, monkeypatch)


@pytest.mark.parametrize("mutant", [CreditsTheFlushOfAnotherWorker, JournalsWhatIsWritten, TakesAnyLifeForTheSame])
def test_so_is_one_with_a_server_that_names_its_lives(mutant: type[Copying], monkeypatch: pytest.MonkeyPatch) -> None:
    found_out(mutant, LIVES, monkeypatch, loss_seconds=30.0)


def test_without_lives_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    found_out(TakesSilenceForProof, dataclasses.replace(LIVES, tells_lives=False), monkeypatch, loss_seconds=30.0)


def found_out(mutant: type[Copying], faults: Faults, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setattr(scheduler, "Copying", mutant)
    for seed in range(400):
        try:
            resumed_until_complete(seed, faults, **changes)
        except BrokenPromise:
            return
    pytest.fail(f"{mutant.__name__} passed for a coordinator that keeps its promises")
