"""The way of a job that goes well: what the scheduler says, in order."""

from __future__ import annotations

import pytest
from msgspec.structs import replace as replace_record

from nbdshard.common import messages
from nbdshard.common.errors import IllegalEvent
from nbdshard.common.limits import GIB, MIB
from nbdshard.common.messages import Counters, EndpointDescription
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Finish, Forget, Instruction, Journal, Prepare, Send, Start
from nbdshard.coordinator.job import Outcome, Verdict
from nbdshard.coordinator.planner import OFFSET_MAX
from support.schedules import (
    DESTINATION,
    DISK,
    EPOCH,
    OPTIONS,
    SOURCE,
    UUID,
    Stage,
    alive,
    flushed,
    flushes_in,
    goodbye,
    hello,
    job,
    lease,
    leases_in,
    opened,
    progress,
    server,
    stop,
    wanted,
    without_beats,
    written,
)

STREAM = EndpointDescription(peer="standard input", size=None, is_stream=True)


def assign(
    worker: str,
    connections: tuple[int, int],
    expected: tuple[EndpointDescription | None, EndpointDescription | None] = (None, None),
    lease_seconds: float = 86_400.0,
) -> Send:
    source, destination = expected
    destinations = None if destination is None else [destination]
    return Send(
        worker,
        messages.Assign(
            UUID, EPOCH, SOURCE, [DESTINATION], OPTIONS, *connections, 2.0, lease_seconds, source, destinations
        ),
    )


def copy_all(stage: Stage, worker: str, followed: list[Instruction]) -> list[Instruction]:
    """`worker` writes every lease it is given, and flushes when asked; the last instructions."""
    todo, done = leases_in(followed), []
    while todo:
        done.append(todo.pop(0))
        followed = stage.say(worker, written(done[-1]), wanted(2))
        todo += leases_in(followed)
    for flush in flushes_in(followed):
        followed = stage.say(worker, flushed(flush, *done))
    return followed


def test_one_worker_copies_flushes_and_leaves() -> None:
    stage = Stage(job())
    assert stage.start() == [Start(1)]
    assert stage.say("a", hello("a")) == [assign("a", (1, 1))]
    assert stage.say("a", opened(DISK, DISK)) == [assign("a", (2, 2))]
    assert stage.say("a", opened(DISK, DISK, (2, 2))) == []
    first, second = lease(1, 0, 4 * MIB), lease(2, 4 * MIB, 8 * MIB)
    assert stage.say("a", wanted(2)) == [Send("a", first), Send("a", second)]
    assert stage.say("a", written(first)) == [Send("a", messages.Noted(UUID, EPOCH, 1))]
    assert stage.say("a", written(second)) == [
        Send("a", messages.Noted(UUID, EPOCH, 2)),
        Send("a", messages.Flush(UUID, EPOCH, 1)),
    ]
    assert stage.scheduler.status().phase == "flushing"
    assert stage.say("a", flushed(messages.Flush(UUID, EPOCH, 1), first, second)) == [
        Journal(durable=(Range(0, 8 * MIB),)),
        stop("a", "the copy is complete"),
    ]
    outcome = Outcome(
        verdict=Verdict.COMPLETE,
        error="",
        counters=Counters(copied=8 * MIB),
        size=8 * MIB,
        durable=True,
        flush_asked=True,
        workers=1,
        source_connections=2,
        destination_connections=2,
        rings=frozenset({"epoll"}),
        unfenced=(),
        source_peer="nbd://server",
        destination_peer="nbd://server",
    )
    assert stage.say("a", goodbye()) == [Forget("a"), Finish(outcome)]
    assert stage.scheduler.outcome == outcome
    assert stage.scheduler.status().phase == "done"


def test_after_the_end_everything_is_taken_and_nothing_answered() -> None:
    stage = Stage(job())
    stage.start()
    stage.join("a", DISK, DISK)
    stage.fail("the server ended")
    stage.say("a", goodbye())
    assert stage.outcome.verdict is Verdict.FAILED
    assert stage.say("a", alive(), hello("b")) == []
    assert stage.gone("a") == stage.stop() == stage.fail("again") == stage.prepared() == []
    assert stage.unstartable("again") == stage.prepare_failed("again") == []
    assert stage.scheduler.tick(stage.now + 1000) == []
    assert stage.scheduler.deadline() == float("inf")


def test_a_job_is_started_only_once() -> None:
    stage = Stage(job())
    stage.start()
    with pytest.raises(IllegalEvent, match="job has no transition for start in state OPENING"):
        stage.start()


def test_a_distributed_job_starts_nobody() -> None:
    stage = Stage(job(local_workers=False))
    assert stage.start() == []


def test_no_flush_ends_with_what_is_written() -> None:
    stage = Stage(job(options=replace_record(OPTIONS, flush=False)))
    stage.start()
    stage.join("a", DISK, DISK)
    assert copy_all(stage, "a", stage.say("a", wanted(2)))[-1] == stop("a", "the copy is complete")
    stage.say("a", goodbye())
    assert (stage.outcome.verdict, stage.outcome.durable, stage.outcome.flush_asked) == (
        Verdict.COMPLETE,
        False,
        False,
    )


