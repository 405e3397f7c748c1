"""The copier alone: leases that end before their work does, drains, aborts, and flushes."""

from __future__ import annotations

from math import inf

import pytest
from msgspec.structs import replace

from nbdshard.common.messages import Counters, EndpointDescription, ErrorReport, Failed, Flushed, JobOptions, Written
from nbdshard.common.nbd.constants import STATE_ZERO
from nbdshard.common.ranges import Range
from support.copier_bench import EIO, EPOCH, JOB, KIB, OPTIONS, Bench

LOST = ErrorReport("connection", "source there: connection lost", "source", "there")


# -- time --------------------------------------------------------------------------------------------------------------


def test_an_expired_lease_writes_nothing_more_and_says_so() -> None:
    bench = Bench()
    bench.lease(0, 8192, seconds=10.0)
    first, second = bench.source.open
    bench.answer(first)
    bench.pump(10.0)
    bench.answer(second)
    assert bench.target.made("write") == [Range(0, 4096)]
    assert bench.told(Failed) == []  # a write is still on the wire
    bench.answer(bench.target.open[0])
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, ErrorReport("connection", "the lease expired"))]
    assert bench.copier.idle


def test_an_expired_lease_does_not_repeat_a_failed_write() -> None:
    bench = Bench()
    bench.lease(0, 4096, seconds=1.0)
    bench.answer(bench.source.open[0])
    bench.pump(0.99)
    bench.answer(bench.target.open[0], EIO)
    bench.pump(1.0)
    assert len(bench.target.calls) == 1
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, ErrorReport("connection", "the lease expired"))]


def test_an_expired_lease_does_not_zero() -> None:
    bench = Bench(JobOptions(4 * KIB, 4, 64 * KIB, 0))
    bench.lease(0, 8192, seconds=1.0)
    (call,) = bench.source.open
    bench.now += 2.0
    bench.answer(call, extents=[(Range(0, 8192), STATE_ZERO)])
    assert bench.target.calls == []
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, ErrorReport("connection", "the lease expired"))]


def test_a_lease_that_expires_among_others_leaves_them_alone() -> None:
    bench = Bench(JobOptions(4 * KIB, 4, 64 * KIB, 0, synchronous=True))
    bench.lease(0, 4096, number=1, seconds=1.0)
    bench.lease(4096, 8192, number=2, seconds=60.0)
    first = bench.source.open[0]
    bench.now += 2.0
    bench.answer(first, extents=[(Range(0, 4096), STATE_ZERO)])
    bench.answer_all()
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, ErrorReport("connection", "the lease expired"))]
    assert bench.told(Written) == [Written(JOB, EPOCH, 2, Counters(copied=4096))]


def test_a_renewed_lease_goes_on() -> None:
    bench = Bench()
    bench.lease(0, 4096, seconds=10.0)
    bench.pump(9.0)
    bench.copier.renew(bench.now, bench.now + 10.0)
    bench.pump(9.0)
    bench.answer_all()
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=4096))]


def test_a_lease_cannot_be_renewed_once_it_has_expired() -> None:
    bench = Bench()
    bench.lease(0, 4096, seconds=10.0)
    bench.pump(10.0)
    bench.copier.renew(bench.now, bench.now + 10.0)
    bench.answer_all()
    assert bench.target.calls == []
    assert len(bench.told(Failed)) == 1


def test_the_shell_is_told_when_the_first_lease_ends() -> None:
    bench = Bench()
    assert bench.copier.earliest_expiry == inf
    bench.lease(0, 4096, number=1, seconds=10.0)
    bench.lease(4096, 8192, number=2, seconds=5.0)
    assert bench.copier.earliest_expiry == bench.now + 5.0
    bench.pump(4.0)
    bench.copier.renew(bench.now, bench.now + 7.0)
    assert bench.copier.earliest_expiry == bench.now + 7.0


def test_the_end_of_a_lease_fails_it_and_asks_for_its_connection_to_be_closed_only_if_something_was_written() -> None:
    bench = Bench(JobOptions(4 * KIB, 4, 64 * KIB, 0, extents=False))
    bench.lease(0, 4096, number=1, seconds=5.0)
    bench.lease(4096, 8192, number=2, seconds=10.0)
    reads = list(bench.source.open)
    bench.now += 5.0
    assert not bench.copier.expire(bench.now)
    assert bench.copier.earliest_expiry == bench.now + 5.0
    for call in reads:
        bench.answer(call)
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, ErrorReport("connection", "the lease expired"))]
    assert bench.target.made("write") == [Range(4096, 8192)]
    bench.now += 5.0
    assert bench.copier.expire(bench.now)
    assert bench.copier.earliest_expiry == inf


def test_a_revoked_lease_still_ends_while_something_is_written_under_it() -> None:
    bench = Bench()
    bench.lease(0, 4096, seconds=5.0)
    bench.answer(bench.source.open[0])
    bench.copier.revoke(1)
    bench.now += 5.0
    assert bench.now >= bench.copier.earliest_expiry
    assert bench.copier.expire(bench.now)


def test_a_lease_that_was_written_before_its_end_asks_for_nothing() -> None:
    bench = Bench()
    bench.lease(0, 4096, seconds=5.0)
    bench.answer_all()
    bench.now += 5.0
    assert not bench.copier.expire(bench.now)
    assert bench.copier.earliest_expiry == inf


# -- giving up ---------------------------------------------------------------------------------------------------------


def test_a_revoked_lease_is_answered_once_nothing_of_it_is_on_the_wire() -> None:
    bench = Bench()
    bench.lease(0, 12 * KIB)
    bench.answer(bench.source.open[0])
    bench.copier.revoke(1)
    bench.pump()
    while bench.source.open:
        bench.answer(bench.source.open[0])
    assert bench.told(Failed) == []
    bench.answer(bench.target.open[0])
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, ErrorReport("connection", "the lease was revoked"))]
    assert len(bench.target.calls) == 1


