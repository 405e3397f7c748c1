"""Cut the connections of another process, as a network or a firewall between two machines would.

The descriptor is taken out of the process (pidfd_getfd(2)), so nothing has to stand between the two ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

from support import processes

SYS_PIDFD_GETFD = 438  # the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def is_allowed() -> bool:
    """Whether descriptors can be taken at all: a container may forbid it."""
    one, other = socket.socketpair()
    with one, other:
        try:
            taken = _take(os.getpid(), one.fileno())
        except PermissionError:
            return False
        if taken is not None:
            taken.close()
        return taken is not None


def connections(pid: int) -> list[int]:
    """Numbers of the descriptors of `pid` that are sockets with a peer."""
    sockets = [number for number, target in processes.descriptors(pid).items() if target.startswith("socket:")]
    return [number for number in sorted(sockets) if _has_peer(pid, number)]


def inodes(pid: int) -> set[str]:
    """Those sockets by their names in proc(5): others than before are other connections."""
    targets = processes.descriptors(pid)
    return {targets[number] for number in connections(pid) if number in targets}


def cut(pid: int, number: int) -> bool:
    """Reset the connection `number` of `pid`: both ends hear of it. False when it is gone already."""
    end = _take(pid, number)
    if end is None:
        return False
    with end:
        if end.family == socket.AF_UNIX:
            return _shut(end)
        # Connecting to nowhere throws the connection away with what is in it, and sends a reset (tcp(7)).
        nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
        return bool(_libc.connect(end.fileno(), nowhere, len(nowhere)) == 0)


def _shut(end: socket.socket) -> bool:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


def _has_peer(pid: int, number: int) -> bool:
    end = _take(pid, number)
    if end is None:
        return False
    with end:
        try:
            end.getpeername()
        except OSError:
            return False
        return end.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


def _take(pid: int, number: int) -> socket.socket | None:
    """A descriptor of ours for the same socket; None when either is gone."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        own = _libc.syscall(SYS_PIDFD_GETFD, process, number, 0)
    finally:
        os.close(process)
    if own < 0:
        error = ctypes.get_errno()
        if error == errno.EPERM:
            raise PermissionError(error, "descriptors of other processes cannot be taken here")
        return None
    return socket.socket(fileno=own)
