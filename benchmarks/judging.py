"""What was reached, beside what was asked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.results import (
    NBDCOPY,
    NBDSHARD,
    QEMU_IMG,
    CheckpointCost,
    LeaseRate,
    Row,
    SchedulerCost,
    Series,
    ServedWork,
)
from benchmarks.rows import CHECKPOINT_COST_MAX, FLAT_FACTOR_MAX, LEASES_PER_SECOND_MIN, Figure
from nbdshard.common.limits import CHECKPOINT_SECONDS

EPOLL_FACTOR_MAX: Final = 1.25  # against io_uring, on the first row
QEMU_SPEED_MIN: Final = 1.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """A figure that was asked for, in words, and whether it was met; None: nothing was asked, or nothing is known."""

    asked: str
    met: bool | None

    def __str__(self) -> str:
        return {True: "met", False: "**not met**", None: ""}[self.met]


REPORTED: Final = Judgement("only reported", None)


def speed(row: Row, peer: str) -> float | None:
    """How many times as fast as `peer` nbdshard was, by the medians; None if one of them has no samples."""
    ours, theirs = row.of(NBDSHARD), row.of(peer)
    return theirs.wall / ours.wall if ours is not None and theirs is not None else None


def cpu_share(row: Row, peer: str) -> float | None:
    """How much of the CPU of `peer` nbdshard took; None if one of them has no samples."""
    ours, theirs = row.of(NBDSHARD), row.of(peer)
    return ours.cpu / theirs.cpu if ours is not None and theirs is not None and theirs.cpu else None


def busy(series: Series, cores: int) -> float:
    """The share of the machine's cores that the tool and the servers kept busy, by the medians."""
    return (series.cpu + series.servers) / (series.wall * cores)


def speed_bound(row: Row, cores: int) -> float | None:
    """How many times as fast as nbdcopy a copy could be whose client took no CPU at all.

    The servers take on all cores what they took beside nbdshard. None: that is not known.
    """
    ours, theirs = row.of(NBDSHARD), row.of(NBDCOPY)
    return theirs.wall * cores / ours.servers if ours is not None and theirs is not None and ours.servers else None


def judge_speed(row: Row, figure: Figure) -> Judgement:
    """Of the wall time."""
    ours = row.of(NBDSHARD)
    if figure.wall_seconds_max is not None:
        met = None if ours is None else ours.wall <= figure.wall_seconds_max
        return Judgement(f"at most {figure.wall_seconds_max:g} s", met)
    if figure.speed_min is None:
        return REPORTED
    reached = speed(row, NBDCOPY)
    beside_qemu = speed(row, QEMU_IMG)
    met = None if reached is None else reached >= figure.speed_min
    if met and beside_qemu is not None:
        met = beside_qemu >= QEMU_SPEED_MIN
    return Judgement(f"at least {figure.speed_min:g} / {QEMU_SPEED_MIN:g}", met)


def judge_cpu(row: Row, figure: Figure) -> Judgement:
    """Of the CPU time."""
    ours = row.of(NBDSHARD)
    if figure.cpu_seconds_max is not None:
        met = None if ours is None else ours.cpu <= figure.cpu_seconds_max
        return Judgement(f"at most {figure.cpu_seconds_max:g} s", met)
    if figure.cpu_share_max is None:
        return REPORTED
    reached = cpu_share(row, NBDCOPY)
    met = None if reached is None else reached <= figure.cpu_share_max
    return Judgement(f"at most {figure.cpu_share_max:g}", met)


def judge_variant(row: Row, variant: Series) -> Judgement:
    """Of nbdshard with other options: epoll must stay near io_uring."""
    ours = row.of(NBDSHARD)
    if not variant.name.endswith("--ring epoll"):
        return REPORTED
    met = None if ours is None or not variant.samples else variant.wall <= EPOLL_FACTOR_MAX * ours.wall
    return Judgement(f"at most {EPOLL_FACTOR_MAX:g} x the default's time", met)


def checkpoints_by_default(cost: CheckpointCost) -> float | None:
    """How much of the time checkpoints take at the default interval, by what they take when they come more often."""
    return None if cost.share is None else cost.share * cost.seconds / CHECKPOINT_SECONDS


def judge_checkpoints(cost: CheckpointCost) -> Judgement:
    """Of what checkpoints take from the throughput."""
    share = checkpoints_by_default(cost)
    asked = f"under {CHECKPOINT_COST_MAX:.0%} at the default interval"
    return Judgement(asked, None if share is None else share < CHECKPOINT_COST_MAX)


def judge_server(work: ServedWork, server: str, speed_min: float) -> Judgement:
    """Of one server, beside the peer."""
    reached = work.speed(server)
    return Judgement(f"at least {speed_min:g}", None if reached is None else reached >= speed_min)


def judge_leases(rate: LeaseRate) -> Judgement:
    """Of one coordinator."""
    return Judgement(f"at least {LEASES_PER_SECOND_MIN} leases/s", rate.per_second >= LEASES_PER_SECOND_MIN)


def judge_scheduler(costs: Sequence[SchedulerCost]) -> Judgement:
    """Of the cost per event, over all numbers of ranges."""
    times = [cost.microseconds for cost in costs]
    met = None if len(times) < 2 else max(times) <= FLAT_FACTOR_MAX * min(times)
    return Judgement(f"flat: the dearest at most {FLAT_FACTOR_MAX:g} x the cheapest", met)
