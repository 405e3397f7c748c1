"""Remote workers cannot be killed: leases that expire, the writer's role, and who may still write at the end."""

from __future__ import annotations

from nbdshard.common import messages
from nbdshard.common.limits import (
    GIB,
)
from nbdshard.coordinator.instructions import Forget, Instruction, Send
from nbdshard.coordinator.job import Verdict
from support.schedules import (
    BIG,
    DISK,
    EPOCH,
    UUID,
    Stage,
    copying,
    ended,
    flushed,
    flushes_in,
    goodbye,
    hello,
    job,
    lease,
    leases_in,
    server,
    stops,
    wanted,
    without_beats,
    written,
)

# -- remote workers ----------------------------------------------------------------------------------------------------


def test_a_silent_remote_worker_loses_its_leases_and_is_told_to_stop() -> None:
    stage = copying(2, local=False)
    (first,) = leases_in(stage.say("a", wanted(1)))
    stage.say("b", wanted(2))
    followed = without_beats(stage.wait(10.0, "b"))
    assert followed == [
        Send("a", messages.Stop(UUID, EPOCH, "worker host-a/100 was not heard of for 10 s", now=True)),
        Send("b", lease(3, first.range.start, first.range.end, 10.0)),
    ]
    # Whatever it says now, it is told again; only its Goodbye counts.
    (again,) = stage.say("a", written(first))
    assert again == Send("a", messages.Stop(UUID, EPOCH, "its lease has expired", now=True))
    assert stage.say("a", goodbye()) == [Forget("a")]


def finish_without(stage: Stage, worker: str) -> None:
    """`worker` copies everything that is left, flushes and leaves."""
    todo = [message for message in stage.sent[worker] if isinstance(message, messages.Lease)]
    done, followed = [], list[Instruction]()
    while todo:
        done.append(todo.pop(0))
        followed = stage.say(worker, written(done[-1]), wanted(2))
        todo += leases_in(followed)
    for flush in flushes_in(followed):
        stage.say(worker, flushed(flush, *done))
    stage.say(worker, goodbye())


def test_a_remote_lease_holder_that_is_never_heard_again_makes_the_end_unfenced() -> None:
    stage = copying(2, local=False)
    stage.say("a", wanted(1))
    stage.say("b", wanted(2))
    stage.wait(10.0, "b")
    finish_without(stage, "b")
    assert stage.outcomes == [], "it may yet say Goodbye"
    stage.wait(10.0)
    assert ended(stage) == (
        Verdict.UNFENCED,
        "every byte was copied, but host-a/100 was not heard to close its connections and may still write to the "
        "destination",
    )
    assert (stage.outcome.unfenced, stage.outcome.durable) == (("host-a/100",), True)


def test_a_goodbye_at_the_last_moment_is_a_good_end() -> None:
    stage = copying(2, local=False)
    stage.say("a", wanted(1))
    stage.say("b", wanted(2))
    stage.wait(10.0, "b")
    finish_without(stage, "b")
    stage.wait(5.0)
    assert ended(stage, "a") == (Verdict.COMPLETE, "")


def test_a_remote_worker_without_a_lease_is_not_waited_for() -> None:
    stage = copying(2, local=False, disk=BIG)
    stage.wait(10.0, "b")
    assert stage.scheduler.status().workers == 1
    stage.stop()
    assert ended(stage, "b")[0] is Verdict.STOPPED


def test_a_job_that_nobody_works_on_gives_up() -> None:
    stage = Stage(job(local_workers=False))
    stage.start()
    stage.wait(300.0)
    assert ended(stage) == (Verdict.FAILED, "no worker has joined for 300 s")


def test_a_job_that_was_left_by_everybody_waits_for_others_and_gives_up() -> None:
    stage = copying(local=False)
    stage.say("a", goodbye("asked to leave"))
    stage.wait(299.0)
    assert stage.outcomes == []
    stage.wait(1.0)
    assert ended(stage) == (Verdict.FAILED, "no worker has been connected for 300 s")


def test_a_job_that_was_left_by_everybody_goes_on_with_whoever_comes() -> None:
    stage = copying(local=False)
    (first,) = leases_in(stage.say("a", wanted(1)))
    stage.say("a", goodbye("asked to leave"))
    stage.wait(250.0)
    stage.join("b", DISK, DISK)
    assert leases_in(stage.say("b", wanted(1))) == [lease(2, first.range.start, first.range.end, 10.0)]


def test_a_job_without_a_completed_byte_gives_up() -> None:
    stage = copying()
    stage.say("a", wanted(2))
    stage.wait(1075.0, "a")
    assert ended(stage, "a") == (Verdict.FAILED, "no byte was completed for 1075 s")


# -- one writer --------------------------------------------------------------------------------------------------------


def test_the_writer_s_role_moves_only_when_it_is_known_gone() -> None:
    stage = Stage(job(workers=2, connections=2, local_workers=False))
    stage.start()
    target = server(GIB, can_multi_conn=False)
    stage.join("a", BIG, target)
    stage.say("b", hello("b"))
    stage.say("a", wanted(1))
    stage.wait(60.0, "b")
    assert stage.scheduler.status().workers == 0
    forget, assign = stage.say("a", goodbye())
    assert forget == Forget("a")
    assert isinstance(assign, Send)
    assert isinstance(assign.message, messages.Assign)
    assert (assign.worker, assign.message.source_connections, assign.message.destination_connections) == ("b", 2, 1)


def test_a_second_connection_to_a_server_for_one_ends_the_worker() -> None:
    stage = Stage(job(local_workers=False))
    stage.start()
    followed = stage.join("a", BIG, server(GIB, can_multi_conn=False), (2, 2))
    line = "worker host-a/100 broke the control protocol: it opened 2 connections to nbd://server, which takes one only"
    assert stops(followed) == [("a", line)]
