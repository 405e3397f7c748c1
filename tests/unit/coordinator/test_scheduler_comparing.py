"""Jobs that compare, and copies that are read back at their end: what the scheduler says, in order."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nbdshard.common import messages
from nbdshard.common.limits import MIB
from nbdshard.common.messages import Counters, EndpointDescription, Lease
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Instruction, Journal, Send
from nbdshard.coordinator.job import Comparison, Verdict
from support.schedules import (
    DISK,
    EPOCH,
    OPTIONS,
    UUID,
    Stage,
    ended,
    error,
    failed,
    flushed,
    flushes_in,
    goodbye,
    hello,
    job,
    leases_in,
    opened,
    server,
    stops,
    wanted,
    written,
)

HALF = 4 * MIB


def compared(lease: Lease, *differences: Range, differing: int | None = None) -> messages.Compared:
    """All of `lease` was compared."""
    total = sum(piece.length for piece in differences) if differing is None else differing
    done = Counters(compared=lease.range.length)
    return messages.Compared(UUID, EPOCH, lease.lease, done, total, differences)


def comparing(
    source: EndpointDescription = DISK, destination: EndpointDescription = DISK, *, local: bool = True
) -> Stage:
    """A job that compares, with one READY worker "a"."""
    what = job(options=replace(OPTIONS, mode="compare", flush=False), range_size=HALF, local_workers=local)
    stage = Stage(what)
    stage.start()
    stage.join("a", source, destination)
    return stage


def reading_back(*, local: bool = True, workers: int = 1) -> tuple[Stage, list[Instruction]]:
    """A copy that is written and flushed, and what follows from that."""
    stage = Stage(job(verify=True, range_size=HALF, local_workers=local, workers=workers, connections=workers))
    stage.start()
    for name in "ab"[:workers]:
        stage.join(name, DISK, DISK)
    todo = leases_in(stage.say("a", wanted(2)))
    followed = stage.say("a", *(written(each) for each in todo))
    (flush,) = flushes_in(followed)
    return stage, stage.say("a", flushed(flush, *todo))


def modes(followed: list[Instruction]) -> list[tuple[str, str]]:
    return [
        (item.worker, item.message.options.mode)
        for item in followed
        if isinstance(item, Send) and isinstance(item.message, messages.Assign)
    ]


# -- a job that compares -----------------------------------------------------------------------------------------------


def test_the_same_bytes_end_as_complete_without_a_flush() -> None:
    stage = comparing()
    assert stage.scheduler.status().phase == "verifying"
    first, second = leases_in(stage.say("a", wanted(2)))
    assert stage.say("a", compared(first)) == [Send("a", messages.Noted(UUID, EPOCH, first.lease))]
    followed = stage.say("a", compared(second))
    assert flushes_in(followed) == []
    assert stops(followed) == [("a", "everything is compared")]
    stage.say("a", goodbye())
    outcome = stage.outcome
    assert outcome.verdict is Verdict.COMPLETE
    assert outcome.counters == Counters(compared=8 * MIB)
    assert outcome.comparison == Comparison(outcome.counters, 0, (), is_cut=False, sizes=(8 * MIB, 8 * MIB))


def test_differences_of_all_leases_are_put_together() -> None:
    stage = comparing()
    first, second = leases_in(stage.say("a", wanted(2)))
    stage.say("a", compared(second, Range(HALF, HALF + 512), Range(HALF + 1024, HALF + 1536)))
    stage.say("a", compared(first, Range(HALF - 512, HALF)))
    assert ended(stage, "a") == (Verdict.DIFFERENT, "source and destination differ")
    found = stage.outcome.comparison
    assert found is not None
    assert found.differences == (Range(HALF - 512, HALF + 512), Range(HALF + 1024, HALF + 1536))
    assert found.differing == 3 * 512
    assert not found.is_cut


def test_the_longer_side_says_how_much_there_is() -> None:
    for source, destination in ((server(HALF), DISK), (DISK, server(HALF))):
        stage = comparing(source, destination)
        assert [each.range for each in leases_in(stage.say("a", wanted(2)))] == [Range(0, HALF), Range(HALF, 8 * MIB)]
        assert stage.scheduler.status().size == 8 * MIB


def test_what_was_compared_by_a_worker_that_is_lost_stays_compared() -> None:
    stage = comparing()
    first, second = leases_in(stage.say("a", wanted(2)))
    stage.say("a", compared(first, Range(0, 512)))
    stage.gone("a")
    stage.join("b", DISK, DISK)
    (again,) = leases_in(stage.say("b", wanted(2)))
    assert again.range == second.range
    stage.say("b", compared(again))
    assert ended(stage, "b")[0] is Verdict.DIFFERENT
    assert stage.outcome.comparison is not None
    assert stage.outcome.comparison.differing == 512


def test_a_report_that_is_repeated_counts_once() -> None:
    stage = comparing()
    first, second = leases_in(stage.say("a", wanted(2)))
    for _ in range(3):
        followed = stage.say("a", compared(first, Range(0, 512)))
        assert followed[-1] == Send("a", messages.Noted(UUID, EPOCH, first.lease))
    stage.say("a", compared(second))
    ended(stage, "a")
    assert stage.outcome.comparison is not None
    assert stage.outcome.comparison.differing == 512


def test_a_read_that_fails_fails_the_job_whatever_differed_before() -> None:
    stage = comparing()
    first, second = leases_in(stage.say("a", wanted(2)))
    stage.say("a", compared(first, Range(0, 512)))
    stage.say("a", failed(second, "request", "source nbd://there: it cannot be read"))
    assert ended(stage, "a") == (Verdict.FAILED, "source nbd://there: it cannot be read")


def test_a_worker_elsewhere_that_falls_silent_is_no_danger_to_what_is_only_read() -> None:
    stage = comparing(local=False)
    stage.say("a", wanted(2))
    stage.wait(stage.job.lease_seconds + 1)
    stage.join("b", DISK, DISK)
    for each in leases_in(stage.say("b", wanted(2))):
        stage.say("b", compared(each))
    assert ended(stage, "b") == (Verdict.COMPLETE, "")
    assert stage.outcome.unfenced == ()


def test_ends_that_cannot_be_read_at_any_place_are_refused() -> None:
    stream = EndpointDescription(peer="standard input", size=None, is_stream=True)
    for ends in ((stream, DISK), (DISK, stream)):
        stage = comparing(*ends)
        assert ended(stage, "a") == (
            Verdict.FAILED,
            "standard input: only what can be read at any place can be compared",
        )


def test_an_unreachable_tail_of_either_side_is_refused() -> None:
    odd = server(8 * MIB + 1, block_minimum=512)
    for ends in ((odd, DISK), (DISK, odd)):
        stage = comparing(*ends)
        assert "the tail of 1 bytes is unreachable" in ended(stage, "a")[1]


def test_a_read_only_destination_can_be_compared() -> None:
    stage = comparing(DISK, replace(DISK, read_only=True))
    assert len(leases_in(stage.say("a", wanted(2)))) == 2


@pytest.mark.parametrize(
    ("differences", "differing"),
    [
        ((Range(HALF, HALF + 512),), 512),  # of another lease
        ((Range(HALF - 512, HALF + 512),), 1024),
        ((Range(512, 1024), Range(0, 512)), 1024),
        ((Range(0, 512), Range(512, 1024)), 1024),
        ((Range(0, 1024), Range(512, 2048)), 2048),
        ((Range(0, 1024),), 512),  # fewer than are told
        ((Range(0, 512),), HALF + 1),
        ((), 512),
    ],
)
def test_differences_that_cannot_be_are_not_believed(differences: tuple[Range, ...], differing: int) -> None:
    stage = comparing()
    first, _ = leases_in(stage.say("a", wanted(2)))
    followed = stage.say("a", compared(first, *differences, differing=differing))
    assert stops(followed) == [
        ("a", "worker host-a/100 broke the control protocol: it reported differences that are none of its lease's")
    ]


def test_part_of_a_lease_is_not_all_of_it() -> None:
    stage = comparing()
    first, _ = leases_in(stage.say("a", wanted(2)))
    half_done = replace(compared(first), done=Counters(compared=MIB, skipped=MIB))
    ((_, reason),) = stops(stage.say("a", half_done))
    assert "it reported 2097152 of 4194304 bytes of a lease as all of it" in reason


def test_who_copies_what_is_to_be_compared_is_stopped_and_the_other_way_round() -> None:
    stage = comparing()
    first, _ = leases_in(stage.say("a", wanted(2)))
    ((_, reason),) = stops(stage.say("a", written(first)))
    assert "it reported lease 1 as written, which it was to compare" in reason
    stage = Stage(job(range_size=HALF))
    stage.start()
    stage.join("a", DISK, DISK)
    first, _ = leases_in(stage.say("a", wanted(2)))
    ((_, reason),) = stops(stage.say("a", compared(first)))
    assert "it compared what it was to copy" in reason


def test_a_lease_that_was_never_granted_is_not_compared() -> None:
    stage = comparing()
    ((_, reason),) = stops(stage.say("a", compared(Lease(UUID, EPOCH, 9, Range(0, 512), 1.0))))
    assert "it reported lease 9, which was never granted" in reason


# -- a copy that is read back ------------------------------------------------------------------------------------------


def test_after_the_flush_all_is_compared_over_the_connections_that_are_there() -> None:
    stage, followed = reading_back()
    assert modes(followed) == [("a", "read-back")]
    assert stops(followed) == []
    assert stage.scheduler.status().phase == "verifying"
    assert stage.scheduler.status().verified == 0
    again = leases_in(stage.say("a", wanted(2)))
    assert [each.range for each in again] == [Range(0, HALF), Range(HALF, 8 * MIB)]
    assert min(each.lease for each in again) == 3  # no number is used twice
    stage.say("a", compared(again[0]))
    assert stage.scheduler.status().verified == HALF
    assert stops(stage.say("a", compared(again[1]))) == [("a", "the copy is complete")]
    stage.say("a", goodbye())
    outcome = stage.outcome
    assert (outcome.verdict, outcome.durable, outcome.counters) == (Verdict.COMPLETE, True, Counters(copied=8 * MIB))
    assert outcome.comparison is not None
    assert outcome.comparison.sizes is None


def test_a_range_that_differs_is_taken_out_of_the_journal() -> None:
    stage, followed = reading_back()
    assert Journal(durable=(Range(0, 8 * MIB),)) in followed
    first, second = leases_in(stage.say("a", wanted(2)))
    assert Journal(demoted=(first.range,)) in stage.say("a", compared(first, Range(512, 1024)))
    assert not any(isinstance(item, Journal) for item in stage.say("a", compared(second)))
    assert ended(stage, "a") == (Verdict.DIFFERENT, "source and destination differ")
    assert stage.outcome.durable


def test_late_reports_of_the_copy_are_noted_and_change_nothing() -> None:
    stage, _ = reading_back()
    late = Lease(UUID, EPOCH, 1, Range(0, HALF), 1.0)
    assert stage.say("a", written(late)) == [Send("a", messages.Noted(UUID, EPOCH, 1))]
    stage.say("a", compared(late))
    assert stage.scheduler.status().verified == 0


def test_who_was_lost_meanwhile_or_comes_late_is_told_what_is_to_be_done() -> None:
    stage, followed = reading_back(workers=2)
    assert modes(followed) == [("a", "read-back"), ("b", "read-back")]
    stage.say("a", messages.OpenFailed(UUID, EPOCH, error("connection", "the server went away")))
    stage.gone("b")
    assert modes(stage.say("c", hello("c"))) == [("c", "read-back")]
    stage.say("c", opened(DISK, DISK))
    todo = leases_in(stage.say("c", wanted(2)))
    for each in todo:
        stage.say("c", compared(each))
    assert stage.scheduler.is_complete


def test_a_failure_then_says_that_all_is_copied() -> None:
    stage, _ = reading_back()
    first, _second = leases_in(stage.say("a", wanted(2)))
    stage.say("a", failed(first, "request", "destination nbd://here: it cannot be read"))
    assert ended(stage, "a") == (
        Verdict.FAILED,
        "everything is copied, but could not be verified: destination nbd://here: it cannot be read",
    )


def test_a_worker_elsewhere_that_falls_silent_then_writes_nothing_any_more() -> None:
    stage, _ = reading_back(local=False)
    stage.say("a", wanted(2))
    stage.wait(stage.job.lease_seconds + 1)
    stage.join("b", DISK, DISK)
    for each in leases_in(stage.say("b", wanted(2))):
        stage.say("b", compared(each))
    assert ended(stage, "b") == (Verdict.COMPLETE, "")


def test_an_empty_copy_needs_no_reading_back() -> None:
    empty = server(0)
    stage = Stage(job(verify=True))
    stage.start()
    followed = stage.join("a", empty, empty)
    assert stops(followed) == [("a", "the copy is complete")]
    ended(stage, "a")
    assert stage.outcome.comparison is not None


def test_a_stop_in_the_middle_tells_what_was_found_so_far() -> None:
    stage, _ = reading_back()
    first, _second = leases_in(stage.say("a", wanted(2)))
    stage.say("a", compared(first, Range(0, 512)))
    stage.stop()
    assert ended(stage, "a")[0] is Verdict.STOPPED
    assert stage.outcome.comparison is not None
    assert stage.outcome.comparison.differing == 512
