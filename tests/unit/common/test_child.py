"""Child processes: started, watched, ended, reaped."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.child import NOTHING, Child, close_all, spawn
from nbdshard.common.errors import UserError
from support import processes
from support.waiting import WAIT_SECONDS, wait_for

PROLOGUE = """
import os, resource, signal, threading
from nbdshard.common.errors import UserError
from nbdshard.common.child import GROUP_SIGNALS, NOTHING, can_fork, fork, spawn

def ended(child):
    import select
    assert select.select([child.descriptor], [], [], 20)[0]
    assert child.ended()
    return child.story()
"""


def in_a_process_of_its_own(script: str) -> list[str]:
    """The lines that `script` prints. A test runner may have threads, and limits that others need."""
    words = [sys.executable, "-c", PROLOGUE + script]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@contextlib.contextmanager
def running(*argv: str, shield: bool = False, new_session: bool = False) -> Iterator[Child]:
    child = spawn(
        argv,
        stdin=NOTHING,
        stdout=NOTHING,
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
        spawn(["/no/such"], stdin=None, stdout=None)


def test_a_child_that_cannot_be_watched_is_ended_and_told() -> None:
    script = """
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    spawn(["sleep", "100"], stdin=None, stdout=None)
except UserError as error:
    print(error)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child is left")
"""
    assert in_a_process_of_its_own(script) == ["sleep: cannot be watched: Too many open files", "no child is left"]


def test_a_child_that_the_kernel_reaped_is_known_to_have_ended() -> None:
    """It does when SIGCHLD is ignored, which a process may inherit."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with running("sleep", "100") as child:
            child.kill()
            assert ended(child) == "ended with exit status 0"  # nobody knows better
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_child_gets_the_signals_as_a_shell_would_give_them() -> None:
    """The interpreter ignores SIGPIPE; `yes | head` would never end with that."""
    with running("sleep", "100") as child:
        ignored = int(processes.status(child.pid)["SigIgn"], 16)
        assert ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)) == 0


def test_a_child_has_the_standard_descriptors_and_no_other_of_ours(tmp_path: Path) -> None:
    inheritable = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(inheritable, True)
    try:
        with running("sleep", "100") as child:
            wait_for("the program to run", lambda: processes.command_line(child.pid) == "sleep 100")
            # While it is loaded, its libraries are open.
            wait_for("three descriptors", lambda: sorted(processes.descriptors(child.pid)) == [0, 1, 2])
    finally:
        os.close(inheritable)


def test_a_shielded_child_does_not_hear_what_its_group_hears() -> None:
    with running("sleep", "100", shield=True) as child:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child.send_signal(number)
        # All three are pending and blocked: SigPnd or ShdPnd and SigBlk of proc(5).
        status = processes.status(child.pid)
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
        assert time.monotonic() - start < WAIT_SECONDS
        assert one.story() == "was killed by SIGKILL"
        assert two.story() == "ended with exit status 0"


def test_a_stopped_child_is_ended_too() -> None:
    with running("sleep", "100") as child:
        child.send_signal(signal.SIGSTOP)
        wait_for("the child to stop", lambda: processes.state(child.pid) == "T")
        child.close()
        assert child.story() == "was killed by SIGKILL"


# -- a copy of this process --------------------------------------------------------------------------------------------


def test_a_copy_does_what_it_is_given_and_exits_with_what_that_returns() -> None:
    script = """
read_end, write_end = os.pipe()
seen = []
def body():
    seen.append(1)
    print("the copy writes", seen, flush=True)
    return 3
child = fork(body, "a copy", stdin=NOTHING, stdout=write_end)
print(ended(child), child.succeeded, seen)
print(os.read(read_end, 99).decode(), end="")
child.close()
"""
    assert in_a_process_of_its_own(script) == ["ended with exit status 3 False []", "the copy writes [1]"]


def test_a_copy_never_goes_on_with_what_its_parent_was_doing() -> None:
    script = """
import atexit
atexit.register(print, "at exit")
for what in (SystemExit(0), KeyboardInterrupt(), ValueError("a fault")):
    def body():
        raise what
    child = fork(body, "a copy", stdin=None, stdout=None)
    print(ended(child))
    child.close()
print("the parent goes on")
"""
    expected = ["ended with exit status 1"] * 3 + ["the parent goes on", "at exit"]
    assert in_a_process_of_its_own(script) == expected


def test_a_copy_has_none_of_our_descriptors_but_the_standard_ones() -> None:
    script = """
ends = os.pipe()
os.set_inheritable(ends[0], True)
signal.set_wakeup_fd(os.pipe2(os.O_NONBLOCK)[1])
def body():
    names = {number: os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)}
    held = [number for number in range(64) if os.path.lexists(f"/proc/self/fd/{number}")]
    os.write(2, repr((names[0], names[1] == names[2], held, signal.set_wakeup_fd(-1))).encode())
    return 0
os.dup2(1, 2)
child = fork(body, "a copy", stdin=NOTHING, stdout=2)
ended(child)
child.close()
"""
    assert in_a_process_of_its_own(script) == ["('/dev/null', True, [0, 1, 2], -1)"]


def test_a_copy_keeps_the_descriptors_it_is_to_have() -> None:
    script = """
ends = [os.open("/dev/null", os.O_RDONLY) for _ in range(9)]
def body():
    held = [number for number in range(3, 64) if os.path.lexists(f"/proc/self/fd/{number}")]
    return 7 if held == [ends[2], ends[5]] else 8
child = fork(body, "a copy", stdin=None, stdout=None, keep=[ends[5], ends[2]])
print(ended(child))
child.close()
"""
    assert in_a_process_of_its_own(script) == ["ended with exit status 7"]


def test_a_copy_hears_neither_the_group_nor_our_handlers() -> None:
    script = """
def handle(number, frame):
    os.write(1, b"our handler")
for number in GROUP_SIGNALS:
    signal.signal(number, handle)
def body():
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for number in GROUP_SIGNALS:
        os.kill(os.getpid(), number)
    print(blocked >= GROUP_SIGNALS, {signal.getsignal(number) for number in GROUP_SIGNALS}, flush=True)
    return 0
mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
child = fork(body, "a copy", stdin=None, stdout=None)
print(ended(child), signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask)
child.close()
"""
    assert in_a_process_of_its_own(script) == [
        "True {<Handlers.SIG_DFL: 0>}",
        "ended with exit status 0 True",
    ]


def test_a_copy_collects_no_garbage_of_its_parents() -> None:
    """What is garbage there may hold the number of a descriptor that means something else here."""
    script = """
import gc, socket
gc.disable()
class Cycle: pass
cycle = Cycle()
cycle.me, cycle.socket = cycle, socket.socket()
number = cycle.socket.fileno()
del cycle
def body():
    while os.open("/dev/null", os.O_RDONLY) != number: pass
    gc.collect()
    os.fstat(number)
    return 0
child = fork(body, "a copy", stdin=None, stdout=None)
print(ended(child))
child.close()
"""
    assert in_a_process_of_its_own(script) == ["ended with exit status 0"]


def test_a_process_with_threads_is_not_to_be_copied() -> None:
    script = """
print(can_fork())
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
print(can_fork())
end.set()
thread.join()
"""
    assert in_a_process_of_its_own(script) == ["True", "False"]


def test_a_copy_that_cannot_be_made_is_told() -> None:
    script = """
if os.getuid() == 0:  # nothing limits root
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    fork(lambda: 0, "a copy", stdin=None, stdout=None)
except UserError as error:
    print(error)
"""
    assert in_a_process_of_its_own(script) == ["a copy: cannot be started: Resource temporarily unavailable"]
