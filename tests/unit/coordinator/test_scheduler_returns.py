"""coordinator/scheduler.py: a server is lost in the middle of the copy, waited for, and comes back or does not."""

from __future__ import annotations

import pytest

from nbdshard.common import messages
from nbdshard.common.limits import (
    BACKOFF_JITTER,
    BACKOFF_SECONDS_MAX,
    BACKOFF_SECONDS_MIN,
    IDLE_JOB_SECONDS,
    RETURNS_PER_RANGE,
)
from nbdshard.coordinator.instructions import Instruction, Send
from nbdshard.coordinator.job import Pace, Verdict
from support.schedules import (
    Stage,
    ended,
    goodbye,
    hello,
    job,
    leases_in,
    open_failed,
    opened,
    server,
    stops,
    streaming,
    wanted,
    written,
)

MIB = 1 << 20
DISK = server(256 * MIB, can_multi_conn=True)
LOSS_SECONDS = 60.0
LOST = "source nbd://a: connection lost while reading: connection reset by peer"
REFUSED = "source nbd://a: connection lost while connecting: connection refused"


def copying(workers: int = 1, *, local: bool = True) -> tuple[Stage, list[messages.Lease]]:
    """A job that waits for lost servers, whose workers "a", "b", ... hold a lease each."""
    stage = Stage(job(workers=workers, local_workers=local, loss_seconds=LOSS_SECONDS, range_size=64 * MIB))
    stage.start()
    followed = stage.join("a", DISK, DISK)
    leases = leases_in(followed) + leases_in(stage.say("a", wanted()))
    for name in "bcdefgh"[: workers - 1]:
        stage.say(name, hello(name))
        stage.say(name, opened(DISK, DISK))
        leases += leases_in(stage.say(name, wanted()))
    assert len(leases) == workers
    return stage, leases


def assigned(instructions: list[Instruction]) -> list[str]:
    """Who is given connections."""
    return [
        item.worker
        for item in instructions
        if isinstance(item, Send) and isinstance(item.message, messages.Assign) and item.message.source_connections
    ]


def until_assigned(stage: Stage, *awake: str) -> float:
    """How long it takes until somebody is given connections again."""
    begun = stage.now
    while stage.now < begun + 2 * BACKOFF_SECONDS_MAX:
        if assigned(stage.wait(0.05, *awake)):
            return stage.now - begun
    raise AssertionError("nobody was given connections again")


def test_a_worker_that_lost_its_connections_is_given_new_ones_and_what_it_held() -> None:
    stage, (lease,) = copying()
    assert stops(stage.say("a", open_failed(LOST))) == []
    assert stage.scheduler.status().waiting_for == LOST
    assert until_assigned(stage) <= BACKOFF_SECONDS_MIN + 0.05
    stage.say("a", opened(DISK, DISK))
    assert stage.scheduler.status().waiting_for == ""
    (again,) = leases_in(stage.say("a", wanted()))
    assert (again.range, again.lease > lease.lease) == (lease.range, True)


def test_what_was_written_and_not_flushed_is_copied_again() -> None:
    stage, (lease,) = copying()
    stage.say("a", written(lease), open_failed(LOST))
    until_assigned(stage)
    stage.say("a", opened(DISK, DISK))
    assert lease.range in [each.range for each in leases_in(stage.say("a", wanted(2)))]


def test_the_pause_doubles_with_each_loss_up_to_a_bound() -> None:
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    pauses = [until_assigned(stage)]
    while stage.scheduler.status().waiting_seconds < LOSS_SECONDS / 2:
        stage.say("a", open_failed(REFUSED))
        pauses.append(until_assigned(stage))
    for number, pause in enumerate(pauses):
        most = min(BACKOFF_SECONDS_MIN * 2**number, BACKOFF_SECONDS_MAX)
        assert most * (1 - BACKOFF_JITTER) <= pause <= most + 0.1


def test_a_written_lease_ends_a_row_of_losses() -> None:
    stage, _ = copying()
    for _ in range(4):
        stage.say("a", open_failed(LOST))
        until_assigned(stage)
    stage.say("a", opened(DISK, DISK))
    (lease,) = leases_in(stage.say("a", wanted()))
    stage.say("a", written(lease), open_failed(LOST))
    assert until_assigned(stage) <= BACKOFF_SECONDS_MIN + 0.05


def test_when_the_loss_lasts_too_long_the_job_pauses() -> None:
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    while not (told := stops(stage.wait(1.0, "a"))):
        if stage.scheduler.status().workers == 0 and stage.scheduler.status().waiting_seconds <= LOSS_SECONDS:
            stage.say("a", open_failed(REFUSED)) if stage.now % 5 < 1 else None
        assert stage.now < 1000 + 2 * LOSS_SECONDS
    assert told[0][0] == "a"
    stage.say("a", goodbye())
    verdict, line = ended(stage)
    assert verdict is Verdict.PAUSED
    assert "it was waited for 60 s" in line


def test_a_server_that_only_takes_connections_and_loses_them_is_not_waited_for_any_longer() -> None:
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    begun = stage.now
    while not (told := stops(stage.wait(0.5, "a"))):
        stage.say("a", opened(DISK, DISK), open_failed(LOST)) if stage.scheduler._crew.workers["a"].assigned else None
        assert stage.now < begun + 2 * LOSS_SECONDS
    assert told[0][0] == "a"
    assert ended(stage, "a")[0] is Verdict.PAUSED


def test_a_byte_that_is_completed_ends_the_loss() -> None:
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    stage.wait(LOSS_SECONDS - 10, "a")
    stage.say("a", opened(DISK, DISK))
    (lease,) = leases_in(stage.say("a", wanted()))
    stage.say("a", written(lease), open_failed(LOST))
    assert stage.scheduler.status().waiting_seconds == 0
    assert stops(stage.wait(20, "a")) == []


