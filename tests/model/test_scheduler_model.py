"""The scheduler against a simulated world: whatever happens, it ends, once, and what it calls durable is."""

from __future__ import annotations

import pytest

from nbdshard.coordinator.job import Outcome, Verdict
from support.schedule_world import Faults, World, small_disk, small_job

SEEDS = range(40)
SECONDS_MAX = 3000.0  # simulated; the longest wait is that for a first worker


def check(world: World, outcome: Outcome) -> None:
    """What holds at the end of every job."""
    print(outcome)
    assert "\n" not in outcome.error
    assert "no byte was completed" not in outcome.error, "that is a net below all other time-outs"
    if outcome.verdict is Verdict.COMPLETE:
        assert outcome.error == ""
        assert outcome.durable
        assert outcome.counters.total == outcome.size == world.source.size
        assert world.lost_units() == []
    else:
        assert outcome.error
        assert not (outcome.durable and outcome.verdict is not Verdict.UNFENCED)
    if world.job.local_workers:
        writing = [process.name for process in world.processes.values() if process.leases]
        assert writing == []
        assert outcome.unfenced == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_faults_every_local_job_is_complete(seed: int) -> None:
    world = World(seed, small_job(), small_disk(), small_disk(), Faults(repeats_message=0.2))
    outcome = world.run(SECONDS_MAX)
    check(world, outcome)
    assert outcome.verdict is Verdict.COMPLETE


@pytest.mark.parametrize("seed", SEEDS)
def test_local_workers_that_die_freeze_and_lose_messages_cost_no_byte(seed: int) -> None:
    faults = Faults(crash=0.03, freeze=0.05, loses_message=0.2, repeats_message=0.1, ignores_stop=0.1)
    world = World(seed, small_job(), small_disk(), small_disk(), faults)
    check(world, world.run(SECONDS_MAX))


@pytest.mark.parametrize("seed", SEEDS)
def test_servers_that_restart_lose_their_cache_and_the_ranges_are_copied_again(seed: int) -> None:
    faults = Faults(until=8, restart_server=0.4, drop_connection=0.1, loses_message=0.1, crash=0.02)
    world = World(seed, small_job(), small_disk(), small_disk(), faults)
    check(world, world.run(SECONDS_MAX))


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_workers_come_and_go(seed: int) -> None:
    faults = Faults(
        until=100, crash=0.02, freeze=0.05, leave=0.05, drop_connection=0.02, open_fails=0.05, never_opens=0.02
    )
    job = small_job(local_workers=False)
    world = World(seed, job, small_disk(), small_disk(), faults, remote_workers=6)
    check(world, world.run(SECONDS_MAX))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_single_writer_moves_only_when_the_old_one_is_gone(seed: int) -> None:
    faults = Faults(crash=0.05, freeze=0.05, drop_connection=0.05, ignores_stop=0.1)
    job = small_job(local_workers=seed % 2 == 0)
    target = small_disk(can_multi_conn=False)
    world = World(seed, job, small_disk(), target, faults, remote_workers=0 if job.local_workers else 4)
    check(world, world.run(SECONDS_MAX))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_flush_that_fails_is_never_a_success(seed: int) -> None:
    faults = Faults(until=1000, flush_fails=1.0, crash=0.02)
    world = World(seed, small_job(), small_disk(), small_disk(), faults)
    outcome = world.run(SECONDS_MAX)
    check(world, outcome)
    assert outcome.verdict is Verdict.FAILED


@pytest.mark.parametrize("seed", SEEDS)
def test_a_user_who_stops_at_any_time_is_heard(seed: int) -> None:
    faults = Faults(freeze=0.1, crash=0.02, ignores_stop=0.3)
    world = World(seed, small_job(destination_grows=seed % 3 == 0), small_disk(), small_disk(), faults)
    first = world.random.uniform(0.0, 10.0)
    world.later(first, lambda: world.act(world.scheduler.stop("stopped by SIGINT", world.now)))
    if seed % 2:
        world.later(first + 0.5, lambda: world.act(world.scheduler.stop("stopped by SIGINT", world.now)))
    outcome = world.run(SECONDS_MAX)
    check(world, outcome)
    assert world.now < first + 25
