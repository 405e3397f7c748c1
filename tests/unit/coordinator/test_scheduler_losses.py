"""Workers that are refused, fail or die; and what becomes of their ranges."""

from __future__ import annotations

import pytest

from nbdshard.common import messages
from nbdshard.common.limits import (
    ATTEMPTS_PER_RANGE,
    GIB,
    MIB,
    RETURNS_PER_RANGE,
    WORKER_REPLACEMENTS_MAX,
    WORKERS_MAX,
)
from nbdshard.common.messages import PROTOCOL_VERSION as VERSION
from nbdshard.common.messages import Counters, EndpointAddress
from nbdshard.coordinator.instructions import Forget, Kill, Prepare, Send, Start
from nbdshard.coordinator.job import Verdict
from support.schedules import (
    BIG,
    DISK,
    EPOCH,
    UUID,
    Stage,
    alive,
    copying,
    ended,
    failed,
    goodbye,
    hello,
    job,
    lease,
    leases_in,
    open_failed,
    opened,
    progress,
    server,
    stops,
    wanted,
    without_beats,
    written,
)

# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_worker_of_another_version_is_refused_and_the_others_go_on() -> None:
    stage = copying(local=False)
    reason = f"the worker speaks version 9 of the control protocol, the coordinator version {VERSION}"
    assert stage.say("x", hello("x", version=9)) == [Send("x", messages.Refused(VERSION, reason)), Forget("x")]
    assert stage.scheduler.take_notes() == [f"worker host-x/100 was refused: {reason}"]
    assert stage.scheduler.take_notes() == []
    assert stage.scheduler.status().workers == 1


def test_a_local_worker_of_another_version_fails_the_job() -> None:
    stage = Stage(job())
    stage.start()
    stage.say("a", hello("a", version=9))
    stage.gone("a", "exited with status 1")
    assert ended(stage) == (
        Verdict.FAILED,
        f"the worker speaks version 9 of the control protocol, the coordinator version {VERSION}",
    )


def test_a_worker_elsewhere_is_refused_a_local_file() -> None:
    stage = Stage(job(local_workers=False, source=EndpointAddress("file", "/disk")))
    stage.start()
    refused, forgotten = stage.say("x", hello("x", machine="there"))
    assert isinstance(refused, Send)
    assert isinstance(refused.message, messages.Refused)
    assert forgotten == Forget("x")


def test_there_is_a_most_of_workers() -> None:
    stage = Stage(job(local_workers=False))
    stage.start()
    for number in range(WORKERS_MAX):
        stage.scheduler.message(f"w{number}", hello(f"w{number}"), stage.now)
    refused, _ = stage.say("x", hello("x"))
    assert isinstance(refused, Send)
    assert refused.message == messages.Refused(VERSION, f"the job has {WORKERS_MAX} workers already")


def test_a_worker_that_comes_when_the_job_is_over_is_sent_away() -> None:
    stage = copying(local=False)
    stage.stop()
    assign, stop, forget = stage.say("x", hello("x"))
    assert isinstance(assign, Send)
    assert isinstance(assign.message, messages.Assign)
    assert assign.message.source_connections == 0
    assert (stop, forget) == (Send("x", messages.Stop(UUID, EPOCH, "stopped by SIGINT")), Forget("x"))


# -- opening fails -----------------------------------------------------------------------------------------------------


def test_a_copy_that_cannot_be_done_fails_before_anything_is_prepared() -> None:
    stage = Stage(job())
    stage.start()
    followed = stage.join("a", server(100), server(99))
    line = "nbd://server: the destination is smaller than the source: 99 bytes, 100 are needed"
    assert not any(isinstance(item, Prepare) for item in followed)
    assert stops(followed) == [("a", f"the job failed: {line}")]
    assert ended(stage, "a") == (Verdict.FAILED, line)


def test_a_first_worker_that_cannot_open_fails_the_job_with_its_line() -> None:
    stage = Stage(job(workers=4))
    stage.start()
    stage.say("a", hello("a"), open_failed("destination nbd://b: connection refused"))
    assert ended(stage, "a") == (Verdict.FAILED, "destination nbd://b: connection refused")
    assert (stage.outcome.size, stage.outcome.source_peer) == (None, "nbd://source.example/disk")


def test_a_later_worker_that_cannot_open_is_stopped_and_not_replaced() -> None:
    stage = copying(2, disk=BIG)
    stage.say("b", goodbye("asked to leave"))
    stage.say("c", hello("c"))
    followed = stage.say("c", open_failed("source nbd://a: no answer within 10 s"))
    assert stops(followed) == [("c", "source nbd://a: no answer within 10 s")]
    assert stage.say("c", goodbye()) == [Forget("c")]
    assert stage.gone("c", "exited with status 0") == []
    assert stage.scheduler.outcome is None


