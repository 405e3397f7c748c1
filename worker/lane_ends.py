"""The two ends of a lane: an NBD connection or a local file, by system calls that wait. Dull shells, for one thread.

A source waits in the kernel for all of a payload at once, LANE_LOOK_SECONDS at most at a time, so that its thread comes
to look up now and then. What is sent to a target is never left to the kernel to send later: it takes what it takes, and
the thread looks at the clock before the next piece (see lane.py).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

from nbdshard.common.errors import BugError
from nbdshard.common.limits import LANE_LOOK_SECONDS
from nbdshard.common.nbd.quick import ODD, Quick
from nbdshard.worker.lending import ENDED, NOTHING
from nbdshard.worker.pipes import Pipe

_MOVE: Final = os.SPLICE_F_MOVE
_MOVE_NOW: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_WHOLE: Final = socket.MSG_WAITALL
_NOW: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_NOW_AND_MORE: Final = _NOW | socket.MSG_MORE
_TIMEVAL: Final = struct.Struct("ll")
_LOOK: Final = _TIMEVAL.pack(int(LANE_LOOK_SECONDS), int(LANE_LOOK_SECONDS % 1 * 1_000_000))
_NO_LIMIT: Final = _TIMEVAL.pack(0, 0)
_LOOK_MS: Final = LANE_LOOK_SECONDS * 1000
_ACKS: Final = 64  # taken at once


class _Socket:
    """What both ends over a socket share. The descriptor stays its owner's."""

    def __init__(self, number: int, quick: Quick) -> None:
        self.error = 0
        self.number = number
        self.quick = quick
        self.socket: socket.socket = _NO_SOCKET

    def open(self) -> None:
        self.socket = socket.socket(fileno=self.number)

    def close(self) -> None:
        self.socket.detach()

    def fail(self, error: OSError) -> int:
        self.error = error.errno or errno.EIO
        return ENDED


_NO_SOCKET = socket.socket.__new__(socket.socket)


class SocketSource(_Socket):
    """An NBD connection that READs are sent on."""

    def __init__(self, number: int, quick: Quick, request_bytes: int) -> None:
        super().__init__(number, quick)
        self._head = bytearray(quick.head_bytes)
        self._filled = 0
        self._request_bytes = request_bytes
        self._is_unix = False

    def open(self) -> None:
        super().open()
        options = self.socket
        self._is_unix = options.family == socket.AF_UNIX
        os.set_blocking(self.number, True)
        options.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LOOK)
        if self._is_unix:  # whose rule is "that much, or all that was asked for": over TCP the last piece would hang
            options.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, self._request_bytes)

    def close(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _NO_LIMIT)
        if self._is_unix:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        os.set_blocking(self.number, False)
        super().close()

    def ask(self, cookie: int, start: int, length: int) -> int:
        header = self.quick.read(cookie, start, length)
        while header:
            try:
                header = header[self.socket.send(header, _NOW) :]
            except BlockingIOError:
                _wait(self.number, select.POLLOUT)
            except OSError as error:
                return error.errno or errno.EIO
        return 0

    def reply(self, starts: Sequence[int], lengths: Sequence[int]) -> int:
        head = self._head
        try:
            self._filled = self.socket.recv_into(head, 0, _WHOLE)
        except BlockingIOError:
            self._filled = 0
            return NOTHING
        except OSError as error:
            self._filled = 0
            return self.fail(error)
        if self._filled < len(head):
            return ODD if self._filled else ENDED
        cookie = self.quick.head(head, starts, lengths)
        if cookie >= 0:
            self._filled = 0
        return cookie

    def fill(self, pipe: Pipe, start: int, count: int) -> int:
        try:
            return os.splice(self.number, pipe.write_end, count, flags=_MOVE)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def receive(self, view: memoryview, start: int) -> int:
        try:
            return self.socket.recv_into(view, 0, _WHOLE)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def unread(self) -> bytes:
        return bytes(self._head[: self._filled])


