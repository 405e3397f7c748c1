"""Whole jobs under a simulated ring, network and clock: whatever goes wrong, COMPLETE means that the copy is identical.

`make simulate SEEDS=N` runs more seeds than `make test` does; a failure names the command that replays it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.run import replay
from simulation.simulation import simulate

SEEDS = int(os.environ.get("NBDSHARD_SIMULATE_SEEDS", "500"))
FIRST = int(os.environ.get("NBDSHARD_SIMULATE_FIRST", "1"))
SEEDS_PER_TEST = 25
TESTS = Path(__file__).parents[1]

CHUNKS = [
    range(start, min(start + SEEDS_PER_TEST, FIRST + SEEDS)) for start in range(FIRST, FIRST + SEEDS, SEEDS_PER_TEST)
]


@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_a_job_ends_once_in_time_and_complete_means_identical(seeds: range) -> None:
    for seed in seeds:
        print(f"seed {seed}, replay: {replay(seed)}")
        simulate(seed)


def test_a_seed_replays_event_by_event() -> None:
    first, second = simulate(7), simulate(7)
    assert (first.trace, first.events, first.seconds) == (second.trace, second.events, second.seconds)


def test_a_seed_replays_in_another_process() -> None:
    script = "from simulation.simulation import simulate; print(simulate(11).trace)"
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": "12345"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert int(ended.stdout) == simulate(11).trace