def test_a_worker_that_finds_another_disk_is_stopped_and_the_others_go_on() -> None:
    stage = copying(2, local=False, disk=BIG)
    stage.say("b", goodbye("asked to leave"))
    followed = stage.join("c", BIG, server(GIB + 1))
    line = "worker host-c/100: another destination was found: size 1073741825 instead of 1073741824"
    assert stops(followed) == [("c", line)]
    assert stage.scheduler.outcome is None
    assert line in stage.scheduler.take_notes()


def test_a_worker_that_finds_another_disk_after_a_reconnect_fails_the_job_if_it_is_the_last() -> None:
    stage = copying(local=False)
    stage.say("a", opened(server(9 * MIB), DISK))
    assert ended(stage, "a") == (
        Verdict.FAILED,
        "worker host-a/100: another source was found: size 9437184 instead of 8388608",
    )


def test_a_worker_that_never_opens_does_not_delay_the_end() -> None:
    stage = Stage(job(workers=2, connections=2))
    stage.start()
    stage.join("a", BIG, BIG)
    stage.say("b", hello("b"))
    stage.stop()
    stage.say("a", goodbye())
    assert without_beats(stage.wait(1.0)) == [Kill("b")]
    stage.gone("b")
    assert stage.outcome.verdict is Verdict.STOPPED


def test_a_first_worker_that_opens_nothing_for_long_fails_the_job() -> None:
    stage = Stage(job())
    stage.start()
    stage.say("a", hello("a"))
    stage.wait(120.0, "a")
    assert ended(stage, "a") == (Verdict.FAILED, "worker host-a/100 did not open both sides within 120 s")


# -- leases fail -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["request", "user", "protocol", "bug"])
def test_a_failure_the_worker_could_not_mend_fails_the_job_with_its_line(kind: str) -> None:
    stage = copying()
    first, _ = leases_in(stage.say("a", wanted(2)))
    line = "source nbd://a: read of 512 bytes at offset 0 failed 5 times: EIO"
    stage.say("a", progress(first, 100), failed(first, kind, line))
    assert ended(stage, "a") == (Verdict.FAILED, line)
    assert stage.outcome.counters.total == 0, "nothing of a failed lease counts"


def test_a_range_lost_with_a_connection_goes_to_the_next_who_asks() -> None:
    stage = copying(2)
    (first,) = leases_in(stage.say("a", wanted(1)))
    stage.say("a", progress(first, 100), failed(first, "connection", "connection reset by peer"))
    assert stage.scheduler.status().counters == Counters()
    assert leases_in(stage.say("b", wanted(2))) == [lease(2, 0, 2 * MIB), lease(3, 2 * MIB, 4 * MIB)]


def test_reports_under_an_old_lease_are_ignored() -> None:
    stage = copying(2)
    (first,) = leases_in(stage.say("a", wanted(1)))
    stage.say("a", failed(first, "connection", "reset"))
    stage.say("b", wanted(1))
    stage.say("a", progress(first, 100), failed(first, "request", "EIO"), written(first))
    assert stage.scheduler.status().counters == Counters()
    assert stage.scheduler.dropped == 3
    assert stage.scheduler.outcome is None


def test_a_range_that_comes_back_for_ever_fails_the_job() -> None:
    stage = copying()
    for _ in range(RETURNS_PER_RANGE):
        (granted,) = leases_in(stage.say("a", wanted(1)))
        stage.say("a", failed(granted, "connection", "destination nbd://b: connection reset by peer"))
    assert ended(stage, "a") == (
        Verdict.FAILED,
        "destination nbd://b: connection reset by peer (16 times for the range of 1048576 bytes at offset 0)",
    )


def test_the_last_worker_to_lose_its_connections_fails_the_job_with_its_line() -> None:
    stage = copying(2, disk=BIG)
    stage.say("a", open_failed("source nbd://a: connection reset by peer"))
    assert stage.scheduler.outcome is None
    stage.say("b", open_failed("source nbd://a: connection lost"))
    assert ended(stage, "a", "b") == (Verdict.FAILED, "source nbd://a: connection lost")


def test_what_was_written_and_not_flushed_is_lost_with_the_connections() -> None:
    stage = copying(2)
    first, _ = leases_in(stage.say("a", wanted(2)))
    stage.say("a", written(first))
    followed = stage.say("b", wanted(2)) + stage.say("a", open_failed("connection reset by peer"))
    assert [granted.range for granted in leases_in(followed)] == [
        lease(3, 0, 4 * MIB).range,
        lease(4, 4 * MIB, 6 * MIB).range,  # in halves: there was not the time for all of it
    ]


# -- local processes ---------------------------------------------------------------------------------------------------


