"""What /proc says about processes and sockets: whose children live, who listens where, how much memory is resident."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
LISTENING_FLAG = 0x10000  # /proc/net/unix: __SO_ACCEPTCON
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
TCP_LISTEN = "0A"  # /proc/net/tcp: TCP_LISTEN


def running() -> list[int]:
    """Pids of every process that is visible, zombies included."""
    return [int(entry) for entry in os.listdir(PROC) if entry.isdigit()]


def state(pid: int) -> str:
    """One letter of proc(5): R, S, D, Z ...; "" when the process is gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def threads_are(pid: int, letters: str) -> bool:
    """Whether each thread of the process is in one of these states; the first one says nothing of the others."""
    return {each.rpartition(")")[2].split()[0] for each in _thread_stats(pid)} <= set(letters)


def _thread_stats(pid: int) -> list[str]:
    """/proc/PID/task/TID/stat of every thread that has not ended meanwhile."""
    found = []
    for name in os.listdir(PROC / str(pid) / "task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append((PROC / str(pid) / "task" / name / "stat").read_text())
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    return state(pid) not in ("", "Z", "X")


def parent(pid: int) -> int:
    """The parent's pid; 0 when the process is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the command's closing parenthesis (a command may itself hold blanks)."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(pid: int) -> list[int]:
    """Direct children of `pid`, zombies included."""
    tasks = PROC / str(pid) / "task"
    try:
        return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it is gone, or the kernel keeps no such list
        return [other for other in running() if parent(other) == pid]


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children(queue.pop())
        found += below
        queue += below
    return found


def command_line(pid: int) -> str:
    """The arguments, joined by blanks; "" for a zombie or when the process is gone."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def with_environment(entry: str) -> list[int]:
    """Living processes whose environment holds exactly `entry` (`NAME=value`)."""
    wanted = entry.encode()
    found = []
    for pid in running():
        try:
            environment = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in environment and alive(pid):
            found.append(pid)
    return found


def resident_peak_bytes(pid: int) -> int:
    """The most memory that was ever resident in the process, libraries included; 0 when it is gone."""
    kib = _status(pid, "VmHWM")
    return int(kib[0]) * 1024 if kib else 0


def bytes_written(pid: int) -> int:
    """What the process has written to files so far, also to its page cache; 0 when it is gone."""
    try:
        lines = (PROC / str(pid) / "io").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.partition(":")[2]) for line in lines if line.startswith("wchar:"))


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal was sent to the process and not yet delivered: the next one of its kind would be lost."""
    words = _status(pid, "SigPnd") + _status(pid, "ShdPnd")
    return any(int(word, 16) >> (number - 1) & 1 for word in words)


def status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status; none when the process is gone."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


def _status(pid: int, field: str) -> list[str]:
    return status(pid).get(field, "").split()


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """Open descriptors of a process and what each refers to."""
    found: dict[int, str] = {}
    folder = PROC / str(pid) / "fd"
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return found
    for name in names:
        try:
            found[int(name)] = os.readlink(folder / name)
        except (FileNotFoundError, ProcessLookupError):
            continue  # the one that listed the folder, or closed meanwhile
    return found


def piped_bytes(pid: int, capacity_min: int) -> int:
    """What is in those pipes of the process that hold so many bytes at least: the smaller ones carry no payload."""
    found = {target: number for number, target in descriptors(pid).items() if target.startswith("pipe:")}
    held = 0
    for number in found.values():
        try:
            end = os.open(PROC / str(pid) / "fd" / str(number), os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue  # it was closed meanwhile
        try:
            if fcntl.fcntl(end, fcntl.F_GETPIPE_SZ) >= capacity_min:
                held += struct.unpack("i", fcntl.ioctl(end, termios.FIONREAD, bytes(4)))[0]
        finally:
            os.close(end)
    return held


def listens_on_unix(path: Path) -> bool:
    """Whether some process listens on the unix socket `path` (without connecting to it)."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[7] == str(path) and int(fields[3], 16) & LISTENING_FLAG:
            return True
    return False


def listening_tcp_ports(pid: int) -> set[int]:
    """TCP ports that the process itself listens on, in its own network namespace."""
    own = {target for target in descriptors(pid).values() if target.startswith("socket:")}
    ports = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / str(pid) / "net" / table).read_text().splitlines()
        except OSError:  # it is gone, or the kernel has no such protocol
            continue
        for line in lines[1:]:
            fields = line.split()
            if fields[3] == TCP_LISTEN and f"socket:[{fields[9]}]" in own:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal the whole process group that `pid` leads; nothing happens when it is gone."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Inside, a daemon that a child leaves behind becomes a child of this process, to be reaped by it."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def reap(pid: int) -> None:
    """Collect an ended child; nothing happens when it is none of ours."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
