"""The launcher: what local workers are started with, and that none is left."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
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


def first_line_of_a_worker_started_ahead(prologue: str) -> str:
    """What a worker writes: a copy of the process that starts it, or a program of its own."""
    script = f"""
import os, select, sys
from nbdshard.coordinator.launcher import Launcher, WorkerCommand
{prologue}
def main(words):
    os.write(2, ("a copy with " + " ".join(words)).encode())
    return 0
launcher = Launcher(WorkerCommand("ipc:///x", "epoll", executable="/bin/echo"))
launcher.start_ahead(main)
select.select(launcher.descriptors, [], [], 20)
launcher.close()
"""
    words = [sys.executable, "-c", script]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == ""
    return ended.stderr.splitlines()[0]


def test_a_worker_started_ahead_is_a_copy_of_a_process_without_threads() -> None:
    line = first_line_of_a_worker_started_ahead("")
    assert line.startswith("a copy with worker --connect ipc:///x --name ")


def test_a_worker_started_ahead_is_a_program_where_there_are_threads() -> None:
    """As where a tool that looks into the interpreter has some of its own."""
    line = first_line_of_a_worker_started_ahead("import threading; threading.Timer(1, int).start()")
    assert line.startswith("-P -m nbdshard.cli.main worker --connect ipc:///x --name ")


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
