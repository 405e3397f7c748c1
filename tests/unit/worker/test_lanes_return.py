"""The copier takes connections back from its lanes: what is unanswered goes on as if the copier had asked for it."""

from __future__ import annotations

import math
from errno import EIO as EIO_NUMBER
from errno import ENOSPC

import pytest

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import (
    LANE_BYTES_MIN,
    LANE_FEED_BYTES,
    LANE_STRETCH_BYTES,
    LANE_STRIKES_MAX,
    RETRIES,
    RETRY_DELAY_SECONDS,
    SPLICED_PER_CONNECTION,
)
from nbdshard.common.messages import Counters, Failed, Flushed, Written
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.worker.operation import Operation
from nbdshard.worker.stretch import Outcome, Unanswered
from support.copier_bench import EIO, EPOCH, JOB, Recorder
from support.lanes_bench import REQUEST, LanesBench, LendableRecorder, SharedRecorder, SharedSource, lanes_bench

STRETCH = LANE_STRETCH_BYTES
REQUESTS = 8


def end_of(recorder: Recorder) -> LendableRecorder:
    assert isinstance(recorder, LendableRecorder)
    return recorder


def finish(bench: LanesBench) -> None:
    """Everything succeeds from now on, whoever does it, and retries are due."""
    for _ in range(1000):
        if bench.lane.is_out:
            bench.lane.copy_all()
            bench.end()
        adopted = [call for each in (bench.source, bench.target) for call in each.open if call.name.startswith("adopt")]
        for call in adopted:
            bench.reply(call)
        bench.answer_all(*(each for each in (bench.source, bench.target) if each.open))
        if bench.copier.idle and bench.copier.deadline() is None and not bench.copier.leases:
            return
        bench.pump(1.0)
        for lease in bench.copier.leases.values():
            lease.expires = bench.now + 10.0
    raise AssertionError("the copier never comes to an end")


def all_copied(bench: LanesBench, length: int) -> None:
    (written,) = bench.told(Written)
    assert isinstance(written, Written)
    assert written.done.copied == length


# -- what is unanswered ------------------------------------------------------------------------------------------------


def all_but_one(bench: LanesBench) -> Unanswered:
    """A lane has copied a lease, but for one request, which is not answered."""
    bench.lease(0, LANE_BYTES_MIN)
    stretch = bench.lane.take()
    unanswered = bench.lane.ask(stretch, 1)
    bench.lane.copy(stretch)
    return unanswered


def test_unanswered_requests_are_adopted_under_their_handles_and_no_others_are_sent() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        stretch = bench.lane.take()
        writes = [bench.lane.ask(stretch, cookie) for cookie in (3, 0)]
        reads = [bench.lane.ask(stretch, cookie) for cookie in (2, 1)]
        bench.lane.feed.append(stretch)
        bench.end(Outcome(reads=reads, writes=writes, source_bytes=b"odd", target_bytes=b"strange"))
        assert [(call.name, call.handle, call.where) for call in bench.source.calls] == [
            ("adopted read", 2, Range(2 * REQUEST, 3 * REQUEST)),
            ("adopted read", 1, Range(3 * REQUEST, 4 * REQUEST)),
        ]
        assert [(call.name, call.handle, call.where) for call in bench.target.calls] == [
            ("adopted write", 3, Range(0, REQUEST)),
            ("adopted write", 0, Range(REQUEST, 2 * REQUEST)),
        ]
        assert end_of(bench.source).came_back == [(b"odd", None, "")]
        assert end_of(bench.target).came_back == [(b"strange", None, "")]
        assert not bench.lane.is_out  # until they are answered
        finish(bench)
        assert bench.lane.loans == 2
        all_copied(bench, STRETCH)


def test_the_data_of_an_adopted_read_is_written_and_an_adopted_write_counts_when_it_is_answered() -> None:
    with lanes_bench() as bench:
        bench.lease(0, LANE_BYTES_MIN)
        stretch = bench.lane.take()
        write, read = bench.lane.ask(stretch, 0, spliced=REQUEST - 1000), bench.lane.ask(stretch, 0)
        bench.lane.copy(stretch)
        bench.end(Outcome(reads=[read], writes=[write]))
        adopted = bench.target.open[0]
        bench.reply(bench.source.open[0], data=b"x" * REQUEST)
        written = bench.target.pending("write")[0]
        assert written.where == read.where
        bench.answer(written)
        assert written.payload == b"x" * REQUEST
        assert bench.told(Written) == []
        bench.reply(adopted)
        spliced = REQUEST + REQUEST - 1000  # of what was adopted
        assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=LANE_BYTES_MIN, spliced=spliced))]
        assert bench.copier.idle


