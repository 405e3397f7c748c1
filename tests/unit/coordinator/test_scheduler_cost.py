"""The cost of an event does not grow with the number of workers and ranges."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nbdshard.common.limits import KIB, WRITTEN_LEASES_MAX
from nbdshard.coordinator.scheduler import Scheduler
from support.schedules import (
    flushed,
    flushes_in,
    hello,
    job,
    leases_in,
    opened,
    progress,
    server,
    wanted,
    written,
)

UNIT = 64 * KIB


def lines_run(action: Callable[[], object]) -> int:
    """How many lines of Python `action` runs: a clock that load does not disturb."""
    count = 0

    def trace(*_: object) -> object:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def busy(workers: int, ranges: int) -> tuple[Scheduler, list[object]]:
    """A distributed job in which every worker holds two leases."""
    disk = server(ranges * UNIT)
    scheduler = Scheduler(job(workers=workers, connections=workers, range_size=UNIT, local_workers=False), 0.0)
    followed: list[object] = []
    for number in range(workers):
        name = f"w{number}"
        scheduler.message(name, hello(name), 0.0)
        scheduler.message(name, opened(disk, disk), 0.0)
        followed += leases_in(scheduler.message(name, wanted(2), 0.0))
    return scheduler, followed


def cost(workers: int, ranges: int) -> int:
    """Lines run for one turn of one worker in the middle of the crew."""
    scheduler, leases = busy(workers, ranges)
    name, lease = f"w{workers // 2}", leases[workers // 2 * 2]

    def turn() -> None:
        scheduler.message(name, progress(lease, 100), 1.0)  # type: ignore[arg-type]
        scheduler.message(name, written(lease), 1.0)  # type: ignore[arg-type]
        scheduler.message(name, wanted(1), 1.0)
        scheduler.deadline()
        scheduler.status()

    return lines_run(turn)


def test_an_event_costs_the_same_with_a_thousand_workers_and_a_million_ranges() -> None:
    small, large = cost(4, 1000), cost(1000, 1_000_000)
    assert large <= small * 1.5


def test_a_worker_is_asked_to_flush_before_one_message_could_not_name_its_leases() -> None:
    scheduler, (first, second) = busy(1, 3 * WRITTEN_LEASES_MAX)
    todo, done, flushes = [first, second], [], []
    while not flushes:
        done.append(todo.pop(0))
        followed = scheduler.message("w0", written(done[-1]), 0.0)  # type: ignore[arg-type]
        followed += scheduler.message("w0", wanted(2), 0.0)
        flushes = flushes_in(followed)
        todo += leases_in(followed)
    assert len(done) == WRITTEN_LEASES_MAX
    assert scheduler.status().phase == "copying"
    scheduler.message("w0", flushed(flushes[0], *done), 0.0)  # type: ignore[arg-type]
    scheduler.validate()
    assert scheduler.status().counters.total == WRITTEN_LEASES_MAX * UNIT
