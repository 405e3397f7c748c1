"""Pipes as a SPLICE has them at its other end, in every state that matters to it."""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.waiting import WAIT_SECONDS

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 32  # in a pipe; one send to a socket takes 16, which is all that one without a reader has room for


class Pipe:
    """Both ends of one; they block, so that nothing but the flags of each call keeps it from waiting for the pipe."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.capacity = fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, PAGES * PAGE)

    def close(self) -> None:
        self.close_reading()
        self.close_writing()

    def close_reading(self) -> None:
        if self.reading >= 0:
            os.close(self.reading)
        self.reading = -1

    def close_writing(self) -> None:
        if self.writing >= 0:
            os.close(self.writing)
        self.writing = -1

    @property
    def content(self) -> int:
        """Bytes in it."""
        count = array.array("i", [0])
        fcntl.ioctl(self.reading, termios.FIONREAD, count)
        return count[0]

    def fill(self) -> None:
        """Until there is no room for one more page."""
        while select.select([], [self.writing], [], 0)[1]:
            os.write(self.writing, bytes(PAGE))

    def drain(self) -> bytes:
        """Everything that is in it."""
        return os.read(self.reading, content) if (content := self.content) else b""

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Have the pipe's lock held, as by a splice that waits for a slow disk, until the function given is called.

        It is held by another splice, which cannot go on because nobody reads the socket it goes to. The pipe must be
        empty; when the lock is free again one page of zeroes is left in it.
        """
        ours, theirs = socket.socketpair()
        theirs.settimeout(WAIT_SECONDS)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PAGE)
        self.fill()
        length = self.capacity - PAGE
        holder = threading.Thread(target=_splice_all, args=(self.reading, ours, length))
        holder.start()
        taken = 0

        def release() -> None:
            nonlocal taken
            while taken < length:
                taken += len(theirs.recv(length))
            holder.join()

        try:
            theirs.recv(1, socket.MSG_PEEK)  # so it has begun, and cannot end
            yield release
        finally:
            release()
            theirs.close()
            ours.close()


def _splice_all(reading: int, target: socket.socket, length: int) -> None:
    while length:
        length -= os.splice(reading, target.fileno(), length)


def tasks_in_the_kernel() -> int:
    """Threads of this process, the kernel's workers for it included, that wait for a lock or a disk (proc(5), "D")."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        count += state == "D"
    return count
