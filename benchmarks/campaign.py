"""A whole run: every part that is wanted, one after the other, within the time there is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import control_plane, machine
from benchmarks.budget import Budget
from benchmarks.checkpoints import measure_checkpoints
from benchmarks.commands import EXECUTABLE, TOOLS
from benchmarks.ends import SHARED_MEMORY, scratch_folder
from benchmarks.measure import CommandFailed, output
from benchmarks.results import IDENTICAL, CheckpointCost, LeaseRate, Point, Results, Row, SchedulerCost, ServedWork
from benchmarks.row_run import RowRun
from benchmarks.rows import (
    CHECKPOINT_ROUNDS,
    CHECKPOINTED_BYTES,
    LEASE_WORKERS,
    LEASES,
    PARTS,
    QUICK_DIVISOR,
    ROWS,
    SCALED_BYTES,
    SCALING_ROUNDS,
    SCALING_ROUNDS_QUICK,
    SCHEDULER_RANGES,
    SCHEDULER_WORKERS,
    SERVED_BYTES,
    TRANSPORTS,
)
from benchmarks.rows import Row as Task
from benchmarks.scaling import BY_WORKERS, Choice, by_request_size, measure_choices
from benchmarks.serving import measure_serving
from nbdshard.common.units import format_bytes

TASKS: Final = {task.name: task for task in ROWS}
NAMES: Final = (*TASKS, *PARTS)
# A command that fails, a server that does not start, a disk that is full: told on the page, and the run goes on.
FAILURES: Final = (CommandFailed, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted. `size_max`: no copy is longer than that (for tests of the benchmarks themselves)."""

    names: Sequence[str] = NAMES
    quick: bool = False
    rounds: int = 5
    seconds: float = 885.0
    size_max: int | None = None

    def limited(self, size: int) -> int:
        """`size`, or as much of it as is wanted."""
        return size if self.size_max is None else min(size, self.size_max)


