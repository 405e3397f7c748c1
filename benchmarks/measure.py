"""Run one command and look at it: wall time, the CPU of all its processes, and the memory of each of them.

Wall time runs from before the process is made until its exit is seen. CPU is what wait4(2) says: user and system time
of the process, its threads (kernel threads that work for its io_uring too) and every descendant that was waited for.
"""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results import Memory, Sample
from support import processes

COMMAND_SECONDS_MAX = 300.0
SAMPLE_SECONDS = 0.02  # between looks at the memory of a run that is not timed
CLOCK_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
ERROR_CHARACTERS_MAX = 300


class CommandFailed(Exception):
    """A command that was measured did not end well; the text is one line."""


@dataclass(slots=True)
class Watch:
    """What was seen of the processes of one run while they lived, by process id."""

    peaks: dict[int, int] = field(default_factory=dict)
    cpu_seconds: dict[int, float] = field(default_factory=dict)

    def look(self, pid: int) -> None:
        """Look at `pid` and all its descendants."""
        for each in (pid, *processes.descendants(pid)):
            peak = processes.resident_peak_bytes(each)
            if peak:  # it lives
                self.peaks[each] = peak
                self.cpu_seconds[each] = _cpu_seconds(each)


def timed(command: Sequence[str], servers: Sequence[int] = ()) -> Sample:
    """Run `command`, without looking at it. `servers`: the processes at its ends. Raises CommandFailed."""
    before = sum(map(_cpu_seconds, servers))
    sample = _run(command, None)
    return Sample(sample.wall, sample.cpu, sum(map(_cpu_seconds, servers)) - before)


def watched(name: str, command: Sequence[str]) -> tuple[Memory, str]:
    """Run `command`, looking at the memory of its processes; and a remark if not all their CPU time was told of.

    Raises CommandFailed.
    """
    watch = Watch()
    sample = _run(command, watch)
    main, *workers = watch.peaks.values() or [0]  # the first that was looked at is the one that was started
    seen = sum(watch.cpu_seconds.values())
    is_lost = seen - sample.cpu > CLOCK_TICK_SECONDS * 2 * len(watch.cpu_seconds)
    remark = f"{name}: its processes used {seen:.2f} s of CPU, wait4(2) tells of {sample.cpu:.2f} s" if is_lost else ""
    return Memory(name, main, workers), remark


def output(command: Sequence[str], folder: Path = Path("/")) -> str:
    """What `command` writes to its standard output, run in `folder`; nothing is measured. Raises CommandFailed."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired:
        raise CommandFailed(_late(command)) from None
    if ended.returncode:
        raise CommandFailed(_why(command, ended.returncode, ended.stderr or ended.stdout))
    return ended.stdout


def _run(command: Sequence[str], watch: Watch | None) -> Sample:
    with tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True, cwd="/"
        )
        try:
            _await_exit(process.pid, watch, start + COMMAND_SECONDS_MAX)
            wall = time.monotonic() - start
        except BaseException:
            processes.kill_group(process.pid)
            process.wait()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
        if wall >= COMMAND_SECONDS_MAX:
            raise CommandFailed(_late(command))
        if process.returncode:
            errors.seek(0)
            raise CommandFailed(_why(command, process.returncode, errors.read().decode(errors="replace")))
    return Sample(wall, usage.ru_utime + usage.ru_stime)


def _await_exit(pid: int, watch: Watch | None, deadline: float) -> None:
    """Return when the process has ended; it is not reaped. At the deadline it is killed, with its whole group."""
    descriptor = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                processes.kill_group(pid)
                left = COMMAND_SECONDS_MAX
            if poller.poll(1000 * (left if watch is None else min(left, SAMPLE_SECONDS))):
                return
            if watch is not None:
                watch.look(pid)
    finally:
        os.close(descriptor)


def _cpu_seconds(pid: int) -> float:
    """User and system time of the process itself; 0 when it is gone."""
    try:
        stat = (processes.PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * CLOCK_TICK_SECONDS


def _late(command: Sequence[str]) -> str:
    return f"`{command[0]}` did not end within {COMMAND_SECONDS_MAX:g} s"


def _why(command: Sequence[str], code: int, said: str) -> str:
    lines = said.strip().splitlines()
    last = lines[-1][:ERROR_CHARACTERS_MAX] if lines else "it said nothing"
    return f"`{command[0]}` ended with {code}: {last}"
