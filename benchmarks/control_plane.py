"""How many leases one coordinator hands out: the real one in a process of its own, mock workers in two others."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.control_job import RANGE_BYTES
from benchmarks.measure import CommandFailed, output
from benchmarks.results import LeaseRate, SchedulerCost
from support.servers import private_folder

TOP: Final = Path(__file__).parents[1]
MOCK_PROCESSES: Final = 2
JOB_SECONDS_MAX: Final = 60.0
LINE_BYTES_MAX: Final = 4096


def measure_leases(transport: str, workers: int, leases: int) -> LeaseRate:
    """Run a job of `leases` ranges with `workers` mock workers over `transport`, "ipc" or "tcp".

    Raises CommandFailed when the job does not complete in JOB_SECONDS_MAX.
    """
    deadline = time.monotonic() + JOB_SECONDS_MAX
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        url = f"ipc://{folder}/control" if transport == "ipc" else "tcp://127.0.0.1:0"
        coordinator = stack.enter_context(_started("control_job", url, str(workers)))
        url = _line(coordinator, deadline)
        mocks = []
        for number in range(MOCK_PROCESSES):
            share = (workers + number) // MOCK_PROCESSES
            mocks.append(stack.enter_context(_started("mock_workers", url, str(share), str(leases * RANGE_BYTES))))
        rate = msgspec.json.decode(_line(coordinator, deadline), type=LeaseRate)
        for process in (coordinator, *mocks):
            process.wait(max(deadline - time.monotonic(), 0.0))
    return rate


def measure_scheduler(workers: int, ranges: int) -> SchedulerCost:
    """The scheduler alone, in a process of its own. Raises CommandFailed."""
    told = output([sys.executable, "-m", "benchmarks.scheduler_cost", str(workers), str(ranges)], TOP)
    return msgspec.json.decode(told, type=SchedulerCost)


@contextmanager
def _started(module: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A module of ours as a process, which does not outlive the block."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *words]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=TOP, bufsize=0)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _line(process: subprocess.Popen[bytes], deadline: float) -> str:
    """The next line `process` prints. Raises CommandFailed if it ends first, or takes too long."""
    assert process.stdout is not None
    poller = select.poll()
    poller.register(process.stdout, select.POLLIN)
    if not poller.poll(1000 * max(deadline - time.monotonic(), 0.0)):
        raise CommandFailed(f"the coordinator with mock workers did not end within {JOB_SECONDS_MAX:g} s")
    line = process.stdout.readline(LINE_BYTES_MAX)
    if not line:
        raise CommandFailed("the coordinator with mock workers did not complete its job")
    return line.decode().strip()