def test_a_revoked_lease_that_was_not_begun_is_answered_at_once() -> None:
    bench = Bench(sources=0)
    bench.lease(0, 4096)
    bench.copier.revoke(1)
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, ErrorReport("connection", "the lease was revoked"))]


def test_revoking_an_unknown_lease_does_nothing() -> None:
    bench = Bench()
    bench.copier.revoke(77)
    assert bench.copier.outbox == []


def test_a_drain_finishes_what_is_on_the_wire_and_begins_nothing() -> None:
    bench = Bench()
    bench.lease(0, 64 * KIB)
    bench.answer(bench.source.open[0])
    assert not bench.copier.idle
    bench.copier.drain()
    bench.pump()
    reads = len(bench.source.calls)
    bench.answer_all()
    assert bench.copier.idle
    assert len(bench.source.calls) == reads
    assert len(bench.target.calls) == 1
    assert bench.told(Written) == bench.told(Failed) == []


def test_a_drain_drops_what_waits_for_another_try() -> None:
    bench = Bench()
    bench.lease(0, 8192)
    bench.answer(bench.source.open[0], EIO)
    bench.answer(bench.source.open[0])
    bench.answer(bench.target.open[0], EIO)
    bench.copier.drain()
    bench.pump(1.0)
    assert bench.copier.idle
    assert (len(bench.source.calls), len(bench.target.calls)) == (2, 1)


def test_nothing_is_granted_to_a_worker_that_drains() -> None:
    bench = Bench()
    bench.copier.drain()
    bench.lease(0, 4096)
    assert bench.source.calls == []
    assert bench.copier.leases == {}


def test_an_abort_fails_every_lease() -> None:
    bench = Bench()
    bench.lease(0, 4096, number=1)
    bench.lease(4096, 8192, number=2)
    bench.copier.abort(LOST)
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, LOST), Failed(JOB, EPOCH, 2, LOST)]
    bench.pump()
    assert bench.told(Written) == []


# -- flushing ----------------------------------------------------------------------------------------------------------


def test_a_flush_goes_to_every_target_and_covers_the_written_leases() -> None:
    bench = Bench(targets=2, sources=2)
    bench.lease(0, 8192, number=1)
    bench.answer_all()
    bench.lease(8192, 64 * KIB, number=2)
    bench.copier.flushes.ask(5)
    flushes = [recorder.pending("flush")[0] for recorder in bench.targets]
    bench.answer(flushes[0])
    assert bench.told(Flushed) == []
    bench.answer(flushes[1])
    assert bench.told(Flushed) == [Flushed(JOB, EPOCH, 5, [1], durable=True)]


def test_a_lease_that_is_written_while_a_flush_is_under_way_is_not_covered_by_it() -> None:
    bench = Bench()
    bench.lease(0, 4096, number=1)
    bench.answer_all()
    bench.lease(4096, 8192, number=2)
    bench.copier.flushes.ask(1)
    (flush,) = bench.target.pending("flush")
    bench.answer(bench.source.open[0])
    bench.answer(bench.target.pending("write")[0])
    assert len(bench.told(Written)) == 2
    bench.answer(flush)
    bench.copier.flushes.ask(2)
    bench.answer(bench.target.pending("flush")[0])
    assert bench.told(Flushed) == [Flushed(JOB, EPOCH, 1, [1], durable=True), Flushed(JOB, EPOCH, 2, [2], durable=True)]


def test_flushes_are_carried_out_one_after_the_other() -> None:
    bench = Bench()
    bench.copier.flushes.ask(1)
    bench.copier.flushes.ask(2)
    assert len(bench.target.open) == 1
    assert not bench.copier.idle
    bench.answer(bench.target.open[0])
    bench.answer(bench.target.open[0])
    assert [message.flush for message in bench.told(Flushed) if isinstance(message, Flushed)] == [1, 2]
    assert bench.copier.idle


def test_a_flush_that_fails_is_told_once_and_never_repeated() -> None:
    bench = Bench(targets=2)
    bench.lease(0, 4096)
    bench.answer_all()
    bench.copier.flushes.ask(1)
    for recorder in bench.targets:
        bench.answer(recorder.open[0], EIO)
    bench.pump(60.0)
    text = "destination here: flush failed: EIO; what was written may be lost"
    report = ErrorReport("request", text, "destination", "here", errno_name="EIO")
    assert bench.told(Flushed) == [Flushed(JOB, EPOCH, 1, [1], durable=False, error=report)]
    assert [len(recorder.made("flush")) for recorder in bench.targets] == [1, 1]


def test_a_destination_without_flush_says_that_durability_is_unknown() -> None:
    bench = Bench(OPTIONS, destination=EndpointDescription("here", 1 << 30, can_zero=True))
    bench.lease(0, 4096)
    bench.answer_all()
    bench.copier.flushes.ask(1)
    assert bench.target.made("flush") == []
    assert bench.told(Flushed) == [Flushed(JOB, EPOCH, 1, [1], durable=False)]


@pytest.mark.parametrize("requests", [1, 4])
def test_a_write_that_is_answered_twice_has_not_answered_the_flush(requests: int) -> None:
    """The flush has another handle than what was answered last, so the second answer is nobody's."""
    bench = Bench(replace(OPTIONS, requests=requests))
    bench.lease(0, 16 * KIB)
    bench.answer_all()
    bench.copier.flush(1)
    (flush,) = bench.target.pending("flush")
    writes = [call.handle for call in bench.target.calls if call.name == "write"]
    assert len(writes) == 4
    assert flush.handle not in writes[-requests:]
