"""Whole jobs under a simulated ring, network and clock: whatever goes wrong, COMPLETE means that the copy is identical.

`make simulate SEEDS=N` runs more seeds than `make test` does; a failure names the command that replays it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nbdshard.common.limits import MIB, SPLICE_BYTES_MIN
from nbdshard.worker.pipes import Pipe
from simulation import run
from simulation.disk import ZERO, Disk
from simulation.plumbing import PipeRules, SimPlumbing
from simulation.run import replay
from simulation.scenario import Disks, Scenario, Trouble, make_scenario
from simulation.server_rules import Extents
from simulation.simulation import Report, Simulation, simulate

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


def test_a_seed_that_fails_is_told_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_at_3(seed: int) -> Report:
        assert seed != 3, "something is wrong"
        return simulate(seed)

    monkeypatch.setattr(run, "simulate", fail_at_3)
    assert run.main(["--seeds", "4"]) == 1
    told = capsys.readouterr().out
    assert "seed 3 failed: AssertionError: something is wrong" in told
    assert f"replay: {replay(3)}\n" in told
    assert "3 passed, 1 failed" in told


class ForgetfulDisk(Disk):
    """Acknowledges flushes and keeps nothing of them."""

    def settle(self, start: int, end: int) -> None:
        pass


def scenarios() -> Iterator[tuple[Scenario, Disks]]:
    return (make_scenario(seed) for seed in range(1, 1000))


def plain_job() -> tuple[Scenario, Disks]:
    """The first scenario in which nothing goes wrong, block status is asked, and a flush is due."""
    for scenario, disks in scenarios():
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


def spliced_job() -> tuple[Scenario, Disks]:
    """The first scenario in which nothing goes wrong, and some megabytes without zeroes may be spliced."""
    for scenario, disks in scenarios():
        is_plain = scenario.trouble is Trouble.NOTHING and scenario.may_splice and not scenario.job.options.synchronous
        is_long = len(disks.source.data) > 2 * MIB and disks.source.data.count(0) < len(disks.source.data) // 100
        if is_plain and is_long and scenario.job.options.request_size >= SPLICE_BYTES_MIN:
            return replace(scenario, pipes=PipeRules()), disks
    raise AssertionError("no seed makes a spliced job")


class Scrambling(SimPlumbing):
    """A bit is another one when it comes out of a pipe."""

    def drain(self, pipe: Pipe, number: int, count: int, *, more: bool) -> int:
        self._mine(pipe).content[0] ^= 1
        return super().drain(pipe, number, count, more=more)


class Hoarding(SimPlumbing):
    """Closes no pipe."""

    def close_pipe(self, pipe: Pipe) -> None:
        pass


class Curt(SimPlumbing):
    """Takes less than there is, and lets nobody know."""

    def receive(self, number: int, buffers: Sequence[memoryview]) -> int:
        first = buffers[0][:16]
        return super().receive(number, [first])


@pytest.mark.parametrize(
    ("double", "words"),
    [
        (Scrambling, "brings something else than the source has"),
        (Hoarding, "has left pipes .* open"),
        (Curt, "timed out"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pipes_that_break_a_promise_are_found_out(double: type[SimPlumbing], words: str) -> None:
    simulation = Simulation(*spliced_job())
    chance = simulation.chance
    simulation.make_plumbing = lambda system, ring: double(system, ring, chance, PipeRules())
    with pytest.raises(AssertionError, match=words):
        simulation.run()


def test_an_honest_run_of_the_spliced_job_splices_much_of_it() -> None:
    counters = Simulation(*spliced_job()).run().outcome.counters
    assert counters.spliced > counters.copied / 4


def test_an_honest_run_of_the_same_job_passes() -> None:
    assert Simulation(*plain_job()).run().outcome.error == ""
