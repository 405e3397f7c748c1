"""Results made by hand, for tests of what is worked out from them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import (
    AFTER_ONE,
    AFTER_ROUNDS,
    IDENTICAL,
    CheckpointCost,
    LeaseRate,
    Machine,
    Memory,
    Point,
    Results,
    Row,
    Sample,
    SchedulerCost,
    Series,
)
from nbdshard.common.limits import REQUEST_BYTES_DEFAULT

MIB = 1 << 20
GIB = 1 << 30

MACHINE = Machine(
    cpu="Processor 9000",
    cores=2,
    memory=16 * GIB,
    kernel="6.1.0",
    system="Debian",
    versions={"nbdshard": "0.1.0", "nbdcopy": "1.14.2"},
    commit="abc1234",
    load_before=0.05,
    date="2026-01-02 03:04 UTC",
)


def series(name: str, wall: Sequence[float], cpu: Sequence[float] | None = None, servers: float = 0.0) -> Series:
    """Samples with these times; the CPU time is half the wall time unless told. `servers`: of each."""
    return Series(name, [Sample(w, c, servers) for w, c in zip(wall, cpu or [each / 2 for each in wall], strict=True)])


def row(
    ours: tuple[float, float] = (2.0, 1.0),
    nbdcopy: tuple[float, float] = (3.0, 2.0),
    qemu: tuple[float, float] = (4.0, 2.0),
    name: str = "first",
    servers: float = 0.0,
) -> Row:
    """One round of each tool: (wall, CPU); `servers`: CPU of the servers beside each of them."""
    pairs = {"nbdshard": ours, "nbdcopy": nbdcopy, "qemu-img": qemu}
    return Row(name, 8 * GIB, [series(tool, [wall], [cpu], servers) for tool, (wall, cpu) in pairs.items()])


def point(workers: int, connections: int, wall: float, request_size: int = REQUEST_BYTES_DEFAULT) -> Point:
    return Point(workers, connections, request_size, series("nbdshard", [wall]))


def whole() -> Results:
    """Every part, with something in it."""
    kept = Row(
        "sparse",
        100 * GIB,
        row().series,
        [Memory("nbdshard", 20 * MIB, [30 * MIB, 40 * MIB]), Memory("nbdcopy", 70 * MIB, [])],
        {"nbdshard": GIB, "nbdcopy": 2 * GIB},
        {AFTER_ROUNDS: IDENTICAL, AFTER_ONE: "not identical: Content mismatch at offset 4096!"},
        ["nbdcopy: a remark"],
    )
    first = Row("first", 8 * GIB, [*row().series, series("nbdshard --ring epoll", [2.6])])
    return Results(
        machine=MACHINE,
        quick=False,
        rounds=5,
        seconds=600.0,
        steal=0.01,
        rows=[first, kept, Row("memory", 4 * GIB, skipped="it needs 9 GiB of memory, 2 GiB are free")],
        scaling=[point(1, 1, 3.0), point(1, 4, 2.5), point(2, 4, 2.0), point(2, 8, 1.6)],
        requests=[point(2, 4, 4.0, 65536), point(2, 4, 2.0)],
        checkpoints=[CheckpointCost(GIB, 0.5, series("nbdshard", [2.2]), series("nbdshard", [2.0]))],
        leases=[LeaseRate("ipc", 10, 20_000, 10.0, 8.0), LeaseRate("tcp", 100, 500, 1.0, 1.0)],
        scheduler=[SchedulerCost(1000, 10_000, 20_000, 0.2, 30 * MIB), SchedulerCost(1000, 100_000, 200_000, 3.0, MIB)],
        notes=["There was not time for every round in: first (3 of 5)."],
    )