def test_a_local_worker_that_dies_is_replaced_and_its_ranges_copied_again() -> None:
    stage = copying(2)
    first, second = leases_in(stage.say("a", wanted(2)))
    stage.say("a", written(first))
    assert stage.gone("a") == [Forget("a"), Start(1)]
    assert leases_in(stage.say("b", wanted(2))) == [
        lease(3, first.range.start, first.range.end),
        lease(4, second.range.start, second.range.end),
    ]


def test_processes_that_end_before_their_hello_are_tried_three_times() -> None:
    stage = Stage(job())
    stage.start()
    assert stage.unstartable("worker w1 (process 7) exited with status 1") == [Start(1)]
    assert stage.unstartable("worker w2 (process 8) exited with status 1") == [Start(1)]
    stage.unstartable("worker w3 (process 9) exited with status 1")
    assert ended(stage) == (
        Verdict.FAILED,
        "no worker could be started: worker w3 (process 9) exited with status 1",
    )


def test_a_process_that_is_reaped_before_its_hello_is_unstartable_too() -> None:
    stage = Stage(job())
    stage.start()
    assert stage.gone("w1", "exited with status 1") == [Start(1)]


def test_workers_that_end_before_they_opened_anything_are_tried_three_times() -> None:
    stage = Stage(job())
    stage.start()
    for name in ("a", "b", "c"):
        stage.say(name, hello(name))
        stage.gone(name)
    assert ended(stage) == (
        Verdict.FAILED,
        "worker host-c/100 ended before it opened both sides: killed by SIGKILL",
    )


def test_an_unstartable_worker_is_only_a_note_while_another_works() -> None:
    stage = Stage(job(workers=2, connections=2))
    stage.start()
    stage.join("a", BIG, BIG)
    for _ in range(3):
        stage.unstartable("fork: resource temporarily unavailable")
    assert stage.scheduler.outcome is None
    assert stage.scheduler.take_notes() == ["fork: resource temporarily unavailable"] * 3


def test_a_range_that_ends_three_workers_fails_the_job() -> None:
    stage = copying()
    for number, name in enumerate("abc"):
        if number:
            stage.join(name, DISK, DISK)
        stage.say(name, wanted(1))
        stage.gone(name, "killed by SIGSEGV")
    assert ATTEMPTS_PER_RANGE == 3
    assert ended(stage) == (
        Verdict.FAILED,
        "the range of 4194304 bytes at offset 0 was lost 3 times: worker host-c/100 ended: killed by SIGSEGV",
    )


def test_replacements_are_bounded() -> None:
    stage = copying()
    for number in range(WORKER_REPLACEMENTS_MAX):
        stage.gone("a" if number == 0 else f"r{number - 1}")
        stage.join(f"r{number}", DISK, DISK)
    stage.gone(f"r{WORKER_REPLACEMENTS_MAX - 1}")
    assert ended(stage) == (Verdict.FAILED, "worker host-r63/100 ended: killed by SIGKILL")


def test_a_silent_local_worker_is_killed_and_its_ranges_given_away_only_when_it_is_reaped() -> None:
    stage = copying(2)
    stage.say("a", wanted(2))
    assert without_beats(stage.wait(10.0, "b")) == [Kill("a")]
    assert stage.say("b", wanted(2)) == []
    assert [granted.range.start for granted in leases_in(stage.gone("a"))] == [0, 4 * MIB]


def test_a_killed_worker_that_cannot_be_reaped_fails_the_job_and_is_named() -> None:
    stage = copying()
    stage.say("a", wanted(2))
    stage.wait(30.0)  # of silence, of being killed, and for a last word
    assert ended(stage) == (
        Verdict.UNFENCED,
        "worker host-a/100 did not end within 10 s of being killed; host-a/100 was not heard to close its "
        "connections and may still write to the destination",
    )


def test_a_killed_worker_s_end_is_explained_by_its_silence() -> None:
    stage = copying()
    for name in "abc":
        if name != "a":
            stage.join(name, DISK, DISK)
        stage.say(name, wanted(1))
        stage.wait(10.0)
        stage.gone(name)
    assert ended(stage) == (
        Verdict.FAILED,
        "the range of 4194304 bytes at offset 0 was lost 3 times: worker host-c/100 was not heard of for 10 s",
    )


# -- what is merely late -----------------------------------------------------------------------------------------------


def test_messages_of_another_job_or_epoch_or_from_strangers_are_dropped() -> None:
    stage = copying()
    (first,) = leases_in(stage.say("a", wanted(1)))
    report = Counters(copied=first.range.length)
    assert stage.say("a", messages.Written("another job", EPOCH, 1, report)) == []
    assert stage.say("a", messages.Written(UUID, EPOCH - 1, 1, report)) == []
    assert stage.say("stranger", alive()) == []
    assert stage.gone("stranger") == []
    assert stage.scheduler.dropped == 4
    assert stage.scheduler.status().counters == Counters()
