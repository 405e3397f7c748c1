"""A job that is resumed until it is complete: coordinators crash, and servers whose cache loses what no flush covered.

The journal is the real one, in a file. A coordinator that crashes leaves its files as they are at that moment; the
next one opens what is left. At each change of the journal, and after each crash of the destination, all that it has is
on the disk.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ranges import Range
from nbdshard.coordinator import instructions
from nbdshard.coordinator.job import Job, Outcome, Verdict
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JobFacts, JournaledEnd, ResultOptions
from nbdshard.coordinator.keeping import Keeper
from simulation.coordinator import SimCoordinator
from simulation.scenario import Disks, Scenario
from simulation.simulation import EVENTS_MAX, Report, Simulation

LIVES_MAX: Final = 40  # of coordinators in one run
CRASHES_MAX: Final = 8  # of coordinators
HARD_LIVES: Final = 12  # after which servers and workers live on
LIFE_SECONDS_MAX: Final = 700.0  # virtual
MEMORY: Final = Path("/dev/shm")
LOG_SUFFIX: Final = "-wal"


class BrokenPromise(AssertionError):
    """The journal and the disk do not agree."""


class SimJournal:
    """The journal of a job through the lives of its coordinators."""

    def __init__(self, folder: Path, job: Job, chance: random.Random) -> None:
        self._folder = folder
        self._chance = chance
        self._job = job
        self._lives = 0
        self._keeper = self._new_keeper()
        self.durable: list[Range] = []  # what it has

    def note(
        self, change: instructions.Journal, ends: tuple[EndpointDescription, EndpointDescription], size: int, last: bool
    ) -> None:
        self._keeper.note(change, ends, size, is_last=last)
        journal = self._keeper._journal
        self.durable = journal.durable if journal is not None else []

    def next_job(self, outcome: Outcome | None) -> Job:
        """The job as the next coordinator begins it. `outcome`: None where the last one crashed."""
        journal = self._keeper._journal
        self._lives += 1
        if outcome is not None:
            self._keeper.end(outcome)
        elif journal is not None:
            self._leave_as_it_is(journal)
        if journal is None:
            self._keeper = self._new_keeper()
            return replace(self._job, uuid=f"{self._job.uuid}, life {self._lives}")
        opened = Journal.open(str(self._path), clock=lambda: self._chance.randrange(1 << 62))  # of the wall: it jumps
        assert opened.durable == self.durable, f"{opened.durable} is left of {self.durable}"
        facts = opened.facts
        leaves = facts.options.checksum
        self._keeper = Keeper(lambda: str(self._path), lambda *_: facts, journal=opened, keeps=True, has_leaves=leaves)
        self._keeper.resume()
        expected = (facts.source.description, facts.destinations[0].description)
        durable = tuple(opened.durable)
        again = replace(self._job, is_resumed=True, durable=durable, earlier=opened, expected=expected)
        return replace(again, uuid=facts.uuid, epoch=opened.epoch)

    def close(self) -> None:
        if self._keeper._journal is not None:
            self._keeper._journal.close()

    @property
    def _path(self) -> Path:
        return self._folder / "journal"

    def _leave_as_it_is(self, journal: Journal) -> None:
        """What a killed process leaves: SQLite tidies up nothing."""
        kept = [(name, self._folder / f"{name}.kept") for name in (str(self._path), f"{self._path}{LOG_SUFFIX}")]
        for name, copy in kept:
            if Path(name).exists():
                shutil.copy(name, copy)
        journal.close()
        for name, copy in kept:
            Path(name).unlink(missing_ok=True)
            if copy.exists():
                copy.rename(name)

    def _new_keeper(self) -> Keeper:
        leaves = self._job.options.checksum
        return Keeper(lambda: str(self._path), self._describe, keeps=True, is_wanted=True, has_leaves=leaves)

    def _describe(self, source: EndpointDescription, destination: EndpointDescription, size: int) -> JobFacts:
        job = self._job
        ends = [
            JournaledEnd(address.address, address, description)
            for address, description in zip((job.source, *job.destinations), (source, destination), strict=True)
        ]
        return JobFacts(job.uuid, size, ends[0], ends[1:], ResultOptions.of(job.options))


class ResumedSimulation(Simulation):
    """One world, and as many coordinators as it takes."""

    after_seconds_max = 200.0  # workers elsewhere wait a minute for a coordinator that has crashed

    def __init__(self, scenario: Scenario, disks: Disks, log: Callable[[str], None] | None = None) -> None:
        super().__init__(scenario, disks, log)
        self._crash_share = self.chance.choice((0.0, 0.002, 0.01, 0.03))
        self._crashes_left = CRASHES_MAX
        self._was_journaled = False  # just now
        self.lives = 1

    def run(self) -> Report:
        """Until the job is complete. Raises AssertionError when something is wrong."""
        self.log(str(self.scenario))
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            self._journal = SimJournal(Path(folder), self.scenario.job, self.chance)
            try:
                return self._run()
            finally:
                self._journal.close()

    def _run(self) -> Report:
        job = self.scenario.job
        while True:
            outcome = self._live(self.coordinator)
            if outcome is not None and outcome.verdict is Verdict.COMPLETE:
                break
            assert self.lives < LIVES_MAX, f"not complete after {self.lives} lives: {outcome}"
            self._recover()
            job = self._journal.next_job(outcome)
            self.lives += 1
            self.log(f"life {self.lives}: {job.durable}")
            before, self.coordinator = self.coordinator, self._coordinate(job)
            self.coordinator.inherit(before)
        seconds = self.clock.now
        self._let_everybody_leave()
        self._check(outcome, seconds)
        return Report(self.scenario, outcome, seconds, self.clock.events, self.trace)

    def _live(self, coordinator: SimCoordinator) -> Outcome | None:
        """One coordinator from its start to its end; None if it crashed."""
        coordinator.note = self._note
        coordinator.dies_before = self._dies_before
        self._plan_crashes()
        self._start(coordinator)
        deadline = self.clock.now + LIFE_SECONDS_MAX
        over = self.clock.run_until(self._is_over, deadline, self.clock.events + EVENTS_MAX)
        assert over, f"life {self.lives} hangs: {self.clock.now:.1f} s, {coordinator.scheduler.status()}"
        return coordinator.outcome

    def _recover(self) -> None:
        """Local workers have ended with their coordinator, the servers are there again."""

        def is_recovered() -> bool:
            gone = all(process.ended for process in self.coordinator.processes.values())
            up = not self.source.is_down and not self.destination.is_down
            return up and (gone or not self.scenario.job.local_workers)

        deadline = self.clock.now + LIFE_SECONDS_MAX
        over = self.clock.run_until(is_recovered, deadline, self.clock.events + EVENTS_MAX)
        assert over, "workers outlive their coordinator"

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _plan_crashes(self) -> None:
        chance, clock = self.chance, self.clock
        if self.lives > HARD_LIVES:
            return  # it must come to its end some time
        for _ in range(chance.choice((0, 1, 1, 2))):
            clock.after(self._moment(), self._crash_server)
        if chance.random() < 0.3:
            clock.after(self._moment(), lambda: self._to_somebody("dies", lambda it: it.kill("was killed")))
        if chance.random() < 0.2:
            stall = self.scenario.job.lease_seconds * chance.uniform(0.5, 3)
            clock.after(self._moment(), lambda: self._to_somebody("stalls", lambda it: it.stall(stall)))
        if chance.random() < 0.2:
            jump = self.scenario.job.lease_seconds * chance.choice((0.5, 2.0, 1000.0))
            clock.after(self._moment(), lambda: self._to_somebody("sees its clock jump", lambda it: it.jump(jump)))
        if self.scenario.destination.names_lives:
            for _ in range(chance.choice((1, 3, 6))):
                clock.after(self._moment(), self._cut)
        if self.scenario.job.local_workers and chance.random() < 0.2:  # elsewhere, clocks are to go at the same rate
            coordinator, leap = self.coordinator, self.scenario.job.lease_seconds * chance.choice((0.5, 2.0, 100.0))
            clock.after(self._moment(), lambda: coordinator.jump(leap))

    def _crash_server(self) -> None:
        server = self.chance.choice((self.source, self.destination, self.destination))
        if not server.is_down:
            self.log(f"the {server.rules.name} crashes")
            server.crash(self.chance.uniform(0.0, 0.5))
            self._check_journal()

    def _dies_before(self, instruction: instructions.Instruction) -> bool:
        """Most often about when something becomes durable."""
        is_journaling, self._was_journaled = self._was_journaled, isinstance(instruction, instructions.Journal)
        share = 0.15 if is_journaling or self._was_journaled else self._crash_share
        dies = self._crashes_left > 0 and self.chance.random() < share
        self._crashes_left -= dies
        return dies

    # -- what must be true ---------------------------------------------------------------------------------------------

    def _note(
        self, change: instructions.Journal, ends: tuple[EndpointDescription, EndpointDescription], size: int, last: bool
    ) -> None:
        self._journal.note(change, ends, size, last)
        self._check_journal()

    def _check_journal(self) -> None:
        """What the journal has would survive a power cut at this very moment."""
        for piece in self._journal.durable:
            if self.disks.destination.stable[piece.start : piece.end] != self._content[piece.start : piece.end]:
                raise BrokenPromise(f"{piece} is in the journal, and not on the disk")
