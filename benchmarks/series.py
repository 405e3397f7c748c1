"""The timed rounds of several commands in alternation, and the runs beside them that are looked at instead of timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.budget import Rounds, alternating
from benchmarks.measure import CommandFailed, timed
from benchmarks.results import Sample, Series

SLOW_FACTOR: Final = 2.5
SLOW_ROUNDS: Final = 2
VARIANT_ROUNDS: Final = 3  # of a further command line of nbdshard's, which is compared with its own default


@dataclass(slots=True)
class Runner:
    """One command that takes part, in `rounds_max` rounds at most, unless that is 0."""

    name: str
    command: Sequence[str]
    rounds_max: int = 0
    servers: Sequence[int] = ()
    samples: list[Sample] = field(default_factory=list)
    failed: str = ""

    def run(self) -> None:
        """Take one sample. A command that failed is not run again."""
        if self.failed:
            return
        try:
            self.samples.append(timed(self.command, self.servers))
        except CommandFailed as error:
            self.failed = str(error)

    @property
    def series(self) -> Series:
        return Series(self.name, self.samples, self.failed)


def alternate(runners: Sequence[Runner], wanted: int, deadline: float, reset: Callable[[], None]) -> list[Series]:
    """Run all of them, round by round, `wanted` times or as often as there is time until `deadline`, at least once.

    `reset` is called before each run, outside the timing. Who is slower than all others by SLOW_FACTOR takes part in
    SLOW_ROUNDS rounds: more would take the others' time, and say nothing new.
    """
    rounds = Rounds(wanted, deadline)
    while rounds.another(time.monotonic()):
        for runner in alternating(runners, rounds.made - 1):
            if not _is_left_behind(runner, runners) and not _has_enough(runner):
                reset()
                runner.run()
    return [runner.series for runner in runners]


def _has_enough(runner: Runner) -> bool:
    return 0 < runner.rounds_max <= len(runner.samples)


def _is_left_behind(runner: Runner, runners: Sequence[Runner]) -> bool:
    others = [
        min(sample.wall for sample in other.samples) for other in runners if other is not runner and other.samples
    ]
    if len(runner.samples) < SLOW_ROUNDS or not others:
        return False
    return min(sample.wall for sample in runner.samples) > SLOW_FACTOR * max(others)
