"""The copier and its lanes, which only do what the test says: what is lent and fed, and what counts when."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.limits import (
    LANE_BYTES_MIN,
    LANE_FEED_BYTES,
    LANE_FEED_MAX,
    LANE_REQUESTS_MIN,
    LANE_STRETCH_BYTES,
    LEASES_PER_WORKER,
    MIB,
)
from nbdshard.common.messages import Counters, Progress, Written
from nbdshard.common.ranges import Range
from nbdshard.worker.stretch import Outcome, Stretch
from support.copier_bench import EPOCH, JOB, Recorder
from support.lanes_bench import REQUEST, LanesBench, LendableRecorder, SharedRecorder, lanes_bench

STRETCH = LANE_STRETCH_BYTES


def fed(stretches: Iterable[Stretch]) -> list[tuple[int, int]]:
    return [(stretch.start, stretch.end) for stretch in stretches]


def end_of(recorder: Recorder) -> LendableRecorder:
    assert isinstance(recorder, LendableRecorder)
    return recorder


# -- when a pair is lent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LendableRecorder, SharedRecorder])
def test_idle_connections_with_enough_data_are_lent_and_the_copier_reads_nothing(kind: type[Recorder]) -> None:
    with lanes_bench(kind=kind) as bench:
        bench.lease(0, LANE_BYTES_MIN)
        assert bench.lane.is_out
        assert fed(bench.lane.feed) == [(0, LANE_BYTES_MIN)]
        assert end_of(bench.source).lane is bench.lane
        assert end_of(bench.target).lane is bench.lane
        assert bench.source.calls == bench.target.calls == []
        assert not bench.copier.idle


def test_less_data_than_is_worth_a_thread_is_copied_by_the_copier() -> None:
    with lanes_bench() as bench:
        bench.lease(0, LANE_BYTES_MIN - 1)
        assert bench.lane.loans == 0
        bench.answer_all()
        (written,) = bench.told(Written)
        assert isinstance(written, Written)
        assert written.done.copied == LANE_BYTES_MIN - 1


@pytest.mark.parametrize(("requests", "lanes"), [(LANE_REQUESTS_MIN - 1, 0), (LANE_REQUESTS_MIN, 1)])
def test_with_few_requests_in_flight_there_is_no_lane(requests: int, lanes: int) -> None:
    with lanes_bench(requests=requests) as bench:
        bench.lease(0, STRETCH)
        assert len(bench.lanes) == lanes
        assert bool(bench.source.pending("read")) is not bool(lanes)


def test_where_nothing_is_spliced_there_is_no_lane() -> None:
    with lanes_bench(is_spliced=False) as bench:
        bench.lease(0, STRETCH)
        assert bench.lanes == []
        assert bench.source.pending("read")


def test_connections_that_cannot_be_lent_are_not() -> None:
    with lanes_bench(kind=Recorder) as bench:
        bench.lease(0, STRETCH)
        assert bench.lanes == []
        assert bench.source.pending("read")


def test_a_lane_that_cannot_be_is_told_of_and_done_without() -> None:
    with lanes_bench(why="no pipe can be opened", sources=3, targets=3) as bench:
        bench.lease(0, STRETCH)
        assert bench.copier.lanes.remarks == ["no pipe can be opened: payload is copied without lanes"]
        assert [lane.is_closed for lane in bench.lanes] == [True]
        assert bench.source.pending("read")


@pytest.mark.parametrize(("sources", "targets", "lanes"), [(1, 1, 1), (1, 4, 1), (2, 2, 1), (3, 3, 2), (4, 3, 2)])
def test_of_several_pairs_the_last_is_never_lent(sources: int, targets: int, lanes: int) -> None:
    with lanes_bench(sources=sources, targets=targets) as bench:
        bench.lease(0, LANE_FEED_BYTES * 3)
        assert [lane.is_out for lane in bench.lanes] == [True] * lanes
        for connections in (bench.sources, bench.targets):
            assert [end_of(each).lane for each in connections] == [*bench.lanes, *[None] * (len(connections) - lanes)]


def test_a_connection_that_refuses_is_asked_again_and_its_partner_comes_back() -> None:
    with lanes_bench() as bench:
        end_of(bench.target).is_reluctant = True
        bench.lease(0, STRETCH)
        assert not bench.lane.is_out
        assert end_of(bench.source).came_back == [(b"", None, "")]
        end_of(bench.target).is_reluctant = False
        bench.turn()
        assert bench.lane.is_out


def test_a_connection_is_lent_when_its_block_status_is_answered() -> None:
    with lanes_bench(extents=True) as bench:
        bench.lease(0, STRETCH)
        (asked,) = bench.source.open
        assert not bench.lane.is_out
        bench.answer(asked, extents=[(Range(0, STRETCH), 0)])
        assert bench.lane.is_out


def test_block_status_is_asked_on_a_connection_that_is_not_lent() -> None:
    with lanes_bench(extents=True, sources=2, targets=2) as bench:
        bench.lease(0, STRETCH)
        (asked,) = bench.sources[1].open
        bench.answer(asked, extents=[(Range(0, STRETCH), 0)])
        assert bench.lane.is_out
        bench.lease(STRETCH, 2 * STRETCH, number=2)
        assert [call.where for call in bench.sources[1].open] == [Range(STRETCH, 2 * STRETCH)]


# -- what it is fed ----------------------------------------------------------------------------------------------------


def test_data_is_cut_at_multiples_of_the_size_of_a_stretch() -> None:
    with lanes_bench() as bench:
        bench.lease(5 * MIB, 40 * MIB)
        assert fed(bench.lane.feed) == [(5 * MIB, 16 * MIB), (16 * MIB, 32 * MIB), (32 * MIB, 40 * MIB)]
        assert end_of(bench.source).announced == [Range(*where) for where in fed(bench.lane.feed)]


def test_a_lane_is_fed_some_bytes_ahead_and_again_when_it_has_taken_some() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 4 * LANE_FEED_BYTES)
        ahead = LANE_FEED_BYTES // STRETCH
        assert len(bench.lane.feed) == ahead
        assert bench.lane.feed_low == ahead // 2
        bench.lane.take()
        bench.lane.take()
        bench.turn()
        assert fed(bench.lane.feed)[-1] == ((ahead + 1) * STRETCH, (ahead + 2) * STRETCH)
        assert len(bench.lane.feed) == ahead


def test_a_lane_is_fed_the_data_and_zeroes_on_the_way_are_noted() -> None:
    with lanes_bench(extents=True) as bench:
        bench.lease(0, 2 * STRETCH)
        zero = Range(8 * MIB, 12 * MIB)
        extents = [(Range(0, zero.start), 0), (zero, 3), (Range(zero.end, 2 * STRETCH), 0)]
        bench.answer(bench.source.open[0], extents=extents)
        assert fed(bench.lane.feed) == [(0, zero.start), (zero.end, STRETCH), (STRETCH, 2 * STRETCH)]
        assert bench.target.calls == []
        bench.lane.copy_all()
        bench.end()
        assert bench.target.made("zero") == [zero]
        bench.answer_all()
        assert bench.told(Written) == [
            Written(JOB, EPOCH, 1, Counters(copied=2 * STRETCH - zero.length, zeroed=zero.length))
        ]


def test_a_lane_is_fed_so_many_stretches_at_a_time() -> None:
    with lanes_bench(extents=True) as bench:
        count = LANE_FEED_MAX + 10
        bench.lease(0, count * MIB)
        extents = []
        for at in range(0, count * MIB, MIB):
            extents += [(Range.of(at, MIB // 2), 0), (Range.of(at + MIB // 2, MIB // 2), 3)]
        bench.answer(bench.source.open[0], extents=extents)
        assert fed(bench.lane.feed) == [(at * MIB, at * MIB + MIB // 2) for at in range(LANE_FEED_MAX)]


def test_the_end_that_has_to_be_merged_is_the_copiers_own() -> None:
    with lanes_bench(block_minimum=512) as bench:
        end = 20 * MIB + 3 * REQUEST + 700
        bench.lease(0, end)
        assert fed(bench.lane.feed) == [(0, STRETCH), (STRETCH, end - 700)]
        assert bench.source.calls == []
        bench.lane.copy_all()
        bench.end()
        assert bench.source.made("read") == [Range(end - 700, end)]
        bench.answer_all()
        assert bench.target.made("read") == [Range(end - 188, end + 324)]
        assert bench.target.made("write") == [Range(end - 700, end + 324)]
        assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=end))]


def test_two_leases_are_fed_to_two_lanes() -> None:
    with lanes_bench(sources=3, targets=3) as bench:
        bench.lease(0, LANE_FEED_BYTES)
        bench.lease(LANE_FEED_BYTES, 2 * LANE_FEED_BYTES, number=2)
        assert [fed(lane.feed)[0][0] for lane in bench.lanes] == [0, LANE_FEED_BYTES]
        assert bench.source.calls == []


# -- what counts -------------------------------------------------------------------------------------------------------


def test_what_a_lane_has_copied_so_far_is_progress_and_counts_once() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 2 * STRETCH)
        stretch = bench.lane.take()
        for number in (1, 2):
            bench.lane.copy(stretch, MIB, spliced=MIB // 2)
            bench.copier.report_progress()
            counters = Counters(copied=number * MIB, spliced=number * MIB // 2)
            assert bench.told(Progress)[-1] == Progress(JOB, EPOCH, 1, counters)
        bench.copier.report_progress()
        assert len(bench.told(Progress)) == 2
        bench.lane.copy(stretch)
        bench.copier.report_progress()
        assert bench.told(Progress)[-1] == Progress(JOB, EPOCH, 1, Counters(copied=STRETCH, spliced=MIB))
        assert end_of(bench.target).moved == [Range(0, STRETCH)]


def test_a_lease_is_written_when_all_its_stretches_are_finished() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 2 * STRETCH)
        one, two = bench.lane.take(), bench.lane.take()
        bench.lane.copy(two)
        bench.lane.copy(one, STRETCH - REQUEST)
        bench.turn()
        assert bench.told(Written) == []
        bench.lane.copy(one)
        bench.turn()
        assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=2 * STRETCH))]
        assert not bench.copier.idle
        bench.end()
        assert bench.copier.idle


def test_the_next_lease_goes_on_in_the_same_loan() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        bench.lane.copy_all()
        bench.lease(STRETCH, STRETCH + REQUEST, number=2)  # little, but the lane is out
        assert fed(bench.lane.feed) == [(STRETCH, STRETCH + REQUEST)]
        bench.lane.copy_all()
        bench.end()
        assert bench.lane.loans == 1
        assert len(bench.told(Written)) == 2
        assert len(bench.copier.leases) <= LEASES_PER_WORKER


def test_what_comes_too_late_for_a_loan_is_copied_all_the_same() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        bench.lane.copy_all()
        bench.lane.outcome = Outcome()  # it is over, and nobody has looked
        bench.lease(STRETCH, STRETCH + REQUEST, number=2)
        bench.answer_all()
        assert len(bench.told(Written)) == 2


def test_zeroes_that_a_lane_finds_are_noted_when_their_stretch_is_finished() -> None:
    with lanes_bench(sparse_unit=4096) as bench:
        bench.lease(0, 2 * STRETCH)
        one, two = bench.lane.take(), bench.lane.take()
        bench.lane.copy(one, STRETCH - MIB)
        bench.lane.skip(one, MIB)
        bench.lane.skip(two, MIB)
        bench.lane.copy(two)
        bench.end()
        assert bench.target.made("zero") == [Range(STRETCH - MIB, STRETCH + MIB)]  # neighbours, of two stretches
        bench.answer_all()
        assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=2 * STRETCH - 2 * MIB, zeroed=2 * MIB))]


def zeroes_while_out(bench: LanesBench) -> None:
    """The first lease is copied but for its zeroes, while a lane works on the second."""
    bench.lease(0, STRETCH)
    bench.lease(STRETCH, 2 * STRETCH, number=2)
    one = bench.lane.take()
    bench.lane.skip(one, MIB)
    bench.lane.copy(one)
    bench.turn()


def test_zeroes_are_issued_on_a_connection_that_is_not_lent() -> None:
    with lanes_bench(sparse_unit=4096, sources=2, targets=2) as bench:
        zeroes_while_out(bench)
        assert bench.lane.is_out
        assert bench.lane.stops == 0
        assert bench.targets[1].made("zero") == [Range(0, MIB)]
        bench.answer(bench.targets[1].open[0])
        assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=STRETCH - MIB, zeroed=MIB))]


def test_where_there_is_no_other_connection_the_lane_is_stopped_for_them() -> None:
    with lanes_bench(sparse_unit=4096) as bench:
        zeroes_while_out(bench)
        bench.turn()
        assert bench.lane.stops == 1
        assert bench.target.calls == []
        bench.end()
        assert bench.target.made("zero") == [Range(0, MIB)]
        bench.answer_all()
        bench.lane.copy_all()
        bench.end()
        assert len(bench.told(Written)) == 2
        assert bench.lane.loans == 2


def test_a_file_takes_zeroes_while_it_is_lent() -> None:
    with lanes_bench(sparse_unit=4096, kind=SharedRecorder) as bench:
        zeroes_while_out(bench)
        assert (bench.lane.is_out, bench.lane.stops) == (True, 0)
        assert bench.target.made("zero") == [Range(0, MIB)]


def test_what_a_lane_remarks_is_told_once_with_the_name_of_its_source() -> None:
    with lanes_bench() as bench:
        bench.lease(0, 2 * STRETCH)
        bench.lane.remarks.append("its data is odd")
        bench.turn()
        bench.turn()
        assert bench.copier.lanes.remarks == ["there: its data is odd"]


# -- faults of our own -------------------------------------------------------------------------------------------------


def test_a_bug_in_a_lane_is_told_as_one() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        bench.lane.outcome = Outcome(bug=ZeroDivisionError("a fault"))
        with pytest.raises(BugError, match="a lane failed: ZeroDivisionError"):
            bench.turn()


def test_bytes_that_a_lane_has_lost_are_a_bug() -> None:
    with lanes_bench() as bench:
        bench.lease(0, STRETCH)
        stretch = bench.lane.take()
        bench.lane.copy(stretch, STRETCH - 100)
        bench.lane.outcome = Outcome()
        with pytest.raises(BugError, match=r"lease 1, \[0, 16777216\): 100 bytes are nowhere"):
            bench.turn()


def test_lanes_are_closed_with_the_copiers_connections() -> None:
    with lanes_bench(sources=3, targets=3) as bench:
        bench.copier.lanes.close()
        assert [lane.is_closed for lane in bench.lanes] == [True, True]
        assert bench.copier.idle