def test_others_go_on_while_one_worker_has_lost_its_connections() -> None:
    stage, (lost, kept) = copying(2)
    followed = stage.say("a", open_failed(LOST))
    assert stops(followed) == []
    assert stage.scheduler.status().waiting_for == ""  # nobody waits: "b" is connected
    taken = leases_in(stage.say("b", written(kept), wanted(2)))
    assert lost.range in [each.range for each in taken]


def test_a_worker_that_waits_may_repeat_old_reports_and_they_change_nothing() -> None:
    stage, (lease,) = copying()
    stage.say("a", open_failed(LOST))
    dropped = stage.scheduler.dropped
    stage.say("a", written(lease), wanted(), messages.Alive(lease.job, lease.epoch, 1.0))
    assert stage.scheduler.dropped == dropped + 2
    assert stage.scheduler.status().counters.total == 0


def test_a_worker_that_finds_another_disk_when_it_comes_back_is_stopped() -> None:
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    until_assigned(stage)
    grown = server(512 * MIB, can_multi_conn=True)
    assert [who for who, _ in stops(stage.say("a", opened(grown, DISK)))] == ["a"]
    assert ended(stage, "a")[0] is Verdict.FAILED


@pytest.mark.parametrize("kind", ["user", "protocol", "bug"])
def test_only_a_lost_connection_is_waited_for(kind: str) -> None:
    stage, _ = copying()
    assert [who for who, _ in stops(stage.say("a", open_failed(LOST, kind)))] == ["a"]
    assert ended(stage, "a") == (Verdict.FAILED, LOST)


def test_the_first_worker_does_not_wait_for_a_server_nobody_has_seen() -> None:
    stage = Stage(job(loss_seconds=LOSS_SECONDS))
    stage.start()
    stage.say("a", hello("a"), open_failed(REFUSED))
    assert ended(stage, "a") == (Verdict.FAILED, REFUSED)


def test_a_stream_is_not_waited_for() -> None:
    stage, _ = streaming()
    stage.scheduler._job = job(loss_seconds=LOSS_SECONDS)
    stage.say("a", open_failed(LOST))
    assert stage.scheduler.status().waiting_for == ""
    assert ended(stage, "a")[0] is Verdict.FAILED


def test_a_worker_that_dies_while_it_waits_is_replaced_by_one_that_waits() -> None:
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    stage.gone("a")
    stage.say("b", hello("b"), open_failed(REFUSED))
    assert stage.scheduler.outcome is None
    assert stage.scheduler.status().waiting_for == REFUSED
    until_assigned(stage)
    stage.say("b", opened(DISK, DISK))
    assert leases_in(stage.say("b", wanted()))


def test_a_worker_that_dies_while_it_waits_does_not_shorten_the_wait() -> None:
    stage = Stage(job(loss_seconds=2 * IDLE_JOB_SECONDS))
    stage.start()
    stage.join("a", DISK, DISK)
    stage.say("a", open_failed(LOST))
    stage.wait(IDLE_JOB_SECONDS + 1, "a")
    stage.gone("a")
    assert stops(stage.wait(1) + stage.say("b", hello("b"))) == []
    assert stage.scheduler.outcome is None


def test_a_server_that_dies_of_one_range_again_and_again_fails_the_job() -> None:
    stage, _ = copying()
    for _ in range(RETURNS_PER_RANGE):
        followed = stage.say("a", open_failed(LOST))
        if stops(followed):
            break
        until_assigned(stage)
        stage.say("a", opened(DISK, DISK), wanted())
    assert ended(stage, "a")[0] is Verdict.FAILED


def test_ctrl_c_ends_a_job_that_waits() -> None:
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    assert [who for who, _ in stops(stage.stop())] == ["a"]
    assert ended(stage, "a")[0] is Verdict.STOPPED


# -- while the user has the job pause ----------------------------------------------------------------------------------


def test_a_short_loss_long_after_another_does_not_end_a_job_that_pauses() -> None:
    """Nothing can be completed in between: a connection that is back is all that can be had."""
    stage, _ = copying()
    stage.say("a", open_failed(LOST))
    until_assigned(stage)
    stage.say("a", opened(DISK, DISK))
    stage.set_pace(Pace(is_paused=True))
    stage.wait(2 * LOSS_SECONDS, "a")
    stage.say("a", open_failed(LOST))
    assert stage.scheduler.status().waiting_seconds == 0
    until_assigned(stage, "a")
    stage.say("a", opened(DISK, DISK))
    assert stage.outcomes == []
    assert stage.scheduler.status().phase == "paused"


def test_a_server_that_comes_back_during_a_pause_is_back_when_the_job_goes_on() -> None:
    stage, _ = copying()
    stage.set_pace(Pace(is_paused=True))
    stage.say("a", open_failed(LOST))
    until_assigned(stage)
    stage.say("a", opened(DISK, DISK))
    stage.wait(2 * LOSS_SECONDS, "a")
    stage.set_pace(Pace())
    stage.say("a", open_failed(LOST))
    assert stage.scheduler.status().waiting_seconds == 0
    assert stops(stage.wait(LOSS_SECONDS / 2, "a")) == []


def test_a_server_that_stays_away_during_a_pause_is_waited_for_no_longer_than_else() -> None:
    stage, _ = copying()
    stage.set_pace(Pace(is_paused=True))
    stage.say("a", open_failed(LOST))
    told = stops(stage.wait(LOSS_SECONDS + 1, "a"))
    assert [who for who, _ in told] == ["a"]
    assert ended(stage, "a")[0] is Verdict.PAUSED