def test_a_server_without_flush_leaves_durability_unknown() -> None:
    stage = Stage(job())
    stage.start()
    stage.join("a", DISK, DISK)
    first, second = leases_in(stage.say("a", wanted(2)))
    (flush,) = flushes_in(stage.say("a", written(first), written(second)))
    assert stage.say("a", flushed(flush, first, second, durable=False)) == [stop("a", "the copy is complete")]
    stage.say("a", goodbye())
    assert (stage.outcome.verdict, stage.outcome.durable, stage.outcome.flush_asked) == (
        Verdict.COMPLETE,
        False,
        True,
    )


def test_an_empty_export_is_copied_without_a_lease() -> None:
    stage = Stage(job(workers=4))
    stage.start()
    assert stage.join("a", server(0), server(10))[-1] == stop("a", "the copy is complete")
    stage.say("a", goodbye())
    assert (stage.outcome.verdict, stage.outcome.size, stage.outcome.durable) == (Verdict.COMPLETE, 0, True)


def test_a_growing_destination_is_prepared_after_the_checks_and_before_any_lease() -> None:
    stage = Stage(job(destination_grows=True, workers=2))
    stage.start()
    big = server(GIB)
    assert stage.join("a", big, server(0))[-1] == Prepare(GIB)
    assert stage.say("a", wanted(2)) == []
    assert stage.scheduler.status().phase == "opening"
    assert stage.prepared() == [
        assign("a", (2, 2)),
        Start(1),
        Send("a", lease(1, 0, 128 * MIB)),
        Send("a", lease(2, 128 * MIB, 256 * MIB)),
    ]
    # The next worker sees the file as it was prepared.
    assert stage.say("b", hello("b")) == [assign("b", (2, 2), (big, server(GIB)))]
    assert stage.say("b", opened(big, server(GIB))) == []


def test_a_destination_that_cannot_be_prepared_fails_the_job() -> None:
    stage = Stage(job(destination_grows=True))
    stage.start()
    stage.join("a", DISK, server(0))
    assert stage.prepare_failed("/tmp/disk: no space left on device") == [
        stop("a", "the job failed: /tmp/disk: no space left on device")
    ]
    stage.say("a", goodbye())
    assert (stage.outcome.verdict, stage.outcome.error) == (
        Verdict.FAILED,
        "/tmp/disk: no space left on device",
    )


def test_prepared_is_taken_only_when_it_was_asked_for() -> None:
    stage = Stage(job())
    stage.start()
    with pytest.raises(IllegalEvent, match="prepared in state OPENING"):
        stage.prepared()
    with pytest.raises(IllegalEvent, match="prepare_failed in state OPENING"):
        stage.prepare_failed("no")
    assert stage.say("a", hello("a")) == [assign("a", (1, 1))]


def test_a_stream_is_one_lease_and_ends_where_the_worker_says() -> None:
    stage = Stage(job(destination_grows=True, workers=4))
    stage.start()
    assert stage.join("a", STREAM, server(7))[-1] == Prepare(0)
    stage.prepared()
    (whole,) = leases_in(stage.say("a", wanted(2)))
    assert whole == lease(1, 0, OFFSET_MAX, until_end=True)
    stage.say("a", progress(whole, 1000))
    assert (stage.scheduler.status().size, stage.scheduler.status().counters.total) == (None, 1000)
    (flush,) = flushes_in(stage.say("a", written(whole, end=5000)))
    stage.say("a", flushed(flush, whole), goodbye())
    assert (stage.outcome.verdict, stage.outcome.size, stage.outcome.counters.total) == (Verdict.COMPLETE, 5000, 5000)


def test_in_order_there_is_one_lease_at_a_time() -> None:
    stage = Stage(job(options=replace_record(OPTIONS, synchronous=True), range_size=4 * MIB))
    stage.start()
    stage.join("a", DISK, DISK)
    (first,) = leases_in(stage.say("a", wanted(2)))
    assert leases_in(stage.say("a", written(first))) == [lease(2, 4 * MIB, 8 * MIB)]


def test_progress_counts_leases_under_way() -> None:
    stage = Stage(job())
    stage.start()
    stage.join("a", DISK, DISK, (2, 3))
    first, _ = leases_in(stage.say("a", wanted(2)))
    stage.say("a", progress(first, 300), progress(first, 500))
    status = stage.scheduler.status()
    assert (status.size, status.counters, status.workers, status.connections, status.phase) == (
        8 * MIB,
        Counters(copied=500),
        1,
        3,
        "copying",
    )


def test_a_wish_is_replaced_by_a_newer_one_and_bounded() -> None:
    stage = Stage(job(range_size=MIB))
    stage.start()
    stage.join("a", DISK, DISK)
    assert len(leases_in(stage.say("a", wanted(100)))) == 2
    stage.say("a", wanted(0))
    assert leases_in(stage.say("a", written(lease(1, 0, MIB)))) == []
    assert len(leases_in(stage.say("a", wanted(1)))) == 1