def test_how_long_an_adopted_read_took_teaches_nothing_of_the_source() -> None:
    with lanes_bench() as bench:
        read = all_but_one(bench)
        bench.end(Outcome(reads=[read]))
        operation = bench.copier.sources[0].vector[read.cookie]
        assert isinstance(operation, Operation) and operation.asked == -math.inf
        finish(bench)
        all_copied(bench, LANE_BYTES_MIN)


def test_an_adopted_read_that_fails_is_asked_again() -> None:
    with lanes_bench() as bench:
        read = all_but_one(bench)
        bench.end(Outcome(reads=[read], source_bytes=b"an error"))
        bench.reply(bench.source.open[0], EIO)
        assert bench.source.open == []
        bench.pump(RETRY_DELAY_SECONDS)
        assert [(call.name, call.handle, call.where) for call in bench.source.open] == [("read", 1, read.where)]
        finish(bench)
        all_copied(bench, LANE_BYTES_MIN)


def test_an_adopted_write_that_fails_is_read_again_and_written_from_memory() -> None:
    with lanes_bench() as bench:
        write = all_but_one(bench)
        bench.end(Outcome(writes=[write], target_bytes=b"an error"))
        bench.reply(bench.target.open[0], EIO)
        bench.pump(RETRY_DELAY_SECONDS)
        (again,) = bench.source.open
        assert (again.name, again.where, again.piped) == ("read", write.where, None)
        bench.answer(again, data=b"y")
        (second,) = bench.target.open
        assert (second.where, second.payload) == (write.where, b"y" * REQUEST)
        bench.answer(second)
        all_copied(bench, LANE_BYTES_MIN)


def test_an_adopted_write_that_keeps_failing_fails_its_lease_by_name() -> None:
    with lanes_bench() as bench:
        write = all_but_one(bench)
        bench.end(Outcome(writes=[write]))
        bench.reply(bench.target.open[0], EIO)
        for _ in range(RETRIES):
            bench.pump(1.0)
            for call in list(bench.source.open):
                bench.answer(call)
            bench.answer(bench.target.open[0], EIO)
        (failed,) = bench.told(Failed)
        assert isinstance(failed, Failed)
        assert failed.error.text == f"destination here: write of {REQUEST} bytes at offset 0 failed 5 times: EIO"
        assert bench.copier.idle


def test_what_was_read_and_not_written_and_what_was_never_begun_is_copied_again() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 3 * STRETCH)
        stretch = bench.lane.take()
        bench.lane.copy(stretch, LANE_BYTES_MIN)
        unwritten = bench.lane.ask(stretch, 0).where
        bench.lane.feed.appendleft(stretch)
        bench.end(Outcome(unwritten=[(stretch, unwritten)], target_bytes=b"odd"))
        assert bench.lane.loans == 2
        again = RangeSet(Range(each.start, each.end) for each in bench.lane.feed)
        assert list(again) == [Range(LANE_BYTES_MIN, 3 * STRETCH)]
        assert again.total == sum(each.end - each.start for each in bench.lane.feed)
        finish(bench)
        all_copied(bench, 3 * STRETCH)


# -- pairs that are of no use ------------------------------------------------------------------------------------------


def strike(bench: LanesBench, copied: int) -> None:
    """A loan that copies a little, and then meets something odd."""
    stretch = bench.lane.take()
    bench.lane.copy(stretch, copied)
    bench.lane.feed.appendleft(stretch)
    bench.end(Outcome(source_bytes=b"odd"))


def test_a_pair_that_always_meets_something_odd_soon_is_not_lent_any_more() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 2 * STRETCH)
        for _ in range(LANE_STRIKES_MAX):
            assert bench.lane.is_out
            strike(bench, LANE_BYTES_MIN - REQUEST)
        assert not bench.lane.is_out
        assert bench.copier.lanes.remarks == ["there: replies are seldom plain: no more lanes"]
        assert bench.source.pending("read")
        finish(bench)
        assert bench.lane.loans == LANE_STRIKES_MAX
        all_copied(bench, 2 * STRETCH)


