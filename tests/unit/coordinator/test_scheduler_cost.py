"""The cost of an event does not grow with the number of workers and ranges."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise

from nbdshard.common.limits import (
    BEATS_PER_TICK_MAX,
    CHECKPOINT_SECONDS,
    COVERED_LEASES_MAX,
    KIB,
    WRITTEN_LEASES_JOB_MAX,
    WRITTEN_LEASES_MAX,
)
from nbdshard.common.messages import AliveToo, Flush, Lease
from nbdshard.coordinator.instructions import Instruction, Send
from nbdshard.coordinator.scheduler import Scheduler
from support.schedules import (
    alive,
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


def bytes_allocated(action: Callable[[], object]) -> int:
    """How much memory `action` needs at most: a copy of something large, which is no line of its own, shows here."""
    tracemalloc.start()
    try:
        action()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak


def busy(workers: int, ranges: int) -> tuple[Scheduler, list[Lease]]:
    """A distributed job in which every worker holds two leases."""
    disk = server(ranges * UNIT)
    scheduler = Scheduler(job(workers=workers, connections=workers, range_size=UNIT, local_workers=False), 0.0)
    followed: list[Lease] = []
    for number in range(workers):
        name = f"w{number}"
        scheduler.message(name, hello(name), 0.0)
        scheduler.message(name, opened(disk, disk), 0.0)
        followed += leases_in(scheduler.message(name, wanted(2), 0.0))
    return scheduler, followed


def a_turn(workers: int, ranges: int, turns_before: int = 0) -> Callable[[], object]:
    """One turn of one worker in the middle of the crew, which has had some turns before."""
    scheduler, leases = busy(workers, ranges)
    name, lease = f"w{workers // 2}", leases[workers // 2 * 2]
    for _ in range(turns_before):
        (lease,) = leases_in(work(scheduler, name, lease))

    def turn() -> None:
        scheduler.message(name, progress(lease, 100), 1.0)
        work(scheduler, name, lease)
        scheduler.deadline()
        scheduler.status()

    return turn


def work(scheduler: Scheduler, name: str, lease: Lease) -> list[Instruction]:
    """`name` has written `lease` and wants another."""
    return scheduler.message(name, written(lease), 1.0) + scheduler.message(name, wanted(1), 1.0)


def work_until_flush(scheduler: Scheduler, name: str, *leases: Lease) -> tuple[list[Lease], list[Lease], Flush]:
    """What `name`, which holds `leases`, has written and what it holds when it is asked to flush."""
    todo, done, flushes = list(leases), list[Lease](), list[Flush]()
    while not flushes:
        done.append(todo.pop(0))
        followed = work(scheduler, name, done[-1])
        flushes = flushes_in(followed)
        todo += leases_in(followed)
    return done, todo, flushes[0]


def test_an_event_costs_the_same_with_a_thousand_workers_and_a_million_ranges() -> None:
    assert lines_run(a_turn(1000, 1_000_000)) <= lines_run(a_turn(4, 1000)) * 1.1


def test_an_event_needs_the_same_memory_with_a_thousand_workers_and_a_million_ranges() -> None:
    assert bytes_allocated(a_turn(1000, 1_000_000)) <= bytes_allocated(a_turn(4, 1000)) + 2 * KIB


def test_an_event_costs_the_same_late_in_a_job() -> None:
    early, late = lines_run(a_turn(4, 1_000_000)), lines_run(a_turn(4, 1_000_000, turns_before=4000))
    assert late <= early * 1.1


def test_heartbeats_cost_the_same_with_a_thousand_workers() -> None:
    def beats(workers: int) -> int:
        scheduler, _ = busy(workers, 10_000)
        return lines_run(lambda: scheduler.tick(scheduler.deadline()))

    assert beats(1000) <= beats(BEATS_PER_TICK_MAX) * 1.1


def test_every_worker_of_a_large_crew_has_its_heartbeats_in_time() -> None:
    workers, period = 3 * BEATS_PER_TICK_MAX + 1, job().heartbeat_seconds
    scheduler, _ = busy(workers, 10_000)
    now = 0.0
    beats: dict[str, list[float]] = {f"w{number}": [] for number in range(workers)}
    while now < 5 * period:
        now = scheduler.deadline()
        followed = scheduler.tick(now)
        for item in followed:
            assert isinstance(item, Send) and isinstance(item.message, AliveToo)
            beats[item.worker].append(now)
            scheduler.message(item.worker, alive(), now)
        assert len(followed) <= BEATS_PER_TICK_MAX
    for times in beats.values():
        assert times[0] <= 2 * period
        assert max(later - earlier for earlier, later in pairwise(times)) <= period * (1 + BEATS_PER_TICK_MAX / workers)


def test_a_worker_is_asked_to_flush_before_one_message_could_not_name_its_leases() -> None:
    scheduler, leases = busy(1, 3 * WRITTEN_LEASES_MAX)
    done, _, flush = work_until_flush(scheduler, "w0", *leases)
    assert len(done) == WRITTEN_LEASES_MAX
    assert scheduler.status().phase == "copying"
    scheduler.message("w0", flushed(flush, *done), 0.0)
    scheduler.validate()
    assert scheduler.status().counters.total == WRITTEN_LEASES_MAX * UNIT


def test_the_workers_of_a_large_crew_flush_sooner_so_that_few_written_leases_are_remembered() -> None:
    scheduler, leases = busy(1000, 1_000_000)
    done, _, _ = work_until_flush(scheduler, "w7", *leases[14:16])
    assert len(done) == WRITTEN_LEASES_JOB_MAX // 1000


def test_a_worker_that_does_not_answer_its_flush_gets_no_more_leases_in_the_end() -> None:
    scheduler, leases = busy(1000, 1_000_000)
    before_flush = WRITTEN_LEASES_JOB_MAX // 1000
    done, todo, flush = work_until_flush(scheduler, "w7", *leases[14:16])
    while todo:
        done.append(todo.pop(0))
        followed = work(scheduler, "w7", done[-1])
        assert flushes_in(followed) == []
        todo += leases_in(followed)
    assert len(done) <= 2 * before_flush + 1
    followed = scheduler.message("w7", flushed(flush, *done[:before_flush]), 1.0)
    assert len(leases_in(followed)) == 1, "what the flush covered makes room again"
    scheduler.validate()


def test_so_much_is_covered_behind_a_flush_without_an_answer_that_nobody_else_is_asked_to_flush() -> None:
    """What waits for an older flush is remembered lease by lease: the bound of that memory."""
    scheduler, (held, _, *leases) = busy(2, 4 * COVERED_LEASES_MAX)
    scheduler.message("w0", written(held), 0.0)
    (unanswered,) = flushes_in(scheduler.tick(CHECKPOINT_SECONDS))
    covered = 0
    while covered < COVERED_LEASES_MAX:
        done, leases, flush = work_until_flush(scheduler, "w1", *leases)
        scheduler.message("w1", flushed(flush, *done), 1.0)
        covered += len(done)
    for _ in range(WRITTEN_LEASES_MAX):
        leases += leases_in(followed := work(scheduler, "w1", leases.pop(0)))
        assert flushes_in(followed) == []
    assert flushes_in(scheduler.tick(CHECKPOINT_SECONDS + 1.0)) == []
    assert scheduler.deadline() > CHECKPOINT_SECONDS + 1.0, "it is not asked again and again whether it may"
    scheduler.message("w0", flushed(unanswered, held), CHECKPOINT_SECONDS + 1.0)
    assert len(flushes_in(scheduler.tick(CHECKPOINT_SECONDS + 2.0))) == 1
    scheduler.validate()
