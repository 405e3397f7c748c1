"""The launcher: what local workers are started with, and that none is left."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.limits import SPARE_WORKERS_MAX
from nbdshard.coordinator.launcher import Launcher, WorkerCommand
from support import processes
from support.waiting import wait_for


def standing_in(tmp_path: Path, text: str) -> WorkerCommand:
    """A worker that is a shell script."""
    path = tmp_path / "worker"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return WorkerCommand("ipc:///x", "epoll", executable=str(path))


def sleep(_words: Sequence[str]) -> int:
    """A worker that is a copy of this process."""
    os.execvp("sleep", ["sleep", "100"])


def test_the_command_line_says_all_and_is_safe_from_the_current_directory() -> None:
    assert WorkerCommand("ipc:///run/x", "epoll", verbose=True).argv("ab" * 16, 77) == [
        *(sys.executable, "-P", "-m", "nbdshard.cli.main", "worker"),
        *("--connect", "ipc:///run/x", "--name", "ab" * 16, "--parent", "77", "--ring", "epoll", "--verbose"),
    ]


def test_a_worker_that_ends_is_reaped_once_with_its_story(tmp_path: Path) -> None:
    launcher = Launcher(standing_in(tmp_path, "exit 4"))
    try:
        name = launcher.start()
        assert select.select(launcher.descriptors, [], [], 20)[0]
        (departure,) = launcher.reap()
        assert departure.worker == name
        assert departure.reason.startswith(f"worker {name[:8]} (process ")
        assert departure.reason.endswith(") ended with exit status 4")
        assert launcher.reap() == []
        assert launcher.descriptors == []
    finally:
        launcher.close(0)


def test_a_killed_worker_is_told_as_such_and_its_fellow_lives(tmp_path: Path) -> None:
    launcher = Launcher(standing_in(tmp_path, "exec sleep 100"))
    try:
        one, two = launcher.start(), launcher.start()
        assert launcher.reap() == []
        launcher.kill(one)
        launcher.kill("unknown")
        assert select.select(launcher.descriptors, [], [], 20)[0]
        assert [departure.worker for departure in launcher.reap()] == [one]
        assert launcher.names() == [two]
    finally:
        launcher.close(0)
    assert launcher.descriptors == []


def test_a_worker_started_ahead_is_the_next_one_given_out(tmp_path: Path) -> None:
    launcher = Launcher(standing_in(tmp_path, "exec sleep 100"))
    try:
        launcher.start_ahead(sleep)
        (ahead,) = launcher.names()
        assert launcher.start() == ahead
        assert launcher.start() != ahead
        assert len(launcher.names()) == 2
    finally:
        launcher.close(0)


PROLOGUE = """
import os, resource, select, signal, threading
from nbdshard.coordinator.launcher import Launcher, WorkerCommand

def main(words):
    os.write(2, f"a copy with {' '.join(words)}, reading {os.readlink('/proc/self/fd/0')}\\n".encode())
    return 0

def close_when_all_have_ended():
    while launcher.descriptors:
        select.select(launcher.descriptors, [], [], 20)
        launcher.reap()
    launcher.close()

def children():
    return [int(pid) for pid in open("/proc/thread-self/children").read().split()]

launcher = Launcher(WorkerCommand("ipc:///x", "epoll", executable="/bin/echo"))
"""
COPY = r"a copy with worker --connect ipc:///x --name {} --parent \d+ --ring epoll, reading /dev/null"
PROGRAM = r"-P -m nbdshard.cli.main worker --connect ipc:///x --name {} --parent \d+ --ring epoll"


def in_a_process_of_its_own(script: str) -> tuple[list[str], list[str]]:
    """The lines `script` prints, and those of its workers. A test runner may have threads, and so cannot be copied."""
    words = [sys.executable, "-c", PROLOGUE + script]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    return ran.stdout.splitlines(), ran.stderr.splitlines()


def assert_match(lines: list[str], patterns: list[str]) -> None:
    """Each line is one of `patterns`, in whatever order."""
    assert len(lines) == len(patterns), lines
    for pattern in patterns:
        assert sum(re.fullmatch(pattern, line) is not None for line in lines) == 1, (pattern, lines)


def test_a_worker_started_ahead_is_a_copy_of_a_process_without_threads() -> None:
    ((name,), lines) = in_a_process_of_its_own("""
launcher.start_ahead(main)
print(launcher.start())
close_when_all_have_ended()
""")
    assert_match(lines, [COPY.format(name)])


def test_a_worker_started_ahead_is_a_program_where_there_are_threads() -> None:
    """As where a tool that looks into the interpreter has some of its own."""
    ((name, other), lines) = in_a_process_of_its_own("""
end = threading.Event()
threading.Thread(target=end.wait).start()
launcher.start_ahead(main, spares=1)
print(launcher.start(), launcher.start(), sep="\\n")
close_when_all_have_ended()
end.set()
""")
    assert_match(lines, [PROGRAM.format(name), PROGRAM.format(other)])


def test_spares_are_given_out_before_programs_are_started() -> None:
    (names, lines) = in_a_process_of_its_own("""
