"""Workers that break the control protocol are stopped, and told why; the job goes on without them."""

from __future__ import annotations

import pytest

from nbdshard.common import messages
from nbdshard.common.limits import MIB
from nbdshard.common.messages import Counters
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Forget, Kill, Start
from nbdshard.coordinator.job import Verdict
from support.schedules import (
    DISK,
    EPOCH,
    UUID,
    Stage,
    copying,
    goodbye,
    hello,
    job,
    lease,
    leases_in,
    open_failed,
    opened,
    progress,
    stops,
    streaming,
    wanted,
    without_beats,
    written,
)


def blamed(stage: Stage, *said: messages.FromWorker) -> str:
    """What "a" is stopped for when it says this; the job goes on."""
    ((worker, reason),) = stops(stage.say("a", *said))
    assert worker == "a"
    assert stage.scheduler.outcome is None
    prefix = "worker host-a/100 broke the control protocol: "
    assert reason.startswith(prefix)
    return reason.removeprefix(prefix)


def test_more_bytes_than_a_lease_has_are_not_believed() -> None:
    stage = copying()
    stage.say("a", wanted(1))
    too_much = progress(lease(1, 0, 4 * MIB), 4 * MIB + 1)
    assert blamed(stage, too_much) == "it reported 4194305 bytes of the 4194304 of a lease"


def test_a_part_of_a_lease_is_not_taken_for_all_of_it() -> None:
    stage = copying()
    stage.say("a", wanted(1))
    part = messages.Written(UUID, EPOCH, 1, Counters(copied=4 * MIB - 1))
    assert blamed(stage, part) == "it reported 4194303 of 4194304 bytes of a lease as all of it"


def test_a_lease_that_was_never_granted_is_not_taken_for_written() -> None:
    assert blamed(copying(), written(lease(7, 0, MIB))) == "it reported lease 7, which was never granted"


@pytest.mark.parametrize(
    "places",
    [
        (Range(4 * MIB, 5 * MIB),),
        (Range(4 * MIB - 512, 4 * MIB + 1),),
        (Range(1024, 2048), Range(0, 512)),
        (Range(0, 1024), Range(1024, 2048)),
        (Range(0, 1024), Range(512, 2048)),
    ],
)
def test_places_that_are_none_of_a_lease_are_not_taken(places: tuple[Range, ...]) -> None:
    stage = copying(salvage=True)
    stage.say("a", wanted(1))
    told = messages.Written(UUID, EPOCH, 1, Counters(copied=4 * MIB), None, places)
    assert blamed(stage, told) == "it told of unreadable places that are none of its lease's"


def test_nothing_is_unreadable_where_nothing_is_to_be_salvaged() -> None:
    stage = copying()
    stage.say("a", wanted(1))
    told = messages.Written(UUID, EPOCH, 1, Counters(copied=4 * MIB), None, (Range(0, 512),))
    assert blamed(stage, told) == "it told of unreadable places that are none of its lease's"


def test_a_stream_s_end_must_be_told() -> None:
    stage, granted = streaming()
    assert blamed(stage, written(granted)) == "it did not tell where the stream ended"


def test_connections_nobody_gave_are_not_taken() -> None:
    stage = Stage(job(local_workers=False))
    stage.start()
    stage.say("x", hello("x"))
    stage.say("a", hello("a"))
    assert blamed(stage, opened(DISK, DISK)) == "it opened 1 and 1 connections"


def test_a_worker_with_a_connection_to_one_side_only_is_not_ready() -> None:
    stage = Stage(job())
    stage.start()
    stage.say("a", hello("a"))
    assert blamed(stage, opened(DISK, DISK, (1, 0))) == "it opened 1 and 0 connections"


def test_a_failure_to_open_what_was_not_given_is_not_taken() -> None:
    stage = Stage(job(local_workers=False))
    stage.start()
    stage.say("x", hello("x"))
    stage.say("a", hello("a"))
    assert blamed(stage, open_failed("no")) == "it was given no connections, and failed to open some"


def test_reports_before_opening_are_not_taken() -> None:
    stage = Stage(job())
    stage.start()
    stage.say("a", hello("a"))
    assert blamed(stage, written(lease(1, 0, MIB))) == "it sent Written while JOINING"


def test_a_second_hello_as_somebody_else_is_not_taken() -> None:
    assert blamed(copying(), hello("a", pid=999)) == "it said Hello a second time, as somebody else"


def test_a_worker_that_broke_the_protocol_is_replaced_when_it_has_left() -> None:
    stage = copying()
    stage.say("a", wanted(2))
    blamed(stage, hello("a", pid=999))
    assert stage.say("a", goodbye()) == [Forget("a"), Start(1)]


def test_a_worker_that_does_not_leave_is_killed() -> None:
    stage = copying()
    blamed(stage, hello("a", pid=999))
    assert without_beats(stage.wait(10.0, "a")) == [Kill("a")]
    assert stage.gone("a") == [Forget("a"), Start(1)]


def test_a_remote_worker_that_does_not_leave_loses_its_ranges_and_is_remembered() -> None:
    stage = copying(2, local=False)
    stage.say("a", wanted(2))
    stage.say("b", wanted(2))
    stage.say("a", hello("a", pid=999))
    assert len(leases_in(stage.wait(10.0, "a", "b"))) == 2
    stage.stop()
    stage.say("b", goodbye())
    stage.wait(10.0)
    assert stage.outcome.verdict is Verdict.UNFENCED