def test_a_loan_that_was_worth_it_is_no_strike_and_forgives_those_before() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 4 * STRETCH)
        for copied in [0] * (LANE_STRIKES_MAX - 1) + [LANE_BYTES_MIN] + [0] * (LANE_STRIKES_MAX - 1):
            strike(bench, copied)
        assert bench.lane.is_out
        assert bench.copier.lanes.remarks == []


# -- connections that are lost, and leases that end --------------------------------------------------------------------


@pytest.mark.parametrize("error", [0, EIO_NUMBER])
def test_each_end_is_told_what_became_of_it(error: int) -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        bench.end(Outcome(lost="source", error=error, target_bytes=b"t"))
        assert end_of(bench.source).came_back == [(b"", error, "")]
        assert end_of(bench.target).came_back == [(b"t", None, "")]
        bench.end(Outcome(lost="destination", error=error, source_bytes=b"s"))
        assert end_of(bench.source).came_back[1:] == [(b"s", None, "")]
        assert end_of(bench.target).came_back[1:] == [(b"", error, "")]


def test_a_connection_with_half_a_write_of_a_lease_that_is_over_is_given_up() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        stretch = bench.lane.take()
        write = bench.lane.ask(stretch, 0)
        bench.lane.feed.append(stretch)
        bench.end(Outcome(writes=[write], is_late=True, failed_write=0))
        assert end_of(bench.target).came_back == [(b"", 0, "a lease ended in the middle of a write")]


@pytest.mark.parametrize("is_writing", [False, True])
def test_a_lease_that_ends_stops_the_lane_that_works_on_it(is_writing: bool) -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH, seconds=10.0)
        stretch = bench.lane.take()
        if is_writing:
            bench.lane.writing = [stretch]
        bench.now += 10.0
        assert bench.copier.earliest_expiry == bench.now
        assert bench.copier.expire(bench.now) is is_writing
        assert bench.lane.stops == 1
        assert bench.told(Failed) == []  # it has not let go
        bench.lane.writing = []
        bench.lane.feed.append(stretch)
        bench.end()
        (failed,) = bench.told(Failed)
        assert isinstance(failed, Failed)
        assert failed.error.text == "the lease expired"
        assert bench.copier.idle


def test_a_lease_that_ends_leaves_alone_the_lane_that_works_on_another() -> None:
    with lanes_bench(sources=3, targets=3) as bench:
        bench.lease(0, 8 * STRETCH, seconds=10.0)
        bench.lease(8 * STRETCH, 16 * STRETCH, number=2, seconds=30.0)
        bench.now += 10.0
        bench.lanes[1].writing = [bench.lanes[1].feed[0]]
        assert not bench.copier.expire(bench.now)
        assert [lane.stops for lane in bench.lanes] == [1, 0]


def test_no_lane_is_lent_for_a_lease_that_was_given_up_while_another_lane_still_works_on_it() -> None:
    with lanes_bench(sources=3, targets=3) as bench:
        bench.lease(0, 3 * LANE_FEED_BYTES)  # more than both take at a time
        assert [lane.is_out for lane in bench.lanes] == [True, True]
        bench.copier.revoke(1)
        bench.end(Outcome())
        loans = bench.lane.loans
        bench.turn()
        assert (bench.lane.is_out, bench.lane.loans, bench.lanes[1].is_out) == (False, loans, True)


def test_a_lease_that_is_revoked_is_reported_when_its_lane_is_back_and_others_go_on() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        bench.lease(STRETCH, 2 * STRETCH, number=2)
        bench.copier.revoke(1)
        assert bench.lane.stops == 1
        assert bench.told(Failed) == []
        stretch = bench.lane.take()
        write, read = bench.lane.ask(stretch, 0), bench.lane.ask(stretch, 0)
        bench.lane.feed.appendleft(stretch)
        bench.end(Outcome(reads=[read], writes=[write]))
        assert bench.told(Failed) == []  # two requests of it are on the wire
        bench.reply(bench.source.open[0])
        bench.reply(bench.target.open[0])
        (failed,) = bench.told(Failed)
        assert isinstance(failed, Failed)
        assert (failed.lease, failed.error.text) == (1, "the lease was revoked")
        assert bench.target.made("write") == []  # what was read is not written any more
        assert [(each.start, each.end) for each in bench.lane.feed] == [(STRETCH, 2 * STRETCH)]