class SocketTarget(_Socket):
    """An NBD connection that WRITEs are sent on."""

    gathers = True

    def __init__(self, number: int, quick: Quick) -> None:
        super().__init__(number, quick)
        self._answers = bytearray(quick.ack_bytes * _ACKS)
        self._view = memoryview(self._answers)
        self._filled = 0

    def begin(self, cookie: int, start: int, length: int, payload: memoryview | None) -> int:
        header = self.quick.write(cookie, start, length)
        try:
            if payload is None:
                sent = self.socket.send(header, _NOW_AND_MORE)
            else:
                sent = self.socket.sendmsg((header, payload), (), _NOW)
        except OSError as error:
            return -(error.errno or errno.EIO)
        if sent < len(header):
            return self._send_rest(header[sent:])
        return sent - len(header)

    def _send_rest(self, data: bytes) -> int:
        """The rest of a few bytes, which a socket that had room for their beginning takes soon."""
        while data:
            _wait(self.number, select.POLLOUT)
            try:
                data = data[self.socket.send(data, _NOW) :]
            except BlockingIOError:
                continue
            except OSError as error:
                return -(error.errno or errno.EIO)
        return 0

    def message(self, cookie: int, start: int, length: int, *, is_zero: bool) -> bytes:
        return self.quick.zero(cookie, start, length) if is_zero else self.quick.write(cookie, start, length)

    def gather(self, pieces: Sequence[bytes | memoryview]) -> int:
        try:
            return self.socket.sendmsg(pieces, (), _NOW)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def drain(self, pipe: Pipe, count: int) -> int:
        try:
            return os.splice(pipe.read_end, self.number, count, flags=_MOVE_NOW)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def send(self, view: memoryview) -> int:
        try:
            return self.socket.send(view, _NOW)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def wait_for_room(self) -> None:
        _wait(self.number, select.POLLOUT)

    def flush(self, cookie: int) -> int:
        request = self.quick.flush(cookie)
        try:
            sent = self.socket.send(request, _NOW)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return self._send_rest(request[sent:])

    def wait_for_acks(self) -> None:
        _wait(self.number, select.POLLIN)

    def acks(self, starts: Sequence[int], lengths: Sequence[int]) -> list[int]:
        size, answers = self.quick.ack_bytes, self._answers
        try:
            count = self.socket.recv_into(self._view[self._filled :], 0, _NOW)
        except BlockingIOError:
            return _NO_ACKS
        except OSError as error:
            return [self.fail(error)]
        if not count:
            return [ENDED]
        filled = self._filled + count
        cookies, at = [], 0
        while at + size <= filled:
            cookie = self.quick.ack(answers, at, starts, lengths)
            if cookie in cookies:  # a second answer, before the first was counted
                cookie = ODD
            cookies.append(cookie)
            if cookie == ODD:
                break
            at += size
        rest = filled - at
        if rest:
            answers[:rest] = answers[at:filled]
        self._filled = rest
        return cookies

    def unread(self) -> bytes:
        return bytes(self._answers[: self._filled])


_NO_ACKS: Final[list[int]] = []


class FileSource:
    """A local file that is read by position. It answers in the order it was asked in."""

    def __init__(self, number: int) -> None:
        self.error = 0
        self._number = number
        self._asked: deque[int] = deque()

    def open(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        self._asked.clear()

    def ask(self, cookie: int, start: int, length: int) -> int:
        del start, length
        self._asked.append(cookie)
        return 0

    def reply(self, starts: Sequence[int], lengths: Sequence[int]) -> int:
        del starts, lengths
        return self._asked.popleft()

    def fill(self, pipe: Pipe, start: int, count: int) -> int:
        try:
            return os.splice(self._number, pipe.write_end, count, offset_src=start, flags=_MOVE)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def receive(self, view: memoryview, start: int) -> int:
        try:
            return os.preadv(self._number, [view], start)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def unread(self) -> bytes:
        return b""


class FileTarget:
    """A local file that is written by position: what it takes is acknowledged."""

    gathers = False

    def __init__(self, number: int) -> None:
        self.error = 0
        self._number = number
        self._at = 0
        self._left = 0
        self._cookie = 0
        self._acks: list[int] = []

    def open(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        self._acks.clear()

    def begin(self, cookie: int, start: int, length: int, payload: memoryview | None) -> int:
        del payload
        self._cookie, self._at, self._left = cookie, start, length
        return 0

    def drain(self, pipe: Pipe, count: int) -> int:
        try:
            return self._wrote(os.splice(pipe.read_end, self._number, count, offset_dst=self._at, flags=_MOVE))
        except OSError as error:
            return -(error.errno or errno.EIO)

    def send(self, view: memoryview) -> int:
        try:
            return self._wrote(os.pwritev(self._number, [view], self._at))
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _wrote(self, count: int) -> int:
        self._at += count
        self._left -= count
        if not self._left:
            self._acks.append(self._cookie)
        return count or -errno.EIO

    def message(self, cookie: int, start: int, length: int, *, is_zero: bool) -> bytes:
        raise BugError("a file takes no messages")

    def gather(self, pieces: Sequence[bytes | memoryview]) -> int:
        raise BugError("a file takes no messages")

    def wait_for_room(self) -> None:
        """A file has room, or fails."""

    def flush(self, cookie: int) -> int:
        raise BugError("a file is flushed by its connection, not by a lane")

    def wait_for_acks(self) -> None:
        """They are there."""

    def acks(self, starts: Sequence[int], lengths: Sequence[int]) -> list[int]:
        del starts, lengths
        cookies, self._acks = self._acks, []
        return cookies

    def unread(self) -> bytes:
        return b""


def _wait(number: int, events: int) -> None:
    poller = select.poll()
    poller.register(number, events)
    poller.poll(_LOOK_MS)
