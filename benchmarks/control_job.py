"""The real coordinator with workers that come from elsewhere: `python -m benchmarks.control_job URL WORKERS`.

Prints two lines: the address it listens at, and when the job is over what was measured, as JSON. What is measured
lies between the first range that was reported written and the last, by the coordinator's own display.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import msgspec

from benchmarks.results import LeaseRate
from nbdshard.common.channel import CoordinatorChannel
from nbdshard.common.control_url import parse_control_url
from nbdshard.common.limits import MIB
from nbdshard.common.machine import machine_id
from nbdshard.common.messages import EndpointAddress, JobOptions
from nbdshard.common.signals import SignalWatch
from nbdshard.coordinator.job import Job, Outcome, Status, Verdict
from nbdshard.coordinator.progress import NoDisplay
from nbdshard.coordinator.service import Shell, run_job

RANGE_BYTES = MIB  # below what the tail is split to: every range has this length
NOWHERE = EndpointAddress("nbd", "nbd://mock.example/")  # nobody opens it
OPTIONS = JobOptions(request_size=MIB, requests=64, queue_size=16 * MIB, sparse_unit=None)


@dataclass(frozen=True, slots=True)
class Mark:
    """How far the job was, and when."""

    written: int  # bytes
    wall: float
    cpu: float  # of this process, ZeroMQ's thread included


class Stopwatch(NoDisplay):
    """A display that looks at the clocks when the first and the last range are written."""

    def __init__(self) -> None:
        self.first: Mark | None = None
        self.last: Mark | None = None

    def show(self, status: Status, now: float) -> None:
        """The loop calls this at every turn."""
        written = status.counters.total
        if written and (self.first is None or self.last is None or self.last.written < written):
            self.last = Mark(written, time.perf_counter(), time.process_time())
            self.first = self.first or self.last

    def rate(self, workers: int, transport: str) -> LeaseRate:
        """What was measured. There must have been more than one turn with news."""
        if self.first is None or self.last is None or self.first is self.last:
            raise RuntimeError("the job ended before anything could be measured")
        return LeaseRate(
            transport,
            workers,
            (self.last.written - self.first.written) // RANGE_BYTES,
            self.last.wall - self.first.wall,
            self.last.cpu - self.first.cpu,
        )


def mock_job(workers: int, machine: str) -> Job:
    """A job between two ends that nobody opens, whose workers come from elsewhere."""
    return Job(
        uuid="benchmark",
        epoch=1,
        source=NOWHERE,
        destinations=(NOWHERE,),
        options=OPTIONS,
        connections=workers,
        workers=workers,
        range_size=RANGE_BYTES,
        local_workers=False,
        machine=machine,
    )


def run(url: str, workers: int) -> tuple[Outcome, LeaseRate]:
    """Listen at `url`, say so, and run a job for `workers` workers."""
    watch = Stopwatch()
    control_url = parse_control_url(url)
    channel = CoordinatorChannel(control_url)
    try:
        print(channel.url, flush=True)
        with SignalWatch() as signals:
            outcome = run_job(mock_job(workers, machine_id()), Shell(channel, None, lambda _: None, (), watch, signals))
    finally:
        channel.close()
    return outcome, watch.rate(workers, control_url.scheme)


if __name__ == "__main__":
    the_outcome, the_rate = run(sys.argv[1], int(sys.argv[2]))
    if the_outcome.verdict is not Verdict.COMPLETE:
        sys.exit(f"{the_outcome.verdict.name}: {the_outcome.error}")
    print(msgspec.json.encode(the_rate).decode())