def test_who_leaves_waits_for_its_lanes_and_for_what_they_left_unanswered() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 2 * STRETCH)
        bench.copier.drain()
        assert bench.lane.stops == 1
        assert not bench.copier.idle
        stretch = bench.lane.take()
        write = bench.lane.ask(stretch, 0)
        bench.lane.feed.appendleft(stretch)
        bench.end(Outcome(writes=[write]))
        assert not bench.lane.is_out
        assert not bench.copier.idle
        bench.reply(bench.target.open[0])
        assert bench.copier.idle
        assert bench.source.calls == []


# -- flushes -----------------------------------------------------------------------------------------------------------


def written_then_out(bench: LanesBench) -> None:
    """One lease is written, and the lane is out with the next."""
    bench.lease(0, STRETCH)
    bench.lease(STRETCH, 2 * STRETCH, number=2)
    bench.lane.copy(bench.lane.take())
    bench.turn()
    assert len(bench.told(Written)) == 1


def durable(*leases: int) -> Flushed:
    return Flushed(JOB, EPOCH, 7, list(leases), True, None)


def test_a_flush_goes_through_the_lane_that_has_the_connection() -> None:
    with lanes_bench(sources=2, targets=2) as bench:
        written_then_out(bench)
        bench.copier.flushes.ask(7)
        assert bench.lane.wants_flush
        assert [(call.name, call.connection.name) for each in bench.targets for call in each.calls] == [
            ("flush", "target1")
        ]
        bench.answer(bench.targets[1].open[0])
        assert bench.told(Flushed) == []
        bench.lane.wants_flush, bench.lane.flushed = False, True
        bench.turn()
        assert bench.told(Flushed) == [durable(1)]
        bench.turn()
        assert bench.told(Flushed) == [durable(1)]


def test_a_flush_that_the_lane_did_not_begin_is_sent_by_the_copier() -> None:
    with lanes_bench() as bench:
        written_then_out(bench)
        bench.copier.flushes.ask(7)
        bench.end()
        (flush,) = bench.target.open
        assert flush.name == "flush"
        bench.answer(flush)
        assert bench.told(Flushed) == [durable(1)]


@pytest.mark.parametrize("error", [None, EIO])
def test_a_flush_that_the_lane_left_unanswered_is_adopted(error: RequestError | None) -> None:
    with lanes_bench() as bench:
        written_then_out(bench)
        bench.copier.flushes.ask(7)
        bench.lane.wants_flush = False
        bench.end(Outcome(is_flushing=True, target_bytes=b"odd"))
        (flush,) = bench.target.open
        assert (flush.name, flush.handle) == ("adopted flush", REQUESTS)
        bench.reply(flush, error)
        (flushed,) = bench.told(Flushed)
        assert isinstance(flushed, Flushed)
        assert flushed.durable is (error is None)
        if error is not None and flushed.error is not None:
            assert flushed.error.text == "destination here: flush failed: EIO; what was written may be lost"


def test_a_flush_of_a_connection_that_is_not_lent_is_the_copiers() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        bench.lane.copy_all()
        bench.end()
        bench.copier.flushes.ask(7)
        assert not bench.lane.wants_flush
        bench.answer(bench.target.open[0])
        assert bench.told(Flushed) == [durable(1)]


def test_a_file_is_flushed_by_the_copier_while_it_is_lent() -> None:
    with lanes_bench(kind=SharedRecorder) as bench:
        written_then_out(bench)
        bench.copier.flushes.ask(7)
        assert not bench.lane.wants_flush
        bench.answer(bench.target.pending("flush")[0])
        assert bench.told(Flushed) == [durable(1)]
        assert bench.lane.is_out


# -- files, which take requests beside those of a lane -----------------------------------------------------------------


def test_the_reads_of_a_file_that_a_lane_had_before_it_are_asked_in_rows_that_are_free() -> None:
    with lanes_bench(kind=SharedRecorder, extents=True) as bench:
        bench.lease(0, STRETCH)
        bench.answer(bench.source.open[0], extents=[(Range(0, STRETCH), 0)])
        bench.lease(STRETCH, 2 * STRETCH, number=2)
        (asked,) = bench.source.open  # block status, beside the lane, in the lane's first row
        assert (asked.name, asked.handle) == ("extents", 0)
        stretch = bench.lane.take()
        reads = [bench.lane.ask(stretch, cookie) for cookie in (0, 1)]
        bench.lane.copy(stretch)
        bench.end(Outcome(reads=reads, lost="source"))
        assert [(call.name, call.where) for call in bench.source.open[1:]] == [("read", each.where) for each in reads]
        bench.answer(asked, extents=[(Range(STRETCH, 2 * STRETCH), 0)])
        finish(bench)
        assert len(bench.told(Written)) == 2


