"""coordinator/scheduler.py: a job that is slow, by its rate or its servers, gets on although connections are lost."""

from __future__ import annotations

import pytest

from nbdshard.common import messages
from nbdshard.common.limits import (
    CHECKPOINT_SECONDS,
    GIB,
    KIB,
    MIB,
    RANGE_BYTES_DEFAULT,
    RANGE_SECONDS,
    RATE_BYTES_MIN,
    RETURNS_BEFORE_FLUSH,
    RETURNS_PER_RANGE,
)
from nbdshard.coordinator.job import Pace, Verdict
from support.schedules import (
    Stage,
    ended,
    failed,
    flushed,
    flushes_in,
    job,
    leases_in,
    open_failed,
    opened,
    progress,
    server,
    wanted,
    written,
)

DISK = server(64 * GIB)
RESET = "destination nbd://b: connection reset by peer"
REQUEST = MIB


def copying(workers: int = 1, **changes: object) -> Stage:
    """A job of large ranges, with as many workers "a", "b", ... that hold nothing yet."""
    stage = Stage(job(workers=workers, connections=workers, loss_seconds=600.0, **changes))
    stage.start()
    for name in "abcdefgh"[:workers]:
        stage.join(name, DISK, DISK)
    return stage


def one_lease(stage: Stage, worker: str = "a") -> messages.Lease:
    (granted,) = leases_in(stage.say(worker, wanted(1)))
    return granted


def lose(stage: Stage, granted: messages.Lease, done: int) -> None:
    """Some of `granted` is done when its connection is lost."""
    stage.say("a", progress(granted, done), failed(granted, "connection", RESET))


# -- how much is leased at a time --------------------------------------------------------------------------------------


def test_a_job_without_a_rate_begins_with_ranges_of_the_usual_size() -> None:
    assert one_lease(copying()).range.length == RANGE_BYTES_DEFAULT


def test_a_lease_is_no_more_than_what_its_share_of_the_rate_takes_seconds_for() -> None:
    stage = copying(workers=4, rate=16 * MIB)
    assert one_lease(stage).range.length == RANGE_SECONDS * 4 * MIB


def test_however_small_the_rate_is_one_request_is_leased() -> None:
    assert one_lease(copying(workers=8, rate=RATE_BYTES_MIN)).range.length == REQUEST


def test_who_asks_for_ranges_of_a_certain_size_gets_them() -> None:
    assert one_lease(copying(range_size=64 * MIB, rate=MIB)).range.length == 64 * MIB


def test_a_rate_that_is_set_while_the_job_runs_counts_for_the_next_lease() -> None:
    stage = copying()
    one_lease(stage)
    stage.set_pace(Pace(MIB))
    assert one_lease(stage).range.length == RANGE_SECONDS * MIB


@pytest.mark.parametrize("speed", [2 * MIB, 10 * MIB])
def test_a_lease_is_no_more_than_what_a_slow_server_takes_seconds_for(speed: int) -> None:
    stage = copying()
    granted = one_lease(stage)
    for second in range(1, 3):
        stage.wait(1.0, "a")
        stage.say("a", progress(granted, second * speed))
    assert RANGE_SECONDS * speed * 0.9 <= one_lease(stage).range.length <= RANGE_SECONDS * speed


