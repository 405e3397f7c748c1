"""Child processes: started, watched, ended, reaped."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.coordinator.child import Child, close_all
from support import processes
from support.waiting import wait_for


@contextlib.contextmanager
def running(*argv: str, shield: bool = False, new_session: bool = False) -> Iterator[Child]:
    child = Child(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        shield_from_group_signals=shield,
        new_session=new_session,
    )
    try:
        yield child
    finally:
        child.close()


def ended(child: Child) -> str:
    assert select.select([child.descriptor], [], [], 20)[0], "the pidfd did not become readable"
    assert child.ended()
    return child.story()


@pytest.mark.parametrize(
    ("script", "story", "succeeded"),
    [
        ("exit 0", "ended with exit status 0", True),
        ("exit 3", "ended with exit status 3", False),
        ("kill -9 $$", "was killed by SIGKILL", False),
        ("kill -11 $$", "was killed by SIGSEGV", False),
        ("kill -35 $$", "was killed by signal 35", False),
    ],
)
def test_the_end_of_a_child_is_told(script: str, story: str, succeeded: bool) -> None:
    with running("sh", "-c", script) as child:
        assert ended(child) == story
        assert child.succeeded is succeeded


def test_a_child_that_runs_has_not_ended_and_its_descriptor_is_quiet() -> None:
    with running("sleep", "100") as child:
        assert not child.ended()
        assert select.select([child.descriptor], [], [], 0)[0] == []
        assert child.story() == "still runs"


def test_a_killed_child_is_reaped_by_closing() -> None:
    with running("sleep", "100") as child:
        child.kill()
        assert ended(child) == "was killed by SIGKILL"
        pid = child.pid
    assert processes.state(pid) == ""


def test_closing_ends_what_still_runs_and_may_be_repeated() -> None:
    with running("sleep", "100") as child:
        child.close()
        assert child.descriptor == -1
        assert processes.state(child.pid) == ""
        child.close()
        child.kill()  # no effect, no error, and above all on nobody else


def test_signals_to_an_ended_child_go_nowhere() -> None:
    with running("true") as child:
        ended(child)
        child.send_signal(signal.SIGTERM)


def test_a_command_that_does_not_exist_is_told() -> None:
    with pytest.raises(UserError, match="/no/such: cannot be started: No such file or directory"):
        Child(["/no/such"], stdin=None, stdout=None)


def test_a_shielded_child_does_not_hear_what_its_group_hears() -> None:
    with running("sleep", "100", shield=True) as child:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child.send_signal(number)
        # All three are pending and blocked: SigPnd or ShdPnd and SigBlk of proc(5).
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        wanted = sum(1 << (number - 1) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        assert int(status["SigBlk"], 16) & wanted == wanted
        assert int(status["ShdPnd"], 16) & wanted == wanted
        assert not child.ended()
        child.kill()
        assert ended(child) == "was killed by SIGKILL"


def test_shielding_a_child_leaves_our_own_signals_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with running("true", shield=True):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_child_of_a_new_session_is_in_no_group_of_ours() -> None:
    with running("sleep", "100", new_session=True) as child:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    with running("sleep", "100") as child:
        assert os.getpgid(child.pid) == os.getpgid(0)


def test_children_that_leave_by_themselves_are_not_killed() -> None:
    with running("sh", "-c", "exit 0") as one, running("sh", "-c", "exit 7") as two:
        close_all([one, two], 20)
        assert one.story() == "ended with exit status 0"
        assert two.story() == "ended with exit status 7"


def test_children_that_stay_are_killed_when_patience_ends() -> None:
    with running("sleep", "100") as one, running("true") as two:
        start = time.monotonic()
        close_all([one, two], 0.1)
        assert time.monotonic() - start < 5
        assert one.story() == "was killed by SIGKILL"
        assert two.story() == "ended with exit status 0"


def test_a_stopped_child_is_ended_too() -> None:
    with running("sleep", "100") as child:
        child.send_signal(signal.SIGSTOP)
        wait_for("the child to stop", lambda: processes.state(child.pid) == "T")
        child.close()
        assert child.story() == "was killed by SIGKILL"
