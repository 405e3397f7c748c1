"""Servers with a cache that a crash empties, coordinators that crash: what the journal has is never lost.

First the mutants: copiers and coordinators with one wrong belief each about flushes. The same worlds find them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import KIB
from nbdshard.common.messages import Flushed, Written
from nbdshard.coordinator import scheduler
from nbdshard.coordinator.copying import Copying, Trouble
from nbdshard.coordinator.instructions import Journal
from nbdshard.coordinator.leases import Granted
from nbdshard.coordinator.workers import Worker
from nbdshard.worker import copier
from nbdshard.worker.flushes import Flushes
from nbdshard.worker.sides import Target
from simulation import scenario
from simulation.resumed import ResumedSimulation
from simulation.run import replay
from simulation.scenario import make_scenario

SEEDS = range(1, 61)
SEEDS_MAX = 400  # until a mutant must have been found out


def worlds(seeds: range) -> Iterator[ResumedSimulation]:
    return (ResumedSimulation(*make_scenario(seed, scenario.Trouble.CRASHES)) for seed in seeds)


def worlds_of_lives(seeds: range) -> Iterator[ResumedSimulation]:
    """Those whose destination names its lives, with small ranges and hardly a flush: something is to be kept."""
    for seed in seeds:
        found, disks = make_scenario(seed, scenario.Trouble.CRASHES)
        if found.destination.names_lives:
            job = replace(found.job, range_size=64 * KIB, checkpoint_seconds=10.0)
            yield ResumedSimulation(dataclasses.replace(found, job=job), disks)


class JournalsBeforeTheFlush(Flushes):
    """What was acknowledged is on the disk, is it not?"""

    def _begin(self) -> None:
        while self._asked:
            self._current = self._asked.popleft()
            self._covers = sorted(self._written)
            self._answer(durable=True)


class CreditsTheFlushOfAnotherConnection(Flushes):
    """One connection's flush covers what all of them wrote."""

    def done(self, target: Target, error: RequestError | None) -> None:
        first = target is self._copier.targets[0]
        super().done(target, error if first else None)


class FlushesOneConnectionOnly(Flushes):
    """A server that takes several connections has one cache for all of them, or so it is hoped."""

    def _begin(self) -> None:
        if self.busy or not self._asked or len(self._copier.targets) < 2:
            super()._begin()
            return
        self._current = self._asked.popleft()
        self._covers = sorted(self._written)
        self._error = None
        self._pending = 1
        target = self._copier.targets[-1]
        if not self._copier.lanes.flush(target):
            target.flush()


class BelievesAFlushRepeatedAfterAFailure(Flushes):
    """It failed, it is asked again, it succeeds: all is well."""

    def done(self, target: Target, error: RequestError | None) -> None:
        if error is None:
            super().done(target, None)
        elif not self._copier.lanes.flush(target):
            target.flush()


COPIERS = [
    JournalsBeforeTheFlush,
    CreditsTheFlushOfAnotherConnection,
    FlushesOneConnectionOnly,
    BelievesAFlushRepeatedAfterAFailure,
]


def assert_found_out(name: str, worlds: Callable[[range], Iterator[ResumedSimulation]] = worlds) -> None:
    for world in worlds(range(1, SEEDS_MAX + 1)):
        try:
            world.run()
        except AssertionError as error:
            found = str(error)
            break
    else:
        pytest.fail(f"{name} passed for a copy that keeps its promises")
    print(f"{name}: seed {world.scenario.seed}: {found}")
    assert "the disk" in found or "after a power cut" in found


@pytest.mark.parametrize("mutant", COPIERS)
def test_a_copier_that_believes_too_much_of_flushes_is_found_out(
    mutant: type[Flushes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "Flushes", mutant)
    assert_found_out(mutant.__name__)


class JournalsWhatIsWritten(Copying):
    """Before any flush."""

    def _written(self, worker: Worker, granted: Granted, message: Written, now: float) -> Trouble | None:
        self._outbox.add(Journal(durable=(granted.range,)))
        return super()._written(worker, granted, message, now)


def test_a_coordinator_that_journals_what_no_flush_covers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "Copying", JournalsWhatIsWritten)
    assert_found_out("JournalsWhatIsWritten")


class TakesAnyLifeForTheSame(Copying):
    """A server that was started again still has what it acknowledged."""

    def connected(self, worker: Worker, instance: str, now: float) -> Trouble | None:
        return super().connected(worker, instance[8:], now)


def test_a_coordinator_that_takes_any_life_of_a_server_for_the_same_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "Copying", TakesAnyLifeForTheSame)
    assert_found_out("TakesAnyLifeForTheSame", worlds_of_lives)


@pytest.mark.parametrize("first", range(SEEDS.start, SEEDS.stop, 20))
def test_what_the_journal_has_is_on_the_disk_through_every_crash(first: int) -> None:
    for world in worlds(range(first, first + 20)):
        print(f"seed {world.scenario.seed}, as a whole: {replay(world.scenario.seed)}")
        world.run()


def test_what_was_acknowledged_in_the_same_life_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is on the disk, like all the rest, when the journal has it."""
    kept: list[Granted] = []

    class Counting(Copying):
        def flushed(self, worker: Worker, message: Flushed, now: float) -> Trouble | None:
            kept.extend(granted for granted in worker.written if granted.is_kept and message.durable)
            return super().flushed(worker, message, now)

    monkeypatch.setattr(scheduler, "Copying", Counting)
    for world in worlds_of_lives(range(1, 121)):
        print(f"seed {world.scenario.seed}")
        world.run()
    assert len(kept) > 5


def test_crashes_cost_lives_and_resumed_copies_begin_with_what_is_durable() -> None:
    """Or the tests above would show nothing."""
    lives, resumed = 0, 0
    for world in worlds(range(101, 131)):
        report = world.run()
        lives = max(lives, world.lives)
        resumed += report.outcome.resumed > 0
    assert lives > 5
    assert resumed > 5