def test_the_writes_of_a_lane_to_a_file_count_but_for_the_one_that_failed() -> None:
    with lanes_bench(kind=SharedRecorder, sparse_unit=4096) as bench:
        bench.lease(0, STRETCH)
        bench.lease(STRETCH, 2 * STRETCH, number=2)
        one, two = bench.lane.take(), bench.lane.take()
        bench.lane.skip(one, REQUEST)
        bench.lane.copy(one)
        bench.turn()
        (zero,) = bench.target.open  # beside the lane, in the lane's first row
        assert (zero.name, zero.handle) == ("zero", 0)
        writes = [bench.lane.ask(two, cookie) for cookie in (0, 1, 2)]
        bench.lane.copy(two)
        bench.end(Outcome(writes=writes, lost="destination", error=ENOSPC, failed_write=1))
        assert bench.target.open == [zero]
        assert end_of(bench.target).came_back == [(b"", None, "")]
        bench.copier.report_progress()
        assert bench.copier.leases[2].copied == STRETCH - REQUEST
        bench.pump(RETRY_DELAY_SECONDS)
        assert [call.where for call in bench.source.open] == [writes[1].where]
        finish(bench)
        assert len(bench.told(Written)) == 2


def test_a_write_to_a_file_that_keeps_failing_fails_its_lease_by_name() -> None:
    with lanes_bench(kind=SharedRecorder) as bench:
        bench.lease(0, STRETCH)
        stretch = bench.lane.take()
        write = bench.lane.ask(stretch, 0)
        bench.lane.copy(stretch)
        bench.end(Outcome(writes=[write], lost="destination", error=ENOSPC, failed_write=0))
        for _ in range(RETRIES):
            bench.pump(1.0)
            for call in list(bench.source.open):  # once: then it is held
                bench.answer(call)
            bench.answer(bench.target.open[0], RequestError("ENOSPC", ENOSPC))
        (failed,) = bench.told(Failed)
        assert isinstance(failed, Failed)
        assert failed.error.text == f"destination here: write of {REQUEST} bytes at offset 0 failed 5 times: ENOSPC"


def test_a_file_that_reads_again_what_failed_is_not_lent_meanwhile() -> None:
    with lanes_bench(kind=SharedRecorder) as bench:
        bench.lease(0, 2 * STRETCH)
        stretch = bench.lane.take()
        write = bench.lane.ask(stretch, 0)
        bench.lane.feed.appendleft(stretch)
        bench.end(Outcome(writes=[write], lost="destination", error=ENOSPC, failed_write=0))
        assert not bench.lane.is_out
        bench.pump(RETRY_DELAY_SECONDS)
        bench.answer(bench.source.open[0])
        bench.answer(bench.target.open[0])
        assert bench.lane.is_out
        finish(bench)
        all_copied(bench, 2 * STRETCH)


def test_a_file_has_rows_for_what_the_copier_reads_and_for_all_that_a_lane_leaves() -> None:
    with lanes_bench(kind=SharedSource) as bench:
        bench.lease(0, STRETCH)
        bench.copier.revoke(1)
        bench.lease(STRETCH, STRETCH + LANE_BYTES_MIN - REQUEST, number=2)  # too little for a lane
        own = list(bench.source.open)
        assert len(own) == SPLICED_PER_CONNECTION
        stretch = bench.lane.take()
        writes = [bench.lane.ask(stretch, cookie) for cookie in range(REQUESTS // 2)]
        reads = [bench.lane.ask(stretch, cookie) for cookie in range(REQUESTS // 2)]
        bench.lane.feed.appendleft(stretch)
        bench.end(Outcome(reads=reads, writes=writes, target_bytes=b"odd"))
        assert [call.where for call in bench.source.open[len(own) :]] == [each.where for each in reads]
        finish(bench)
        (failed,), (written,) = bench.told(Failed), bench.told(Written)
        assert isinstance(failed, Failed) and isinstance(written, Written)
        assert (failed.lease, written.lease) == (1, 2)
