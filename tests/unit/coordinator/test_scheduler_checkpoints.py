"""Checkpoints: when written ranges are flushed while the copy runs, and what goes to the journal, and when."""

from __future__ import annotations

from msgspec.structs import replace

from nbdshard.common import messages
from nbdshard.common.limits import CHECKPOINT_ASKS_PER_TICK_MAX, CHECKPOINT_SECONDS, MIB, RETURNS_PER_RANGE
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Finish, Instruction, Journal, Send
from nbdshard.coordinator.job import Verdict
from support.schedules import (
    OPTIONS,
    Stage,
    ended,
    error,
    flushed,
    flushes_in,
    job,
    lease,
    leases_in,
    open_failed,
    server,
    stops,
    wanted,
    written,
)

UNIT = 4 * MIB
DISK = server(64 * UNIT)
LATER = CHECKPOINT_SECONDS + 0.1


def copying(
    workers: int = 1, disk: EndpointDescription = DISK, **changes: object
) -> tuple[Stage, list[messages.Lease]]:
    """Workers "a", "b", ... of another machine, which hold a lease of one unit each."""
    stage = Stage(job(workers=workers, connections=workers, range_size=UNIT, local_workers=False, **changes))
    stage.start()
    leases = []
    for name in "abcdefgh"[:workers]:
        stage.join(name, disk, disk)
        leases += leases_in(stage.say(name, wanted(1)))
    return stage, leases


def units(first: int, end: int) -> tuple[Range, ...]:
    return (Range(first * UNIT, end * UNIT),)


def journals(followed: list[Instruction]) -> list[Journal]:
    return [item for item in followed if isinstance(item, Journal)]


def asked(followed: list[Instruction]) -> list[str]:
    """Who was asked to flush."""
    return [item.worker for item in followed if isinstance(item, Send) and isinstance(item.message, messages.Flush)]


# -- when --------------------------------------------------------------------------------------------------------------


def test_what_was_written_is_flushed_some_seconds_later() -> None:
    stage, (first,) = copying()
    stage.say("a", written(first))
    assert flushes_in(stage.wait(CHECKPOINT_SECONDS - 0.1, "a")) == []
    (flush,) = flushes_in(stage.wait(0.2, "a"))
    assert stage.scheduler.status().phase == "copying"
    assert journals(stage.say("a", flushed(flush, first))) == [Journal(durable=units(0, 1))]


def test_nobody_is_asked_to_flush_who_wrote_nothing_since() -> None:
    stage, (first, _) = copying(2)
    assert asked(stage.wait(3 * LATER, "a", "b")) == []
    stage.say("a", written(first))
    followed = stage.wait(LATER, "a", "b")
    assert asked(followed) == ["a"]
    stage.say("a", flushed(*flushes_in(followed), first))
    assert asked(stage.wait(3 * LATER, "a", "b")) == []


def test_the_clock_runs_from_the_first_lease_that_no_flush_covers() -> None:
    stage, (first, second) = copying(2)
    stage.say("a", written(first))
    stage.wait(CHECKPOINT_SECONDS - 0.1, "a", "b")
    stage.say("b", written(second))
    assert asked(stage.wait(0.2, "a", "b")) == ["a", "b"]


def test_enough_bytes_are_flushed_at_once() -> None:
    stage, (first, second) = copying(2, checkpoint_bytes=2 * UNIT)
    assert flushes_in(stage.say("a", written(first))) == []
    stage.say("b", written(second))
    assert stage.scheduler.deadline() <= stage.now
    assert asked(stage.wait(0.001)) == ["a", "b"]


def test_a_worker_has_one_flush_to_answer_at_a_time() -> None:
    stage, (first,) = copying()
    stage.say("a", written(first))
    (flush,) = flushes_in(stage.wait(LATER, "a"))
    (second,) = leases_in(stage.say("a", wanted(1)))
    stage.say("a", written(second))
    assert asked(stage.wait(2 * LATER, "a")) == []
    stage.say("a", flushed(flush, first))
    assert asked(stage.wait(LATER, "a")) == ["a"]


def test_a_large_crew_is_asked_in_turns() -> None:
    count = CHECKPOINT_ASKS_PER_TICK_MAX + 10
    disk = server(4 * count * UNIT)
    stage = Stage(job(workers=count, connections=count, range_size=UNIT, local_workers=False, lease_seconds=60.0))
    stage.start()
    for number in range(count):
        stage.join(f"w{number}", disk, disk)
        (granted,) = leases_in(stage.say(f"w{number}", wanted(1)))
        stage.say(f"w{number}", written(granted))
    now = stage.now + LATER
    sizes = [len(flushes_in(stage.scheduler.tick(now))) for _ in range(3)]
    assert sizes == [CHECKPOINT_ASKS_PER_TICK_MAX, 10, 0]


def test_without_flush_there_are_no_checkpoints() -> None:
    stage, (first,) = copying(options=replace(OPTIONS, flush=False))
    followed = stage.say("a", written(first)) + stage.wait(3 * LATER, "a")
    assert (asked(followed), journals(followed)) == ([], [])


def test_a_server_that_cannot_flush_is_asked_only_at_the_end() -> None:
    stage, (first,) = copying(disk=server(UNIT, can_flush=False))
    (flush,) = flushes_in(stage.say("a", written(first)))
    followed = stage.say("a", flushed(flush, durable=False))
    assert journals(followed) == [], "durability is unknown: a resume copies it again"
    assert ended(stage, "a") == (Verdict.COMPLETE, "")

    stage, (first,) = copying(disk=server(64 * UNIT, can_flush=False))
    stage.say("a", written(first))
    assert asked(stage.wait(3 * LATER, "a")) == []