def test_written_may_be_sent_again_and_is_noted_again() -> None:
    stage = Stage(job())
    stage.start()
    stage.join("a", DISK, DISK)
    first, _ = leases_in(stage.say("a", wanted(2)))
    noted = [Send("a", messages.Noted(UUID, EPOCH, 1))]
    assert stage.say("a", written(first)) == noted
    assert stage.say("a", written(first)) == noted
    assert stage.scheduler.status().counters.total == 4 * MIB
    assert stage.scheduler.dropped == 1


def test_heartbeats_tell_what_was_heard_last() -> None:
    """A worker counts its leases from when it said that, and we from when we heard it, which is later."""
    stage = Stage(job())
    stage.start()
    stage.say("a", hello("a"))

    def beat(answers: float) -> Send:
        return Send("a", messages.AliveToo(UUID, EPOCH, answers))

    assert stage.wait(2.0) == [beat(0.0)]
    stage.say("a", alive(77.5))
    assert stage.wait(2.0) == [beat(77.5)]
    assert stage.wait(2.0) == [beat(77.5)], "nothing new was heard: it renews nothing"
    stage.say("a", alive(79.5), alive(78.5))
    assert stage.wait(2.0) == [beat(79.5)], "one that was overtaken takes nothing back"


def test_a_lease_tells_what_was_heard_last() -> None:
    stage = Stage(job())
    stage.start()
    stage.join("a", DISK, DISK)
    stage.say("a", alive(77.5))
    (granted,) = leases_in(stage.say("a", wanted()))
    assert granted.answers == 77.5


# -- shares of connections ---------------------------------------------------------------------------------------------


def test_connections_are_shared_out_among_the_workers_that_are_useful() -> None:
    stage = Stage(job(workers=3, connections=4))
    big = server(GIB)
    stage.start()
    assert stage.say("a", hello("a")) == [assign("a", (1, 1))]
    assert stage.say("a", opened(big, big)) == [assign("a", (2, 2)), Start(2)]
    assert stage.say("b", hello("b")) == [assign("b", (1, 1), (big, big))]
    assert stage.say("c", hello("c")) == [assign("c", (1, 1), (big, big))]


def test_a_worker_too_many_stands_by_and_takes_the_share_of_one_that_left() -> None:
    stage = Stage(job(workers=2, connections=2, local_workers=False))
    big = server(GIB)
    stage.start()
    stage.join("a", big, big)
    stage.join("b", big, big)
    assert stage.say("c", hello("c")) == [assign("c", (0, 0), (big, big), 10.0)]
    assert stage.say("a", goodbye("asked to leave")) == [Forget("a"), assign("c", (1, 1), (big, big), 10.0)]


def test_others_stand_by_until_the_scout_has_opened_both_sides() -> None:
    stage = Stage(job(workers=2, connections=2, local_workers=False))
    big = server(GIB)
    stage.start()
    assert stage.say("a", hello("a")) == [assign("a", (1, 1), lease_seconds=10.0)]
    assert stage.say("b", hello("b")) == [assign("b", (0, 0), lease_seconds=10.0)]
    assert stage.say("a", opened(big, big)) == [assign("b", (1, 1), (big, big), 10.0)]


def test_a_copy_too_small_for_more_workers_gives_its_one_worker_what_is_useful() -> None:
    stage = Stage(job(workers=4, connections=4))
    stage.start()
    assert stage.say("a", hello("a")) == [assign("a", (1, 1))]
    assert stage.say("a", opened(DISK, DISK)) == [assign("a", (2, 2))]


def test_the_one_writer_gets_all_the_source_connections() -> None:
    stage = Stage(job(workers=4, connections=4))
    stage.start()
    stage.say("a", hello("a"))
    assert stage.say("a", opened(server(GIB), server(GIB, can_multi_conn=False))) == [assign("a", (4, 1))]


def test_a_hello_that_is_repeated_is_answered_again() -> None:
    stage = Stage(job())
    stage.start()
    assert stage.say("a", hello("a")) == stage.say("a", hello("a")) == [assign("a", (1, 1))]


def test_several_workers_are_each_flushed_and_counted() -> None:
    stage = Stage(job(workers=2, connections=2, range_size=4 * MIB))
    disk = server(8 * MIB)
    stage.start()
    stage.join("a", disk, disk)
    stage.say("b", hello("b", ring="io_uring"), opened(disk, disk))
    (first,) = leases_in(stage.say("a", wanted(1)))
    (second,) = leases_in(stage.say("b", wanted(1)))
    assert stage.say("a", written(first)) == [Send("a", messages.Noted(UUID, EPOCH, 1))]
    one, two = flushes_in(stage.say("b", written(second)))
    assert stage.say("a", flushed(one, first)) == []
    assert without_beats(stage.say("b", flushed(two, second))) == [
        Journal(durable=(Range(0, 8 * MIB),)),
        stop("a", "the copy is complete"),
        stop("b", "the copy is complete"),
    ]
    stage.say("a", goodbye())
    stage.say("b", goodbye())
    outcome = stage.outcome
    assert (outcome.workers, outcome.rings, outcome.source_connections) == (2, {"epoll", "io_uring"}, 2)
