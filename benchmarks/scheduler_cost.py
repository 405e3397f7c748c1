"""The scheduler alone: `python -m benchmarks.scheduler_cost WORKERS RANGES`.

A whole job of so many workers and ranges, message by message, with no channel, no clock and no process in between. Only
the time inside the scheduler counts, and only for messages about ranges: how often a worker joins does not depend on
their number. In a process of its own, because whatever else a process holds costs its garbage collector time. Prints
one line of JSON.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator

import msgspec

from benchmarks.control_job import RANGE_BYTES, mock_job
from benchmarks.mock_worker import MockWorker, mock_disk
from benchmarks.results import SchedulerCost
from nbdshard.common.messages import FromCoordinator, FromWorker, Goodbye, Hello, Opened
from nbdshard.coordinator.instructions import Finish, Instruction, Send
from nbdshard.coordinator.job import Verdict
from nbdshard.coordinator.scheduler import Scheduler
from support import processes

MACHINE = "here"
ABOUT_WORKERS = (Hello, Opened, Goodbye)


def run_alone(workers: int, ranges: int) -> SchedulerCost:
    """Run the job. Raises RuntimeError if it does not complete."""
    disk = mock_disk(ranges * RANGE_BYTES)
    crew = {name: MockWorker(name, MACHINE, disk) for name in (f"w{number}" for number in range(workers))}
    scheduler = Scheduler(mock_job(workers, MACHINE), 0.0)
    scheduler.start()
    said: list[tuple[str, FromWorker]] = [(name, worker.hello()) for name, worker in crew.items()]
    events, cpu = 0, 0.0
    while said:
        followed: list[Instruction] = []
        for name, message in said:
            if isinstance(message, ABOUT_WORKERS):
                followed += scheduler.message(name, message, 0.0)
        about_ranges = [(name, message) for name, message in said if not isinstance(message, ABOUT_WORKERS)]
        start = time.process_time()
        for name, message in about_ranges:
            followed += scheduler.message(name, message, 0.0)
        cpu += time.process_time() - start
        events += len(about_ranges)
        said = [(worker, message) for worker, sent in _sent(followed) for message in crew[worker].answers(sent)]
    if scheduler.outcome is None:
        raise RuntimeError("nobody has anything to say, and the job is not over")
    return SchedulerCost(workers, ranges, events, cpu, processes.resident_peak_bytes(os.getpid()))


def _sent(instructions: Iterable[Instruction]) -> Iterator[tuple[str, FromCoordinator]]:
    """Who is sent what. Raises RuntimeError if the job ends otherwise than well."""
    for instruction in instructions:
        match instruction:
            case Send(worker, message):
                yield worker, message
            case Finish(outcome) if outcome.verdict is not Verdict.COMPLETE:
                raise RuntimeError(f"the job ended as {outcome.verdict.name}: {outcome.error}")
            case _:
                pass


if __name__ == "__main__":
    print(msgspec.json.encode(run_alone(int(sys.argv[1]), int(sys.argv[2]))).decode())
