"""A copier with a rate: what is begun when, and nothing while it is 0."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nbdshard.common.limits import LANE_BYTES_MIN, MIB, RATE_STRETCH_SECONDS
from nbdshard.common.messages import Counters, Failed, Written
from nbdshard.common.nbd.constants import STATE_ZERO
from nbdshard.common.ranges import Range
from nbdshard.worker.stretch import Outcome
from support.copier_bench import EIO, KIB, OPTIONS, Bench
from support.lanes_bench import REQUEST, lanes_bench

BLOCK = OPTIONS.request_size


def limited(rate: int | None, options: object = OPTIONS) -> Bench:
    bench = Bench(options)  # type: ignore[arg-type]
    bench.copier.limit(rate)
    return bench


def test_a_read_is_begun_when_there_are_tokens_for_it_and_the_copier_says_when() -> None:
    bench = limited(BLOCK)  # a request each second
    bench.lease(0, 4 * BLOCK)
    assert bench.source.calls == []
    deadline = bench.copier.deadline()
    assert deadline == pytest.approx(bench.now + 1.0)
    bench.pump(0.999)
    assert bench.source.calls == []
    bench.pump(0.002)
    assert bench.source.made("read") == [Range(0, BLOCK)]
    bench.pump(1.001)
    assert bench.source.made("read") == [Range(0, BLOCK), Range(BLOCK, 2 * BLOCK)]


def test_all_is_copied_in_the_end_and_nothing_is_waited_for_then() -> None:
    bench = limited(BLOCK)
    bench.lease(0, 4 * BLOCK, seconds=100.0)
    for _ in range(5):
        bench.pump(1.001)
        bench.answer_all()
    (written,) = bench.told(Written)
    assert isinstance(written, Written)
    assert written.done == Counters(copied=4 * BLOCK)
    assert bench.copier.deadline() is None


def test_a_rate_of_0_begins_nothing_finishes_what_is_under_way_and_waits_for_no_time() -> None:
    bench = Bench()
    bench.lease(0, 8 * BLOCK)
    begun = len(bench.source.open)
    assert begun == OPTIONS.requests
    bench.copier.limit(0)
    bench.answer_all()
    bench.pump(5.0)
    assert len(bench.source.calls) == len(bench.target.calls) == begun
    assert bench.copier.deadline() is None
    assert bench.copier.idle
    bench.copier.limit(None)
    bench.pump()
    bench.answer_all()
    assert len(bench.told(Written)) == 1


def test_a_rate_of_0_asks_for_no_extents_and_zeroes_nothing() -> None:
    bench = limited(0, replace(OPTIONS, extents=True))
    bench.lease(0, MIB)
    assert bench.source.calls == []
    bench.copier.limit(None)
    bench.pump()
    (question,) = bench.source.pending("extents")
    bench.copier.limit(0)
    bench.answer(question, extents=[(Range(0, MIB), STATE_ZERO)])
    bench.pump(1.0)
    assert bench.target.calls == []
    bench.copier.limit(None)
    bench.pump()
    assert bench.target.made("zero") == [Range(0, MIB)]


def test_zeroes_cost_nothing() -> None:
    bench = limited(1, replace(OPTIONS, extents=True))
    bench.lease(0, MIB)
    (question,) = bench.source.pending("extents")
    bench.answer(question, extents=[(Range(0, MIB), STATE_ZERO)])
    bench.answer_all(bench.target)
    assert len(bench.told(Written)) == 1


def test_zeroes_of_one_lease_do_not_wait_for_the_data_of_another() -> None:
    bench = limited(1, replace(OPTIONS, extents=True))
    bench.lease(0, MIB, number=1)
    bench.lease(MIB, 2 * MIB, number=2)
    for question in bench.source.pending("extents"):
        assert question.where is not None
        bench.answer(question, extents=[(question.where, STATE_ZERO if question.where.start else 0)])
    while questions := bench.source.pending("extents"):
        assert questions[0].where is not None
        bench.answer(questions[0], extents=[(questions[0].where, STATE_ZERO)])
    assert bench.target.made("zero") == [Range(MIB, 2 * MIB)]
    assert bench.source.made("read") == []


def test_a_read_that_is_tried_again_is_paid_for_and_does_not_wait() -> None:
    bench = limited(BLOCK)
    bench.lease(0, 4 * BLOCK)
    bench.pump(1.001)
    bench.answer(bench.source.open[0], EIO)
    bench.pump(0.1)  # the pause before the second try
    assert bench.source.made("read") == [Range(0, BLOCK)] * 2
    bench.pump(1.0)
    assert len(bench.source.made("read")) == 2
    bench.pump(1.0)
    assert len(bench.source.made("read")) == 3


def failed_once(side: str) -> Bench:
    """A copier that pauses while a read of its, or a write, waits for another try."""
    bench = Bench()
    bench.lease(0, BLOCK, seconds=1000.0)
    if side == "destination":
        bench.answer(bench.source.open[0])
    bench.copier.limit(0)
    bench.answer((bench.source if side == "source" else bench.target).open[0], EIO)
    bench.pump(10.0)
    return bench


@pytest.mark.parametrize("side", ["source", "destination"])
def test_nothing_is_tried_again_while_the_rate_is_0_and_all_when_it_is_not(side: str) -> None:
    bench = failed_once(side)
    recorder, kind = (bench.source, "read") if side == "source" else (bench.target, "write")
    assert recorder.made(kind) == [Range(0, BLOCK)]
    assert bench.copier.deadline() is None, "it is not looked at again and again"
    bench.copier.limit(None)
    bench.pump()
    assert recorder.made(kind) == [Range(0, BLOCK)] * 2
    bench.answer_all()
    assert len(bench.told(Written)) == 1


@pytest.mark.parametrize("side", ["source", "destination"])
def test_what_waits_for_another_try_while_the_rate_is_0_does_not_hold_up_the_end(side: str) -> None:
    bench = failed_once(side)
    bench.copier.drain()
    bench.pump()
    assert bench.copier.idle


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_lease_that_is_revoked_while_the_rate_is_0_is_told_of_though_it_waits_for_another_try(side: str) -> None:
    bench = failed_once(side)
    bench.copier.revoke(1)
    bench.pump()
    assert len(bench.told(Failed)) == 1


def test_a_lease_that_is_given_up_has_nobody_wait() -> None:
    bench = limited(BLOCK)
    bench.lease(0, 4 * BLOCK)
    bench.copier.drain()
    bench.pump()
    assert bench.copier.deadline() is None
    assert bench.copier.idle


# -- lanes -------------------------------------------------------------------------------------------------------------


def test_a_lane_is_fed_no_more_than_the_rate_allows_and_in_small_stretches() -> None:
    rate = 16 * MIB
    with lanes_bench() as bench:
        bench.copier.limit(rate)
        bench.lease(0, 64 * MIB, seconds=1000.0)
        assert bench.lane.loans == 0
        bench.pump(0.2)
        assert [stretch.end - stretch.start for stretch in bench.lane.feed] == [int(rate * RATE_STRETCH_SECONDS)]
        bench.lane.copy_all()
        bench.end()
        assert not bench.lane.is_out  # nothing could be fed: it is not lent for nothing
        bench.pump(0.25)
        assert bench.lane.loans == 2
        assert sum(stretch.end - stretch.start for stretch in bench.lane.feed) == 4 * MIB


def test_a_slow_lane_is_fed_a_request_at_a_time() -> None:
    with lanes_bench() as bench:
        bench.copier.limit(64 * KIB)
        bench.lease(0, LANE_BYTES_MIN, seconds=1000.0)
        bench.pump(3.9)
        assert bench.lane.loans == 0
        bench.pump(0.2)
        assert [(stretch.start, stretch.end) for stretch in bench.lane.feed] == [(0, REQUEST)]


def test_a_rate_of_0_takes_back_what_a_lane_has_not_begun() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 64 * MIB)
        begun = bench.lane.take()
        bench.copier.limit(0)
        assert bench.lane.stops == 1
        bench.lane.copy(begun)
        bench.end()
        bench.pump(10.0)
        assert bench.lane.loans == 1
        assert bench.source.calls == []
        assert bench.copier.idle
        bench.copier.limit(None)
        bench.pump()
        assert bench.lane.loans == 2
        assert bench.lane.feed[0].start == begun.end


def test_a_first_rate_takes_back_what_was_fed_without_one_and_refunds_nothing() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 64 * MIB)
        bench.copier.limit(4 * MIB)
        bench.end()
        assert bench.lane.loans == 1
        assert not bench.copier.bucket.admits(REQUEST, bench.now)


def test_what_a_lane_was_fed_and_did_not_ask_for_is_refunded() -> None:
    with lanes_bench() as bench:
        bench.copier.limit(4 * MIB)
        bench.lease(0, 64 * MIB, seconds=1000.0)
        bench.pump(0.126)
        (stretch,) = bench.lane.feed
        assert not bench.copier.bucket.admits(REQUEST, bench.now)
        bench.copier.limit(8 * MIB)
        bench.lane.stop()
        bench.lane.outcome = Outcome()
        bench.copier.lanes.collect()
        assert bench.copier.bucket.admits(stretch.end - stretch.start, bench.now)