launcher.start_ahead(main, spares=2)
print(*[launcher.start() for _ in range(4)], sep="\\n")
close_when_all_have_ended()
""")
    assert len(set(names)) == 4
    assert_match(lines, [*(COPY.format(name) for name in names[:3]), PROGRAM.format(names[3])])


def test_a_spare_is_no_worker_until_it_is_given_out() -> None:
    ((counts,), lines) = in_a_process_of_its_own("""
launcher.start_ahead(main, spares=1)
print(len(children()), len(launcher.names()), len(launcher.descriptors))
close_when_all_have_ended()
""")
    assert counts == "2 1 1"
    assert len(lines) == 1


def test_a_spare_that_cannot_be_had_is_done_without() -> None:
    ((name, count), lines) = in_a_process_of_its_own("""
free = os.dup(0)
os.close(free)
before = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, before[1]))  # a pidfd, and nothing beside it
launcher.start_ahead(main, spares=1)
print(launcher.start())
resource.setrlimit(resource.RLIMIT_NOFILE, before)
print(len(children()))
close_when_all_have_ended()
""")
    assert_match(lines, [COPY.format(name)])
    assert count == "1"


def test_there_is_a_most_of_spares() -> None:
    ((count,), _) = in_a_process_of_its_own("""
launcher.start_ahead(main, spares=1000)
print(len(children()))
launcher.close()
""")
    assert int(count) == 1 + SPARE_WORKERS_MAX


def test_spares_that_nobody_wanted_leave_by_themselves_and_are_reaped() -> None:
    ((none_left,), _) = in_a_process_of_its_own("""
launcher.start_ahead(main, spares=3)
waits = children()
def kill(*_):
    raise AssertionError("a spare is killed that would have left")
signal.pidfd_send_signal = kill
launcher.close(20)
print(children())
""")
    assert none_left == "[]"


def test_a_program_takes_the_place_of_a_spare_that_was_killed() -> None:
    ((first, second, none_left), lines) = in_a_process_of_its_own("""
launcher.start_ahead(main, spares=1)
_, spare = children()
os.kill(spare, signal.SIGKILL)
os.waitid(os.P_PID, spare, os.WEXITED | os.WNOWAIT)
print(launcher.start(), launcher.start(), sep="\\n")
close_when_all_have_ended()
print(children())
""")
    assert_match(lines, [COPY.format(first), PROGRAM.format(second)])
    assert none_left == "[]"


def test_spares_do_not_outlive_a_coordinator_that_is_killed() -> None:
    script = """
launcher.start_ahead(main, spares=2)
print(*children(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with processes.adopting_orphans():
        words = [sys.executable, "-c", PROLOGUE + script]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == -signal.SIGKILL
        pids = [int(word) for word in ran.stdout.split()]
        assert len(pids) == 3
        wait_for("the copies to end", lambda: not any(processes.alive(pid) for pid in pids))
        for pid in pids:
            processes.reap(pid)


def test_a_worker_that_cannot_be_started_is_told() -> None:
    with pytest.raises(UserError, match="/no/such: cannot be started"):
        Launcher(WorkerCommand("ipc:///x", "auto", executable="/no/such")).start()


def test_workers_see_neither_our_input_nor_our_output_unless_they_are_the_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher(standing_in(tmp_path, "echo out; readlink /proc/self/fd/0"))
    try:
        launcher.start()
        wait_for("the worker to end", launcher.reap)
    finally:
        launcher.close(0)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "out\n/dev/null\n")


def test_a_worker_inherits_the_streams_it_copies(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = standing_in(tmp_path, "cat").executable
    command = WorkerCommand("ipc:///x", "auto", inherits_stdin=True, inherits_stdout=True, executable=path)
    keep = os.dup(0)
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"bytes of a stream")
        os.close(write_end)
        os.dup2(read_end, 0)
        launcher = Launcher(command)
        try:
            launcher.start()
            wait_for("the worker to end", launcher.reap)
        finally:
            launcher.close(0)
    finally:
        os.dup2(keep, 0)
        os.close(keep)
        os.close(read_end)
    assert capfd.readouterr().out == "bytes of a stream"


def sleeping_children() -> list[int]:
    return [pid for pid in processes.children(os.getpid()) if processes.command_line(pid) == "sleep 100"]


def test_workers_stay_in_our_process_group_for_ctrl_z(tmp_path: Path) -> None:
    launcher = Launcher(standing_in(tmp_path, "exec sleep 100"))
    try:
        launcher.start()
        # While the shell becomes the sleep, the process has no command line: wait for the sleep itself.
        (pid,) = wait_for("the worker to sleep", sleeping_children)
        assert os.getpgid(pid) == os.getpgid(0)
    finally:
        launcher.close(0)
