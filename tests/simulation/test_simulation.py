"""Whole jobs under a simulated ring, network and clock: whatever goes wrong, COMPLETE means that the copy is identical.

`make simulate SEEDS=N` runs more seeds than `make test` does; a failure names the command that replays it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.disk import ZERO, Disk
from simulation.run import replay
from simulation.scenario import Disks, Scenario, Trouble, make_scenario
from simulation.server_rules import Extents
from simulation.simulation import Simulation, simulate

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


class ForgetfulDisk(Disk):
    """Acknowledges flushes and keeps nothing of them."""

    def settle(self, start: int, end: int) -> None:
        pass


def plain_job() -> tuple[Scenario, Disks]:
    """The first scenario in which nothing goes wrong, block status is asked, and a flush is due."""
    for seed in range(1, 1000):
        scenario, disks = make_scenario(seed)
        options, source = scenario.job.options, scenario.source
        is_plain = scenario.trouble is Trouble.NOTHING and scenario.destination.can_flush and options.flush
        asks = options.extents and source.structured and source.extents is Extents.EXACT
        if is_plain and asks and not options.destination_is_zero and any(disks.source.data):
            return scenario, disks
    raise AssertionError("no seed makes a plain job")


def test_a_flush_that_keeps_nothing_is_found_out() -> None:
    scenario, disks = plain_job()
    destination = ForgetfulDisk(disks.destination.data)
    with pytest.raises(AssertionError, match="after a power cut differs from the source"):
        Simulation(scenario, Disks(disks.source, destination)).run()


def test_a_source_that_calls_data_zeroes_is_found_out() -> None:
    scenario, disks = plain_job()
    source = Disk(disks.source.data, [(0, len(disks.source.data), ZERO)])
    with pytest.raises(AssertionError, match="the destination differs from the source"):
        Simulation(scenario, Disks(source, disks.destination)).run()


def test_an_honest_run_of_the_same_job_passes() -> None:
    assert Simulation(*plain_job()).run().outcome.error == ""