def test_a_pause_does_not_make_a_worker_a_slow_one() -> None:
    stage = copying()
    granted = one_lease(stage)
    stage.wait(1.0, "a")
    stage.say("a", progress(granted, GIB // 16))
    stage.set_pace(Pace(is_paused=True))
    stage.wait(1000.0, "a")
    stage.set_pace(Pace())
    stage.wait(1.0, "a")
    stage.say("a", written(granted))
    assert one_lease(stage).range.length == RANGE_BYTES_DEFAULT


def test_a_range_that_comes_back_is_leased_in_parts_of_that_size() -> None:
    stage = copying()
    granted = one_lease(stage)
    for second in range(1, 5):
        stage.wait(1.0, "a")
        stage.say("a", progress(granted, second * 2 * MIB))
    stage.say("a", failed(granted, "connection", RESET))
    first, second = leases_in(stage.say("a", wanted(2)))
    assert (first.range.start, second.range.start) == (0, first.range.end)
    assert first.range.length <= RANGE_SECONDS * 2 * MIB


# -- connections that are lost again and again -------------------------------------------------------------------------


def test_a_range_of_which_each_connection_does_a_part_does_not_fail_the_job() -> None:
    """At a MiB per connection."""
    stage = copying(range_size=64 * MIB)
    losses, end = 0, 0
    while end < 64 * MIB:
        granted = one_lease(stage)
        if granted.range.length > REQUEST:
            lose(stage, granted, REQUEST)
            losses += 1
        else:
            stage.say("a", written(granted))
            end = granted.range.end
    assert losses > RETURNS_PER_RANGE
    assert stage.outcomes == []


def test_each_loss_halves_what_is_leased_of_a_range_until_it_is_one_request() -> None:
    stage = copying(range_size=8 * MIB)
    lengths = []
    for _ in range(5):
        granted = one_lease(stage)
        lengths.append(granted.range.length // MIB)
        assert granted.range.start == 0
        lose(stage, granted, 64 * KIB)
    assert lengths == [8, 4, 2, 1, 1]


def test_the_next_lease_in_hand_is_not_counted_while_the_first_gets_on() -> None:
    stage = copying(range_size=8 * MIB)
    lengths = []
    for _ in range(5):
        first, second = leases_in(stage.say("a", wanted(2)))
        lengths.append((first.range.length // MIB, second.range.length // MIB))
        stage.say("a", progress(first, 64 * KIB), open_failed(RESET))
        while not stage.scheduler._crew.workers["a"].assigned:
            stage.wait(0.1, "a")
        stage.say("a", opened(DISK, DISK))
    assert lengths == [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]


def test_a_server_that_dies_of_one_place_fails_the_job_after_all() -> None:
    """Some of each lease is done, up to that place: else the job would go on for ever."""
    stage = copying(range_size=64 * MIB)
    bad, losses = 41 * MIB, 0
    while not stage.scheduler.is_ending:
        granted = one_lease(stage)
        if bad in range(granted.range.start, granted.range.end):
            lose(stage, granted, bad - granted.range.start)
            losses += 1
        else:
            stage.say("a", written(granted))
    assert losses <= RETURNS_PER_RANGE + 6
    verdict, line = ended(stage, "a")
    assert verdict is Verdict.FAILED
    assert line == f"{RESET} ({RETURNS_PER_RANGE} times for the range of {MIB} bytes at offset {bad})"


def test_a_server_that_dies_of_the_odd_end_of_a_disk_fails_the_job_too() -> None:
    """The end is leased with the request before it, so no lease of it is ever as short as one request."""
    odd = server(4 * MIB + 512)
    stage = Stage(job(workers=1, connections=1, range_size=64 * MIB, loss_seconds=600.0))
    stage.start()
    stage.join("a", odd, odd)
    losses = 0
    while not stage.scheduler.is_ending and losses < 10 * RETURNS_PER_RANGE:
        granted = one_lease(stage)
        if granted.range.end > 4 * MIB:
            lose(stage, granted, 4 * MIB - granted.range.start)
            losses += 1
        else:
            stage.say("a", written(granted))
    assert losses <= RETURNS_PER_RANGE + 6


def test_what_was_written_and_lost_before_a_checkpoint_twice_is_halved_and_flushed_at_once() -> None:
    stage = copying(range_size=64 * MIB)
    first = one_lease(stage)
    for _ in range(RETURNS_BEFORE_FLUSH):
        assert flushes_in(stage.say("a", written(first))) == []
        assert flushes_in(stage.wait(CHECKPOINT_SECONDS / 2, "a")) == []
        stage.say("a", open_failed(RESET))
        while not stage.scheduler._crew.workers["a"].assigned:
            stage.wait(0.1, "a")
        stage.say("a", opened(DISK, DISK))
        first = one_lease(stage)
    assert first.range.length == 32 * MIB
    (flush,) = flushes_in(stage.say("a", written(first)))
    stage.say("a", flushed(flush, first))
    stage.say("a", open_failed(RESET))
    assert stage.scheduler.status().counters.total == first.range.length, "it is durable"
