"""The copier takes connections back from its lanes: WRITE_ZEROES that are unanswered, and zeroes that count."""

from __future__ import annotations

from errno import ENOTSUP

from nbdshard.common.limits import LANE_BYTES_MIN, RETRY_DELAY_SECONDS
from nbdshard.common.messages import Counters, Progress, Written
from nbdshard.worker.local import refusal
from nbdshard.worker.stretch import Outcome, Unanswered
from support.copier_bench import EIO, EPOCH, JOB
from support.lanes_bench import REQUEST, LanesBench, lanes_bench


def zeroes_unanswered(bench: LanesBench) -> Unanswered:
    """A lane has copied a lease, but for one WRITE_ZEROES, which is not answered."""
    bench.lease(0, LANE_BYTES_MIN)
    stretch = bench.lane.take()
    unanswered = bench.lane.ask(stretch, 1, is_zero=True)
    bench.lane.copy(stretch)
    return unanswered


def all_but_one_copied(bench: LanesBench) -> None:
    assert bench.told(Written) == [
        Written(JOB, EPOCH, 1, Counters(copied=LANE_BYTES_MIN - REQUEST, zeroed=REQUEST)),
    ]
    assert bench.copier.idle


def test_adopted_zeroes_count_when_they_are_answered() -> None:
    with lanes_bench() as bench:
        zeroes = zeroes_unanswered(bench)
        bench.end(Outcome(writes=[zeroes]))
        (adopted,) = bench.target.open
        assert (adopted.name, adopted.handle, adopted.where) == ("adopted zero", 1, zeroes.where)
        assert (bench.told(Written), bench.source.open) == ([], [])
        assert bench.copier.targets[0].bytes_in_flight == 0
        bench.reply(adopted)
        all_but_one_copied(bench)


def test_adopted_zeroes_that_fail_are_asked_for_again() -> None:
    with lanes_bench() as bench:
        zeroes = zeroes_unanswered(bench)
        bench.end(Outcome(writes=[zeroes], target_bytes=b"an error"))
        bench.reply(bench.target.open[0], EIO)
        assert bench.target.open == []
        bench.pump(RETRY_DELAY_SECONDS)
        (again,) = bench.target.open
        assert (again.name, again.where) == ("zero", zeroes.where)
        bench.answer(again)
        all_but_one_copied(bench)


def test_adopted_zeroes_that_are_refused_are_written_as_data() -> None:
    with lanes_bench() as bench:
        zeroes = zeroes_unanswered(bench)
        bench.end(Outcome(writes=[zeroes], target_bytes=b"an error"))
        bench.reply(bench.target.open[0], refusal(ENOTSUP))
        (written,) = bench.target.open
        assert (written.name, written.where, written.payload) == ("write", zeroes.where, bytes(REQUEST))
        bench.answer(written)
        all_but_one_copied(bench)


def test_what_a_lane_has_zeroed_counts_as_zeroes() -> None:
    with lanes_bench() as bench:
        bench.lease(0, LANE_BYTES_MIN)
        stretch = bench.lane.take()
        bench.lane.zero(stretch, REQUEST)
        bench.turn()
        bench.copier.report_progress()
        assert bench.told(Progress) == [Progress(JOB, EPOCH, 1, Counters(zeroed=REQUEST))]
        bench.lane.copy(stretch)
        bench.end()
        all_but_one_copied(bench)
