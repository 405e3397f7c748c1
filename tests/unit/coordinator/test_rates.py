"""Who gets how much of the job's rate, and when that is said."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common import messages
from nbdshard.common.limits import (
    MIB,
    RATE_BYTES_MIN,
    RATE_SHARE_SECONDS,
    RATE_STALL_SECONDS,
    RATE_WEIGHT,
    STALL_SECONDS,
    WORKERS_MAX,
)
from nbdshard.coordinator.instructions import Instruction, Send
from nbdshard.coordinator.job import Pace
from nbdshard.coordinator.rates import shares_of
from support.schedules import Stage, flushed, flushes_in, goodbye, job, leases_in, progress, server, wanted, written

UNIT = 4 * MIB
DISK = server(64 * UNIT)
LIMIT = 90 * MIB
SOON = RATE_SHARE_SECONDS + 0.001


def rates(followed: list[Instruction]) -> list[tuple[str, int | None]]:
    """Who was told which rate, in order."""
    return [
        (item.worker, item.message.bytes_per_second)
        for item in followed
        if isinstance(item, Send) and isinstance(item.message, messages.Rate)
    ]


def copying(workers: int = 3, limit: int | None = LIMIT, disk: messages.EndpointDescription = DISK) -> Stage:
    """Workers "a", "b", ... that have nothing yet."""
    stage = Stage(job(workers=workers, connections=workers, range_size=UNIT, local_workers=False, rate=limit))
    stage.start()
    for name in "abcdefgh"[:workers]:
        stage.join(name, disk, disk)
    return stage


def told(stage: Stage, *workers: str) -> dict[str, int | None]:
    """The last rate that each was told."""
    return {
        worker: next(
            message.bytes_per_second for message in reversed(stage.sent[worker]) if isinstance(message, messages.Rate)
        )
        for worker in workers
    }


def set_pace(stage: Stage, pace: Pace) -> list[Instruction]:
    return stage._note(stage.scheduler.set_pace(pace, stage.now))


@settings(deadline=None)
@given(
    st.integers(min_value=RATE_BYTES_MIN, max_value=1 << 62),
    st.lists(st.sampled_from([1, RATE_WEIGHT]), min_size=1, max_size=WORKERS_MAX),
)
def test_shares_never_add_up_to_more_than_the_limit_and_nobody_starves(limit: int, weights: list[int]) -> None:
    shares = shares_of(limit, weights)
    assert sum(shares) <= limit < sum(shares) + len(weights)
    assert min(shares) >= 1
    assert len({(weight, share) for weight, share in zip(weights, shares, strict=True)}) == len(set(weights))


def test_a_job_without_a_rate_tells_nobody_anything() -> None:
    stage = copying(limit=None)
    for name in "abc":
        stage.say(name, wanted(1))
    assert rates(stage.wait(10.0, "a", "b", "c")) == []
    assert not any(isinstance(message, messages.Rate) for sent in stage.sent.values() for message in sent)


def test_a_new_worker_is_told_to_read_nothing_before_it_is_given_a_lease() -> None:
    stage = copying(workers=1)
    stage.say("a", wanted(1))
    stage.wait(SOON)
    kinds = [type(message) for message in stage.sent["a"]]
    assert kinds.index(messages.Assign) < kinds.index(messages.Rate) < kinds.index(messages.Lease)
    assert next(m for m in stage.sent["a"] if isinstance(m, messages.Rate)).bytes_per_second == 0


def test_workers_with_work_share_equally_and_those_without_get_nothing() -> None:
    stage = copying()
    stage.say("a", wanted(1))
    stage.wait(SOON)
    assert told(stage, "a", "b", "c") == {"a": LIMIT, "b": 0, "c": 0}
    for name in "bc":
        stage.say(name, wanted(1))
    stage.wait(SOON)
    assert told(stage, "a", "b", "c") == {"a": LIMIT // 3, "b": LIMIT // 3, "c": LIMIT // 3}


def test_a_share_is_lowered_before_another_is_raised() -> None:
    stage = copying()
    stage.say("c", wanted(1))
    stage.wait(SOON)
    stage.say("a", wanted(1))
    assert rates(stage.wait(SOON)) == [("c", LIMIT // 2), ("a", LIMIT // 2)]


def test_who_runs_out_of_work_leaves_its_share_to_the_others() -> None:
    stage = copying(workers=2)
    (first,) = leases_in(stage.say("a", wanted(1)))
    stage.say("b", wanted(1))
    stage.wait(SOON)
    stage.say("a", written(first))
    stage.wait(SOON)
    assert told(stage, "a", "b") == {"a": 0, "b": LIMIT}


def test_who_leaves_leaves_its_share_to_the_others() -> None:
    stage = copying(workers=2)
    for name in "ab":
        stage.say(name, wanted(1))
    stage.wait(SOON)
    stage.say("a", goodbye())
    stage.wait(SOON)
    assert told(stage, "b") == {"b": LIMIT}


def test_who_completes_nothing_for_long_leaves_most_of_its_share_until_it_gets_on_again() -> None:
    stage = copying(workers=2)
    (one,) = leases_in(stage.say("a", wanted(1)))
    (other,) = leases_in(stage.say("b", wanted(1)))
    stage.wait(SOON)
    for second in range(1, int(RATE_STALL_SECONDS) + 3):
        stage.say("b", progress(other, second * 1000))
        stage.wait(1.0, "a", "b")
    shares = told(stage, "a", "b")
    assert shares == {"a": LIMIT // (RATE_WEIGHT + 1), "b": LIMIT * RATE_WEIGHT // (RATE_WEIGHT + 1)}
    stage.say("a", progress(one, 1000))
    stage.wait(SOON, "a", "b")
    assert told(stage, "a", "b") == {"a": LIMIT // 2, "b": LIMIT // 2}


def test_who_has_stalled_keeps_its_small_share_until_it_gets_on() -> None:
    """With the small share a request takes so long that it alone would explain that nothing comes."""
    stage = copying(workers=2, limit=MIB)
    (one,) = leases_in(stage.say("a", wanted(1)))
    (other,) = leases_in(stage.say("b", wanted(1)))
    stage.wait(SOON)
    shares: list[int | None] = []
    for second in range(1, 60):
        stage.say("b", progress(other, second * 1000))
        shares += [rate for who, rate in rates(stage.wait(1.0, "a", "b")) if who == "a"]
    assert [share for share, before in zip(shares, [None, *shares], strict=False) if share != before] == [
        MIB // 2,
        MIB // (RATE_WEIGHT + 1),
    ]
    stage.say("a", progress(one, 1000))
    stage.wait(SOON, "a", "b")
    assert told(stage, "a") == {"a": MIB // 2}


def test_who_has_stalled_when_a_pause_begins_is_given_another_chance_when_it_ends() -> None:
    stage = copying(workers=2)
    (granted,) = leases_in(stage.say("a", wanted(1)))
    stage.say("b", wanted(1))
    for second in range(1, int(RATE_STALL_SECONDS) + 3):
        stage.say("a", progress(granted, second * 1000))
        stage.wait(1.0, "a", "b")
    assert told(stage, "b") == {"b": LIMIT // (RATE_WEIGHT + 1)}
    stage.set_pace(Pace(LIMIT, is_paused=True))
    stage.set_pace(Pace(LIMIT))
    assert told(stage, "a", "b") == {"a": LIMIT // 2, "b": LIMIT // 2}


def test_who_is_only_slow_because_of_its_share_has_not_stalled() -> None:
    """At 32 KiB a second a request of 1 MiB takes 32 of them."""
    stage = copying(workers=2, limit=RATE_BYTES_MIN)
    for name in "ab":
        stage.say(name, wanted(1))
    stage.wait(60.0, "a", "b")
    assert told(stage, "a", "b") == {"a": RATE_BYTES_MIN // 2, "b": RATE_BYTES_MIN // 2}


def test_a_rate_is_told_again_with_every_heartbeat() -> None:
    stage = copying(workers=1)
    stage.say("a", wanted(1))
    stage.wait(SOON)
    followed = stage.wait(stage.job.heartbeat_seconds * 2, "a")
    assert rates(followed)[-1] == ("a", LIMIT)


def test_the_rate_changes_while_the_job_runs_and_off_means_no_limit() -> None:
    stage = copying(workers=2)
    for name in "ab":
        stage.say(name, wanted(1))
    stage.wait(SOON)
    assert sorted(rates(set_pace(stage, Pace(MIB)))) == [("a", MIB // 2), ("b", MIB // 2)]
    assert stage.scheduler.status().pace == Pace(MIB)
    assert sorted(rates(set_pace(stage, Pace()))) == [("a", None), ("b", None)]
    assert rates(set_pace(stage, Pace())) == []


def test_a_pause_reaches_all_at_once_grants_nothing_and_is_shown() -> None:
    stage = copying(workers=2, limit=None)
    stage.say("a", wanted(1))
    assert sorted(rates(set_pace(stage, Pace(is_paused=True)))) == [("a", 0), ("b", 0)]
    assert leases_in(stage.say("b", wanted(1))) == []
    assert stage.scheduler.status().phase == "paused"
    followed = set_pace(stage, Pace())
    assert sorted(rates(followed)) == [("a", None), ("b", None)]
    assert len(leases_in(followed)) == 1
    assert stage.scheduler.status().phase == "copying"


def test_who_comes_during_a_pause_pauses() -> None:
    stage = copying(workers=2, limit=None)
    set_pace(stage, Pace(is_paused=True))
    stage.say("b", goodbye())
    followed = stage.join("c", DISK, DISK)
    assert rates(followed) == [("c", 0)]


def test_a_pause_keeps_the_limit_for_later() -> None:
    stage = copying(workers=1)
    stage.say("a", wanted(1))
    stage.wait(SOON)
    set_pace(stage, Pace(LIMIT, is_paused=True))
    assert told(stage, "a") == {"a": 0}
    assert rates(set_pace(stage, Pace(LIMIT))) == [("a", LIMIT)]


def test_a_job_may_pause_for_longer_than_it_may_stand_still() -> None:
    stage = copying(workers=1)
    (granted,) = leases_in(stage.say("a", wanted(1)))
    set_pace(stage, Pace(is_paused=True))
    stage.wait(STALL_SECONDS * 3, "a")
    assert stage.outcomes == []
    assert stage.scheduler.status().phase == "paused"
    set_pace(stage, Pace())
    stage.wait(STALL_SECONDS / 2, "a")
    stage.say("a", progress(granted, MIB))
    assert stage.scheduler.status().phase == "copying"


def test_what_is_written_is_flushed_during_a_pause() -> None:
    stage = copying(workers=1, limit=None)
    (granted,) = leases_in(stage.say("a", wanted(1)))
    set_pace(stage, Pace(is_paused=True))
    stage.say("a", written(granted))
    (flush,) = flushes_in(stage.wait(stage.job.checkpoint_seconds + 1.0, "a"))
    stage.say("a", flushed(flush, granted))
    assert stage.scheduler.status().phase == "paused"


def test_a_job_that_ends_hears_no_more_of_rates() -> None:
    stage = copying(workers=1)
    stage.stop()
    assert rates(set_pace(stage, Pace(MIB))) == []
    assert stage.scheduler.pace == Pace(LIMIT)
    stage.say("a", goodbye())
    assert set_pace(stage, Pace()) == []


@pytest.mark.parametrize("pace", [Pace(LIMIT), Pace(is_paused=True)])
def test_a_job_that_is_not_yet_open_takes_a_pace_too(pace: Pace) -> None:
    stage = Stage(job())
    stage.start()
    set_pace(stage, pace)
    assert rates(stage.join("a", DISK, DISK)) == [("a", 0)]
