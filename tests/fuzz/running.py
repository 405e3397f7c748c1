"""Running a fuzzer for as long as asked, one seed after the other, and telling how the runs ended."""

from __future__ import annotations

import argparse
import faulthandler
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

MEMORY_BYTES_MAX = 1 << 30  # of address space for the whole process
CASE_SECONDS_MAX = 60.0  # one run takes milliseconds; then the stack is dumped


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended."""

    case: str
    error: str  # name of its class, or ""


class Unspoilt(Random):
    """Chooses no mutations, and the largest pieces."""

    def choice(self, options: tuple[int, ...]) -> int:  # type: ignore[override]
        return options[0] if options[0] == 0 else options[-1]


def a_piece(random: Random) -> int:
    """How many bytes come at once."""
    return random.choice((1, 2, 7, 30, 500, 100_000))


def outcomes_of(run_seed: Callable[[int], Outcome], seeds: range, program: str) -> set[Outcome]:
    """How the runs of `seeds` ended. What comes out of one comes through, and `program` with its seed is printed."""
    found: set[Outcome] = set()
    for seed in seeds:
        try:
            found.add(run_seed(seed))
        except BaseException:
            print(f"python tests/fuzz/{program} --runs 1 --seed {seed}")
            raise
    return found


def peak_bytes_of(run_seed: Callable[[int], Outcome], seeds: range) -> int:
    """The most memory that Python had for the runs of `seeds`."""
    tracemalloc.start()
    try:
        for seed in seeds:
            run_seed(seed)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main(description: str, run_seed: Callable[[int], Outcome]) -> int:
    """Run seeds until the time that the command line says is over. The seed of a run that fails is printed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, help="of the first run; each next is +1")
    parser.add_argument("--runs", type=int, default=10**12, help="stop after so many")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    print(f"seed {arguments.seed}, {arguments.seconds:g} s", flush=True)
    outcomes: Counter[Outcome] = Counter()
    seed, end = arguments.seed, time.monotonic() + arguments.seconds
    while time.monotonic() < end and seed < arguments.seed + arguments.runs:
        faulthandler.dump_traceback_later(CASE_SECONDS_MAX, exit=True)
        try:
            outcomes[run_seed(seed)] += 1
        except BaseException:
            print(f"FAILED with --seed {seed} --runs 1", flush=True)
            raise
        seed += 1
    faulthandler.cancel_dump_traceback_later()
    for outcome, count in sorted(outcomes.items(), key=lambda item: (item[0].case, item[0].error)):
        print(f"{count:9}  {outcome.case}: {outcome.error or 'no error'}")
    print(f"{seed - arguments.seed} runs, nothing found")
    return 0
