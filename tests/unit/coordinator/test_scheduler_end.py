"""The way out: stopped by the user, failed by the shell, complete; who is waited for, and for how long."""

from __future__ import annotations

from nbdshard.common import messages
from nbdshard.common.messages import Counters
from nbdshard.coordinator.instructions import Finish, Forget, Kill, Send, Start
from nbdshard.coordinator.job import Verdict
from support.schedules import (
    DISK,
    EPOCH,
    UUID,
    Stage,
    alive,
    flushed,
    flushes_in,
    goodbye,
    hello,
    job,
    leases_in,
    opened,
    progress,
    server,
    stop,
    wanted,
    without_beats,
    written,
)


def at_work(*, local: bool = True) -> Stage:
    """One worker holds two leases of 4 MiB, 1000 bytes of the first are done."""
    stage = Stage(job(local_workers=local))
    stage.start()
    stage.join("a", DISK, DISK)
    first, _ = leases_in(stage.say("a", wanted(2)))
    stage.say("a", progress(first, 1000))
    return stage


def test_a_user_s_stop_drains_and_tells_how_far_it_got() -> None:
    stage = at_work()
    assert stage.stop() == [stop("a", "stopped by SIGINT")]
    assert stage.scheduler.status().phase == "stopping"
    *_, finish = stage.say("a", goodbye())
    assert isinstance(finish, Finish)
    assert (finish.outcome.verdict, finish.outcome.error) == (
        Verdict.STOPPED,
        "stopped after 1000 of 8388608 bytes",
    )
    assert finish.outcome.counters == Counters(copied=1000)


def test_a_stop_before_anything_is_open_ends_at_once() -> None:
    stage = Stage(job())
    stage.start()
    assert isinstance(stage.stop()[0], Finish)
    assert (stage.outcome.verdict, stage.outcome.error) == (Verdict.STOPPED, "stopped after 0 bytes")


def test_a_second_stop_does_not_wait_for_the_wire() -> None:
    stage = at_work()
    stage.stop()
    assert stage.stop() == [stop("a", "stopped by SIGINT", now=True)]
    assert stage.stop() == [], "a third one changes nothing"
    assert without_beats(stage.wait(1.0)) == [Kill("a")]
    stage.gone("a")
    assert stage.outcome.verdict is Verdict.STOPPED


def test_a_stop_while_a_complete_job_drains_hurries_it_and_spoils_nothing() -> None:
    stage = at_work()
    leases = [messages.Lease(UUID, EPOCH, n + 1, piece.range, 10.0) for n, piece in enumerate(held(stage))]
    (flush,) = flushes_in(stage.say("a", *[written(piece) for piece in leases]))
    stage.say("a", flushed(flush, *leases))
    assert stage.stop() == [stop("a", "stopped by SIGINT", now=True)]
    stage.say("a", goodbye())
    assert (stage.outcome.verdict, stage.outcome.error) == (Verdict.COMPLETE, "")


def held(stage: Stage) -> list[messages.Lease]:
    return [message for message in stage.sent["a"] if isinstance(message, messages.Lease)]


def test_a_worker_that_does_not_drain_is_killed() -> None:
    stage = at_work()
    stage.stop()
    assert without_beats(stage.wait(9.9, "a")) == []
    assert without_beats(stage.wait(0.2, "a")) == [Kill("a")]
    assert stage.gone("a")[0] == Forget("a")
    assert (stage.outcome.verdict, stage.outcome.unfenced) == (Verdict.STOPPED, ())


def test_a_remote_worker_that_does_not_drain_is_named() -> None:
    stage = at_work(local=False)
    stage.stop()
    stage.wait(10.0, "a")
    assert (stage.outcome.verdict, stage.outcome.error, stage.outcome.unfenced) == (
        Verdict.UNFENCED,
        "stopped after 1000 of 8388608 bytes; host-a/100 was not heard to close its connections and may still write "
        "to the destination",
        ("host-a/100",),
    )


def test_a_worker_that_dies_while_it_drains_is_not_replaced() -> None:
    stage = at_work()
    stage.stop()
    forget, finish = stage.gone("a")
    assert forget == Forget("a")
    assert isinstance(finish, Finish)


def test_a_lease_that_is_written_while_the_job_drains_is_noted() -> None:
    stage = at_work()
    stage.stop()
    first, _ = held(stage)
    assert stage.say("a", written(first)) == [Send("a", messages.Noted(UUID, EPOCH, 1))]
    assert stage.say("a", wanted(2), opened(DISK, DISK), alive()) == []


def test_what_the_shell_cannot_go_on_from_fails_the_job_in_one_line() -> None:
    stage = at_work()
    assert stage.fail("the server of the source\nexited with status 1") == [
        stop("a", "the job failed: the server of the source exited with status 1")
    ]
    stage.fail("something else")
    stage.say("a", goodbye())
    assert (stage.outcome.verdict, stage.outcome.error) == (
        Verdict.FAILED,
        "the server of the source exited with status 1",
    )


def test_prepared_may_come_after_a_stop() -> None:
    stage = Stage(job(destination_grows=True))
    stage.start()
    stage.join("a", DISK, server(0))
    stage.stop()
    assert stage.prepared() == []
    stage.say("a", goodbye())
    assert stage.outcome.verdict is Verdict.STOPPED


def test_a_worker_that_says_goodbye_by_itself_is_replaced_and_its_process_not_counted_twice() -> None:
    stage = at_work()
    assert stage.say("a", goodbye("asked to leave")) == [Forget("a"), Start(1)]
    assert stage.gone("a", "exited with status 0") == []
    stage.say("b", hello("b"))
    assert stage.scheduler.status().workers == 0


def test_workers_that_leave_before_they_opened_anything_are_tried_three_times() -> None:
    stage = Stage(job())
    stage.start()
    for name in ("a", "b", "c"):
        stage.say(name, hello(name), goodbye("no ring can be had"))
    assert (stage.outcome.verdict, stage.outcome.error) == (
        Verdict.FAILED,
        "worker host-c/100 left: no ring can be had",
    )