@dataclass(slots=True)
class Campaign:
    """One run. `say` is told, in a line each, what was done."""

    plan: Plan
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    scaling: list[Point] = field(default_factory=list)
    requests: list[Point] = field(default_factory=list)
    checkpoints: list[CheckpointCost] = field(default_factory=list)
    serving: list[ServedWork] = field(default_factory=list)
    leases: list[LeaseRate] = field(default_factory=list)
    scheduler: list[SchedulerCost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Results:
        """Everything that is wanted, in the order of the table. To be called once."""
        start = time.monotonic()
        described = machine.describe()
        stolen, ticks = machine.stolen_and_all()
        self._parts(start)
        stolen_after, ticks_after = machine.stolen_and_all()
        self._tell_of_missing_rounds()
        return Results(
            machine=described,
            quick=self.plan.quick,
            rounds=self.plan.rounds,
            seconds=time.monotonic() - start,
            steal=(stolen_after - stolen) / max(ticks_after - ticks, 1),
            rows=self.rows,
            scaling=self.scaling,
            requests=self.requests,
            checkpoints=self.checkpoints,
            serving=self.serving,
            leases=self.leases,
            scheduler=self.scheduler,
            notes=self.notes,
        )

    def _parts(self, start: float) -> None:
        weights = {name: TASKS[name].weight if name in TASKS else PARTS[name] for name in self.plan.names}
        budget = Budget(self.plan.seconds, weights, start)
        left_out = []
        with scratch_folder() as folder:
            for name in (name for name in NAMES if name in weights):
                began = time.monotonic()
                if budget.is_spent(began):
                    left_out.append(name)
                    continue
                try:
                    told = self._part(name, folder, budget.begin(name, began))
                except FAILURES as error:
                    told = f"failed: {error}"
                    self.notes.append(f"{name} failed: {error}")
                self.say(f"{name}: {told} ({time.monotonic() - began:.0f} s)")
        if left_out:
            self.notes.append(f"There was no time left for: {', '.join(left_out)}.")
            self.say(self.notes[-1])

    def _part(self, name: str, folder: Path, deadline: float) -> str:
        """Measure one part; what came of it in a line."""
        match name:
            case "scaling":
                self.scaling = self._points(BY_WORKERS, folder, deadline)
                return f"{len(self.scaling)} points"
            case "requests":
                self.requests = self._points(by_request_size(), folder, deadline)
                return f"{len(self.requests)} points"
            case "checkpoints":
                self.checkpoints = [self._checkpoints(deadline)]
                share = self.checkpoints[0].share
                return "failed" if share is None else f"{share:+.1%} of the time"
            case "serving":
                self.serving = self._serving(folder, deadline)
                ratios = [work.speed(each.name) for work in self.serving for each in work.series[1:]]
                return ", ".join("failed" if ratio is None else f"{ratio:.2f}" for ratio in ratios) + " x nbdkit"
            case "leases":
                self.leases = self._leases()
                return f"{min(rate.per_second for rate in self.leases):,.0f} leases/s or more"
            case "scheduler":
                self.scheduler = self._scheduler(deadline)
                return ", ".join(f"{cost.microseconds:.1f} us" for cost in self.scheduler) + " an event"
            case _:
                self.rows.append(self._row(TASKS[name], folder, deadline))
                return _told(self.rows[-1])

    def _row(self, task: Task, folder: Path, deadline: float) -> Row:
        size = self.plan.limited(task.size_of(quick=self.plan.quick))
        needed = task.memory_bytes(size)
        there = min(machine.memory_available(), shutil.disk_usage(SHARED_MEMORY).free)
        if needed > there:
            why = f"it needs {format_bytes(needed)} of memory, {format_bytes(there)} are free"
            return Row(task.name, size, skipped=why)
        try:
            return RowRun(task, size, folder, known_variants(task)).run(self.plan.rounds, deadline)
        except FAILURES as error:
            return Row(task.name, size, skipped=f"its ends could not be made: {error}")

    def _points(self, choices: Sequence[Choice], folder: Path, deadline: float) -> list[Point]:
        rounds = min(SCALING_ROUNDS_QUICK if self.plan.quick else SCALING_ROUNDS, self.plan.rounds)
        size = self.plan.limited(SCALED_BYTES // QUICK_DIVISOR if self.plan.quick else SCALED_BYTES)
        return measure_choices(choices, size, folder, rounds, deadline)

    def _checkpoints(self, deadline: float) -> CheckpointCost:
        size = CHECKPOINTED_BYTES // QUICK_DIVISOR if self.plan.quick else CHECKPOINTED_BYTES
        return measure_checkpoints(self.plan.limited(size), min(self.plan.rounds, CHECKPOINT_ROUNDS), deadline)

    def _serving(self, folder: Path, deadline: float) -> list[ServedWork]:
        size = self.plan.limited(SERVED_BYTES // QUICK_DIVISOR if self.plan.quick else SERVED_BYTES)
        return measure_serving(size, self.plan.rounds, folder, deadline)

    def _leases(self) -> list[LeaseRate]:
        count = LEASES // QUICK_DIVISOR if self.plan.quick else LEASES
        return [
            control_plane.measure_leases(transport, workers, count)
            for transport in TRANSPORTS
            for workers in LEASE_WORKERS
        ]

    def _scheduler(self, deadline: float) -> list[SchedulerCost]:
        """Ever more ranges; not those for which there is no time, going by the job before."""
        costs: list[SchedulerCost] = []
        seconds_per_range = 0.0
        for ranges in SCHEDULER_RANGES[:-1] if self.plan.quick else SCHEDULER_RANGES:
            began = time.monotonic()
            if began + ranges * seconds_per_range > deadline:
                break
            costs.append(control_plane.measure_scheduler(SCHEDULER_WORKERS, ranges))
            seconds_per_range = (time.monotonic() - began) / ranges
        return costs

    def _tell_of_missing_rounds(self) -> None:
        found = []
        for row in self.rows:
            wanted = self.plan.rounds * TASKS[row.name].rounds_factor
            made = max((len(series.samples) for series in row.series if not series.failed), default=wanted)
            if made < wanted:
                found.append(f"{row.name} ({made} of {wanted})")
        if found:
            self.notes.append(f"There was not time for every round in: {', '.join(found)}.")


def known_variants(task: Task) -> list[tuple[str, ...]]:
    """Those variants of `task` whose options nbdshard has."""
    help_text = output([EXECUTABLE, "copy", "--help"])
    return [variant for variant in task.variants if variant[0].partition("=")[0] in help_text]


def _told(row: Row) -> str:
    """A row in a line."""
    if row.skipped:
        return f"not run: {row.skipped}"
    medians = [f"{tool} {found.wall:.2f} s" for tool in TOOLS if (found := row.of(tool)) is not None]
    bad = [proof for proof in row.proofs.values() if proof != IDENTICAL]
    return ", ".join([*(medians or ["every command failed"]), *bad, *row.notes])
