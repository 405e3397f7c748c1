"""The pipe that payload goes through past user space, between a connection's socket and a file.

A pipe of a mebibyte is 256 slots, each for a page or a part of one: it may be full sooner than it looks.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

from nbdshard.common import logs
from nbdshard.common.limits import SERVED_PIPE_BYTES, SPLICE_BYTES_MIN
from nbdshard.common.nbd.payload import Elsewhere
from nbdshard.server.backends.base import Place

_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_MORE: Final = _FLAGS | os.SPLICE_F_MORE


class Conduit:
    """One pipe, opened when it is first needed. `held`: bytes that are in it. One thread's."""

    _is_told = False  # that pipes are short: once, for all

    def __init__(self) -> None:
        self.held = 0
        self._read_end = self._write_end = -1
        self._capacity = 0
        self._is_refused = False

    def close(self) -> None:
        """Idempotent; what is in it is gone."""
        if self._read_end >= 0:
            os.close(self._read_end)
            os.close(self._write_end)
        self._read_end = self._write_end = -1
        self._capacity = self.held = 0

    def is_open_for(self, length: int) -> bool:
        """Whether there is a pipe, and `length` bytes of whole pages fit."""
        if self._read_end < 0 and not self._is_refused:
            self._open()
        return length <= self._capacity

    def _open(self) -> None:
        try:
            self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._refuse(f"no pipe can be opened: {error.strerror}")
            return
        for size in SERVED_PIPE_BYTES:
            try:
                self._capacity = fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, size)
                return
            except OSError:  # EPERM: more than everybody may have, or than is left of this user's share
                self._capacity = fcntl.fcntl(self._write_end, fcntl.F_GETPIPE_SZ)
        if self._capacity < SPLICE_BYTES_MIN:
            capacity = self._capacity
            self.close()
            self._refuse(f"a pipe can hold only {capacity} bytes (pipe-max-size, pipe-user-pages-soft)")

    def _refuse(self, why: str) -> None:
        self._is_refused = True
        if not Conduit._is_told:
            Conduit._is_told = True
            logs.warning(f"payload goes through memory, which is slower: {why}")

    # -- from a file to a socket --------------------------------------------------------------------------------------

    def fill(self, place: Place, length: int) -> bool:
        """`length` bytes out of a file. False, and the pipe is empty, where they do not fit. Raises OSError."""
        if not self.is_open_for(length + place.offset % mmap.PAGESIZE):
            return False
        try:
            while self.held < length:
                count = os.splice(
                    place.number, self._write_end, length - self.held, offset_src=place.offset + self.held, flags=_FLAGS
                )
                if not count:
                    raise OSError(errno.EIO, "the file has become shorter")
                self.held += count
        except BlockingIOError:  # full
            self.close()
            return False
        except OSError as error:
            self.close()
            if error.errno == errno.EINVAL:  # a file that cannot be spliced
                self._refuse("the file system cannot splice")
                return False
            raise
        return True

    def send(self, number: int, *, more: bool) -> int:
        """What the socket takes of what is in the pipe; 0 where it takes nothing now. `more` follows at once."""
        try:
            count = os.splice(self._read_end, number, self.held, flags=_MORE if more else _FLAGS)
        except BlockingIOError:
            return 0
        self.held -= count
        return count

    # -- from a socket to a file --------------------------------------------------------------------------------------

    def receive(self, number: int, count: int) -> int | None:
        """At most `count` bytes out of the socket: how many; 0 at its end, None where none has come or none fits."""
        try:
            count = os.splice(number, self._write_end, count, flags=_FLAGS)
        except BlockingIOError:
            return None
        self.held += count
        return count

    def store(self, number: int, offset: int, length: int) -> None:
        """The first `length` bytes in the pipe into a file. Raises OSError, and the pipe is empty then."""
        at, end = offset, offset + length
        try:
            while at < end:
                try:
                    count = os.splice(self._read_end, number, end - at, offset_dst=at, flags=os.SPLICE_F_MOVE)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    count = self._copy_some(number, at, end - at)
                at += count
                self.held -= count
        except OSError:
            self.close()
            raise

    def _copy_some(self, number: int, at: int, length: int) -> int:
        """The same for a file that cannot be spliced to."""
        data = memoryview(os.read(self._read_end, min(length, SPLICE_BYTES_MIN)))
        done = 0
        while done < len(data):
            done += os.pwrite(number, data[done:], at + done)
        return done


class PipeRun(Elsewhere):
    """What is in a conduit, as a piece of an answer."""

    __slots__ = ("conduit",)

    def __init__(self, conduit: Conduit) -> None:
        super().__init__(conduit.held)
        self.conduit = conduit