# -- what goes to the journal ------------------------------------------------------------------------------------------


def test_the_journal_is_written_before_the_job_ends() -> None:
    stage, leases = copying(2, server(2 * UNIT))
    first, second = leases
    one, two = flushes_in(stage.say("a", written(first)) + stage.say("b", written(second)))
    followed = stage.say("a", flushed(one, first)) + stage.say("b", flushed(two, second))
    kinds = [type(item) for item in followed]
    assert kinds == [Journal, Send, Send]
    assert followed[0] == Journal(durable=units(0, 2))


def test_a_range_is_journaled_only_when_every_flush_sent_before_is_answered() -> None:
    """Else a coordinator that dies before it hears that the older flush failed would resume from a lie."""
    stage, (first, second) = copying(2)
    stage.say("a", written(first))
    stage.say("b", written(second))
    one, two = flushes_in(stage.wait(LATER, "a", "b"))
    assert journals(stage.say("b", flushed(two, second))) == []
    assert journals(stage.say("a", flushed(one, first))) == [Journal(durable=units(0, 2))]


def test_a_flush_that_is_sent_after_the_answer_holds_nothing_up() -> None:
    stage, (first, second) = copying(2)
    stage.say("a", written(first))
    stage.say("b", written(second))
    one, two = flushes_in(stage.wait(LATER, "a", "b"))
    stage.say("b", flushed(two, second))
    (third,) = leases_in(stage.say("b", wanted(1)))
    stage.say("b", written(third))
    (three,) = flushes_in(stage.wait(LATER, "a", "b"))
    assert journals(stage.say("a", flushed(one, first))) == [Journal(durable=units(1, 2))]
    assert journals(stage.say("b", flushed(three, third))) == [Journal(durable=(*units(0, 1), *units(2, 3)))]


# -- flushes that fail, and flushes that are lost ----------------------------------------------------------------------


def in_flight() -> tuple[Stage, list[messages.Lease], messages.Flush]:
    """Two workers: the flush of "a" has no answer, that of "b" covered the second unit; "b" writes on."""
    stage, leases = copying(2)
    stage.say("a", written(leases[0]))
    stage.say("b", written(leases[1]))
    one, two = flushes_in(stage.wait(LATER, "a", "b"))
    stage.say("b", flushed(two, leases[1]))
    leases += leases_in(stage.say("b", wanted(1)))
    stage.say("b", written(leases[2]))
    leases += leases_in(stage.say("b", wanted(1)))
    return stage, leases, one


def test_a_flush_that_fails_takes_back_what_was_covered_since_it_was_sent_before_the_job_fails() -> None:
    stage, (first, *_), one = in_flight()
    line = "destination nbd://b: flush failed: EIO; what was written may be lost"
    followed = stage.say("a", flushed(one, first, durable=False, failure=error("request", line)))
    assert followed[0] == Journal(demoted=units(1, 2))
    assert [name for name, _ in stops(followed[1:])] == ["a", "b"]
    followed = stage.say("b", written(lease(4, 3 * UNIT, 4 * UNIT)))
    assert journals(followed) == flushes_in(followed) == []
    assert ended(stage, "a", "b") == (Verdict.FAILED, line)


def test_a_flush_whose_worker_is_lost_may_have_failed_so_everybody_s_written_ranges_are_copied_again() -> None:
    stage, (first, second, third, fourth), _ = in_flight()
    followed = stage.say("a", open_failed("destination nbd://b: connection reset by peer"))
    assert journals(followed) == [Journal(demoted=units(1, 2))]
    assert stage.scheduler.status().counters.total == 0
    again = leases_in(stage.say("b", wanted(1)))
    assert [item.range for item in again] == [first.range]
    stage.say("b", written(again[0]))
    # Part of the lease under way was written before that flush was lost: no later flush can vouch for it.
    stage.say("b", written(fourth))
    assert stage.scheduler.status().counters.total == first.range.length
    for expected in (second, third, fourth):
        (granted,) = leases_in(stage.say("b", wanted(1)))
        assert granted.range == expected.range
        stage.say("b", written(granted))
    (flush,) = flushes_in(stage.wait(LATER, "b"))
    everything = [item for item in stage.sent["b"] if isinstance(item, messages.Lease)]
    assert journals(stage.say("b", flushed(flush, *everything))) == [Journal(durable=units(0, 4))]


def test_a_flush_on_a_connection_that_was_lost_is_no_failure_of_the_job() -> None:
    stage, (first, *_), one = in_flight()
    line = "destination nbd://b: connection lost while flushing"
    followed = stage.say("a", flushed(one, first, durable=False, failure=error("connection", line)))
    assert journals(followed) == [Journal(demoted=units(1, 2))]
    assert stage.scheduler.outcome is None and not any(isinstance(item, Finish) for item in followed)
    assert [item.range for item in leases_in(stage.say("a", wanted(1)))] == [first.range]


def test_flushes_that_are_lost_for_ever_fail_the_job() -> None:
    stage, (first,) = copying(1, server(UNIT))
    for _ in range(RETURNS_PER_RANGE):
        (flush,) = flushes_in(stage.say("a", written(first)))
        line = "destination nbd://b: connection lost while flushing"
        (first,) = leases_in(stage.say("a", flushed(flush, failure=error("connection", line)), wanted(1))) or [first]
    verdict, text = ended(stage, "a")
    assert (verdict, text) == (
        Verdict.FAILED,
        f"the range of {MIB} bytes at offset 0 was lost {RETURNS_PER_RANGE} times: {line}",
    )
