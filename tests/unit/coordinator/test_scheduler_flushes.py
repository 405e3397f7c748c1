"""Flushes, and streams that cannot be copied a second time: what is durable, and what is lost."""

from __future__ import annotations

from nbdshard.common import messages
from nbdshard.common.limits import (
    MIB,
)
from nbdshard.common.messages import Counters
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Forget, Journal, Start
from nbdshard.coordinator.job import Verdict
from support.schedules import (
    DISK,
    EPOCH,
    UUID,
    Stage,
    copying,
    ended,
    error,
    failed,
    flushed,
    flushes_in,
    lease,
    leases_in,
    streaming,
    wanted,
    written,
)

# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_whose_worker_dies_fails_the_job() -> None:
    stage, _ = streaming()
    stage.gone("a")
    assert ended(stage) == (
        Verdict.FAILED,
        "worker host-a/100 ended: killed by SIGKILL; a stream cannot be copied a second time",
    )


def test_a_stream_whose_connection_is_lost_fails_the_job() -> None:
    stage, granted = streaming()
    stage.say("a", failed(granted, "connection", "destination nbd://b: connection reset by peer"))
    assert ended(stage, "a") == (Verdict.FAILED, "destination nbd://b: connection reset by peer")


def test_a_stream_that_no_flush_covers_fails_the_job() -> None:
    stage, granted = streaming()
    (flush,) = flushes_in(stage.say("a", written(granted, end=10)))
    stage.say("a", flushed(flush))
    assert ended(stage, "a") == (
        Verdict.FAILED,
        "no flush covers the range of 9223372036854775807 bytes at offset 0; a stream cannot be copied a second time",
    )


def test_a_stream_may_pause_for_ever() -> None:
    stage, _ = streaming()
    stage.wait(4000.0, "a")
    assert stage.outcomes == []


# -- flushes -----------------------------------------------------------------------------------------------------------


def all_written(stage: Stage) -> tuple[messages.Flush, list[messages.Lease]]:
    granted = leases_in(stage.say("a", wanted(2)))
    (flush,) = flushes_in(stage.say("a", *[written(item) for item in granted]))
    return flush, granted


def test_a_flush_that_fails_fails_the_copy() -> None:
    stage = copying()
    flush, granted = all_written(stage)
    line = "destination nbd://b: flush failed: EIO; what was written may be lost"
    stage.say("a", flushed(flush, *granted, durable=False, failure=error("request", line)))
    assert ended(stage, "a") == (Verdict.FAILED, line)
    assert stage.outcome.durable is False


def test_what_could_not_be_read_goes_to_the_journal_with_its_range() -> None:
    stage = copying(salvage=True)
    first, second = leases_in(stage.say("a", wanted(2)))
    place = Range.of(second.range.start + 4096, 512)
    bad = messages.Written(UUID, EPOCH, second.lease, Counters(copied=second.range.length), None, (place,))
    (flush,) = flushes_in(stage.say("a", written(first), bad))
    followed = stage.say("a", flushed(flush, first, second))
    assert Journal(durable=(Range(0, 8 * MIB),), unreadable=(place,)) in followed
    assert ended(stage, "a") == (Verdict.COMPLETE, "")
    assert stage.outcome.unreadable == (place,)
    assert stage.scheduler.status().unreadable_bytes == 512


def test_a_flush_that_is_not_answered_fails_the_copy() -> None:
    stage = copying()
    all_written(stage)
    stage.wait(32.0, "a")
    assert ended(stage, "a") == (Verdict.FAILED, "worker host-a/100 did not answer a flush within 31 s")


def test_what_a_flush_does_not_cover_is_copied_again() -> None:
    stage = copying()
    flush, (first, second) = all_written(stage)
    stage.say("a", wanted(2))
    assert leases_in(stage.say("a", flushed(flush, second))) == [lease(3, first.range.start, first.range.end)]
    assert stage.scheduler.status().phase == "copying"
    (again,) = flushes_in(stage.say("a", written(lease(3, first.range.start, first.range.end))))
    stage.say("a", flushed(again, lease(3, first.range.start, first.range.end)))
    assert ended(stage, "a") == (Verdict.COMPLETE, "")


def test_an_answer_to_another_flush_is_ignored() -> None:
    stage = copying()
    flush, granted = all_written(stage)
    stage.say("a", flushed(messages.Flush(UUID, EPOCH, flush.flush + 1), *granted))
    assert (stage.scheduler.dropped, stage.scheduler.status().phase) == (1, "flushing")


def test_a_worker_that_dies_while_it_flushes_has_its_ranges_copied_again() -> None:
    stage = copying()
    all_written(stage)
    assert stage.gone("a") == [Forget("a"), Start(1)]
    stage.join("b", DISK, DISK)
    assert len(leases_in(stage.say("b", wanted(2)))) == 2


def test_a_flush_vouches_only_for_what_that_worker_wrote() -> None:
    stage = copying(2)
    (first,) = leases_in(stage.say("a", wanted(1)))
    (second,) = leases_in(stage.say("b", wanted(1)))
    stage.say("a", written(first))
    one, two = flushes_in(stage.say("b", written(second)))
    assert stage.say("a", flushed(one, first, second)) == []
    assert leases_in(stage.say("b", wanted(1), flushed(two))) == [lease(3, 4 * MIB, 8 * MIB)]
