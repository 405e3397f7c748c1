"""What was reached, beside what was asked for."""

from __future__ import annotations

import pytest

from benchmarks.judging import (
    Judgement,
    cpu_share,
    judge_cpu,
    judge_leases,
    judge_scheduler,
    judge_speed,
    judge_variant,
    speed,
)
from benchmarks.results import LeaseRate, Row, SchedulerCost
from benchmarks.rows import Figure
from support.benchmark_runs import row, series

FIGURE = Figure(speed_min=1.5, cpu_share_max=0.5)
SECONDS = Figure(wall_seconds_max=0.35, cpu_seconds_max=0.25)


def test_twice_the_speed_is_half_the_time() -> None:
    assert speed(row(ours=(2.0, 1.0), nbdcopy=(4.0, 1.0)), "nbdcopy") == 2.0
    assert cpu_share(row(ours=(2.0, 1.0), nbdcopy=(4.0, 4.0)), "nbdcopy") == 0.25


def test_a_tool_that_failed_has_no_ratio() -> None:
    alone = Row("first", 1, [series("nbdshard", [1.0])])
    assert speed(alone, "nbdcopy") is None
    assert judge_speed(alone, FIGURE).met is None
    assert judge_cpu(alone, FIGURE).met is None


def test_a_figure_that_is_just_reached_is_met() -> None:
    assert judge_speed(row(ours=(2.0, 1.0), nbdcopy=(3.0, 2.0)), FIGURE).met is True
    assert judge_cpu(row(ours=(2.0, 1.0), nbdcopy=(3.0, 2.0)), FIGURE).met is True


def test_a_figure_that_is_just_missed_is_not() -> None:
    assert judge_speed(row(ours=(2.01, 1.0), nbdcopy=(3.0, 2.0)), FIGURE).met is False
    assert judge_cpu(row(ours=(2.0, 1.01), nbdcopy=(3.0, 2.0)), FIGURE).met is False


def test_nothing_may_be_slower_than_qemu_img() -> None:
    assert judge_speed(row(ours=(2.0, 1.0), nbdcopy=(3.0, 2.0), qemu=(1.9, 1.0)), FIGURE).met is False


def test_some_rows_have_seconds_to_keep_to_and_no_peer_to_beat() -> None:
    fast = row(ours=(0.3, 0.2), nbdcopy=(0.01, 0.01), qemu=(0.01, 0.01))
    assert judge_speed(fast, SECONDS) == Judgement("at most 0.35 s", True)
    assert judge_cpu(fast, SECONDS) == Judgement("at most 0.25 s", True)
    assert judge_speed(row(), SECONDS).met is False


def test_what_nothing_was_asked_of_is_only_reported() -> None:
    assert str(judge_cpu(row(), Figure(speed_min=1.0))) == ""
    assert judge_speed(row(), Figure()).asked == "only reported"


@pytest.mark.parametrize(("wall", "met"), [(2.5, True), (2.51, False)])
def test_epoll_must_stay_within_a_quarter_of_io_uring(wall: float, met: bool) -> None:
    assert judge_variant(row(ours=(2.0, 1.0)), series("nbdshard --ring epoll", [wall])).met is met


def test_other_options_are_only_reported() -> None:
    assert judge_variant(row(), series("nbdshard --data-path=buffer", [9.0])).met is None


def test_a_coordinator_must_give_a_thousand_leases_a_second() -> None:
    assert judge_leases(LeaseRate("ipc", 10, 2000, 2.0, 1.0)).met is True
    assert judge_leases(LeaseRate("ipc", 10, 1999, 2.0, 1.0)).met is False


def costs(*microseconds: float) -> list[SchedulerCost]:
    return [SchedulerCost(1000, 10, 1_000_000, each, 0) for each in microseconds]


def test_the_schedulers_cost_is_flat_when_the_dearest_job_is_near_the_cheapest() -> None:
    assert judge_scheduler(costs(8.0, 10.0, 9.0)).met is True
    assert judge_scheduler(costs(8.0, 10.1, 9.0)).met is False
    assert judge_scheduler(costs(8.0)).met is None
