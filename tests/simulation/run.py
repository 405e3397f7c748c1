"""`python -m simulation.run --seeds 10000 [--first N] [--jobs N]`, or `--seed N --verbose` to see one run by events."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from simulation.simulation import simulate

SEEDS_PER_TASK = 50


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of one seed: its `end` in words, or why it `failed`."""

    seed: int
    end: str
    failed: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every seed passed; a failing one is told with the command that replays it."""
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--first", type=int, default=1, help="the first of them (1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many (10)")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--verbose", action="store_true", help="with --seed: print every event")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _show(options.seed, verbose=options.verbose)
    seeds = range(options.first, options.first + options.seeds)
    if options.jobs <= 1:
        return _tell(map(_run, seeds), options.failures)
    with multiprocessing.Pool(options.jobs) as pool:
        return _tell(pool.imap(_run, seeds, SEEDS_PER_TASK), options.failures)


def replay(seed: int) -> str:
    """The command that shows one seed's run."""
    return f"PYTHONPATH=tests .venv/bin/python -m simulation.run --seed {seed} --verbose"


def _run(seed: int) -> Ended:
    try:
        report = simulate(seed)
    except Exception as error:
        return Ended(seed, "", f"{type(error).__name__}: {error}")
    return Ended(seed, f"{report.scenario.trouble.name} {report.outcome.verdict.name}")


def _tell(results: Iterable[Ended], failures_max: int) -> int:
    started = time.monotonic()
    ends: Counter[str] = Counter()
    failures = 0
    for result in results:
        if not result.failed:
            ends[result.end] += 1
            continue
        failures += 1
        print(f"seed {result.seed} failed: {result.failed}\n  replay: {replay(result.seed)}", flush=True)
        if failures >= failures_max:
            break
    for end, number in sorted(ends.items()):
        print(f"{number:7} {end}")
    print(f"{sum(ends.values())} passed, {failures} failed, {time.monotonic() - started:.1f} s")
    return 1 if failures else 0


def _show(seed: int, *, verbose: bool) -> int:
    try:
        print(simulate(seed, print if verbose else None))
    except Exception:
        traceback.print_exc()
        print(f"seed {seed} failed; replay: {replay(seed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
