"""The kernel's own pipes: the system calls that `pipes.Plumbing` names. A dull shell."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import termios
from collections.abc import Sequence
from typing import Final

from nbdshard.common.limits import YIELDS_MAX
from nbdshard.worker.pipes import SAMPLE_BYTES, Pipe

_FILL_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
SAMPLE_OFFSET: Final = 0x158  # inside the smallest unit: in much real data the first bytes of every block are zero
_NOTHING: Final = bytes(4)
_SEND_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | socket.MSG_MORE)

_libc = ctypes.CDLL(None, use_errno=True)
_send = _libc.send
_send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_send.restype = ctypes.c_ssize_t
_tee = _libc.tee
_tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
_tee.restype = ctypes.c_ssize_t


_readv = _libc.readv
_readv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_readv.restype = ctypes.c_ssize_t


class _IoVec(ctypes.Structure):
    """struct iovec of sys/uio.h."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Scatter:
    """Where readv(2) puts `count` units of `unit` bytes: SAMPLE_BYTES of each side by side, the rest on one heap.

    So a mebibyte is looked at without driving everything else out of the CPU's cache.
    """

    def __init__(self, unit: int, count: int) -> None:
        self.unit = unit
        self.count = count
        self.samples = (ctypes.c_char * (count * SAMPLE_BYTES))()
        self._heap = ctypes.create_string_buffer(unit)
        start, heap = ctypes.addressof(self.samples), ctypes.addressof(self._heap)
        before = min(SAMPLE_OFFSET, unit - SAMPLE_BYTES)
        vectors = [(heap, before)]
        for index in range(count):
            after = unit - SAMPLE_BYTES if index + 1 < count else unit - SAMPLE_BYTES - before
            vectors += [(start + index * SAMPLE_BYTES, SAMPLE_BYTES), (heap, after)]
        self.vectors = (_IoVec * len(vectors))(*(_IoVec(*vector) for vector in vectors))


class SystemPlumbing:
    """The kernel's own pipes."""

    def __init__(self) -> None:
        self._look: Pipe | None = None  # what `peek` tees into: empty between two calls
        self._scatter: Scatter | None = None  # of the last `sample`; they are nearly always alike
        self._null = -1
        self._answer = bytearray(4)  # an int of the kernel's

    def open_pipe(self, size: int) -> Pipe | int:
        try:
            read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            return -(error.errno or errno.EMFILE)
        try:
            capacity = fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, size)
        except OSError:  # EPERM: the user's share of pipe memory is used up. It works as it is, if it is large enough
            capacity = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
        return Pipe(read_end, write_end, capacity)

    def close_pipe(self, pipe: Pipe) -> None:
        os.close(pipe.read_end)
        os.close(pipe.write_end)

    def close(self) -> None:
        """Close what `peek` and `discard` use. Idempotent."""
        if self._look is not None:
            self.close_pipe(self._look)
            self._look = None
        if self._null >= 0:
            os.close(self._null)
            self._null = -1

    def fill(self, pipe: Pipe, number: int, count: int) -> int:
        moved, pipe.is_full, has_arrived = 0, False, False
        while moved < count:
            try:
                piece = os.splice(number, pipe.write_end, count - moved, flags=_FILL_FLAGS)
            except OSError as error:
                piece = -(error.errno or errno.EIO)
            if piece > 0:
                moved += piece
                pipe.held += piece
            elif piece != -errno.EAGAIN or has_arrived:
                # There was something to take before it was tried. Whatever else may be wrong, a receive will tell.
                pipe.is_full = piece == -errno.EAGAIN or moved > 0
                return moved or piece
            if moved < count:
                has_arrived = self._arrived(number) or self._arrives(number)
                if not has_arrived:
                    return moved or piece
        return moved

    def _arrives(self, number: int) -> bool:
        """Let the sender run, if it waits for a processor: whether there is something to read then.

        A server sends 1 MiB in five pieces, as its socket's buffer bids. To wait for each of them in the ring costs
        more than to stand aside for a moment (tried, 8 GiB: not at all 3.8 s and 2.4 s of CPU, once 3.9 and 2.3, twice
        3.3 and 1.9, four times 3.3 and 2.0, sixteen times 3.2 and 1.9).
        """
        for _ in range(YIELDS_MAX):
            os.sched_yield()
            if self._arrived(number):
                return True
        return False

    def drain(self, pipe: Pipe, number: int, count: int, *, more: bool) -> int:
        moved = _splice(pipe.read_end, number, count, _FILL_FLAGS | os.SPLICE_F_MORE if more else _FILL_FLAGS)
        if moved > 0:
            pipe.held -= moved
        return moved

    def peek(self, pipe: Pipe, buffer: memoryview) -> int:
        look = self._look_pipe(pipe.capacity)
        if isinstance(look, int):
            return look
        teed: int = _tee(pipe.read_end, look.write_end, pipe.held, os.SPLICE_F_NONBLOCK)
        if teed < 0:
            return -ctypes.get_errno()
        at = 0
        while at < teed:
            at += os.readv(look.read_end, [buffer[at:teed]])
        return teed

    def _look_pipe(self, capacity: int) -> Pipe | int:
        """An empty pipe for copies of what is in another; -errno where there is none."""
        if self._look is not None and self._look.held:  # it could not be emptied
            self.close_pipe(self._look)
            self._look = None
        if self._look is None:
            opened = self.open_pipe(capacity)
            if isinstance(opened, int):
                return opened
            self._look = opened
        return self._look

    def sample(self, pipe: Pipe, unit: int) -> bytes:
        look = self._look_pipe(pipe.capacity)
        if isinstance(look, int):
            return b""
        scatter = self._scatter
        if scatter is None or (scatter.unit, scatter.count) != (unit, pipe.held // unit):
            scatter = self._scatter = Scatter(unit, pipe.held // unit)
        teed: int = _tee(pipe.read_end, look.write_end, pipe.held, os.SPLICE_F_NONBLOCK)
        if teed <= 0:
            return b""
        read: int = _readv(look.read_end, scatter.vectors, len(scatter.vectors)) if teed == pipe.held else 0
        look.held = teed - max(0, read)
        self.discard(look)
        return bytes(scatter.samples) if read == pipe.held else b""

    def read(self, pipe: Pipe, buffer: memoryview) -> int:
        try:
            moved = os.readv(pipe.read_end, [buffer])
        except OSError as error:
            return -(error.errno or errno.EIO)
        pipe.held -= moved
        return moved

    def discard(self, pipe: Pipe) -> int:
        if self._null < 0:
            try:
                self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            except OSError as error:
                return -(error.errno or errno.EIO)
        discarded = 0
        while pipe.held:
            moved = self.drain(pipe, self._null, pipe.held, more=False)
            if moved <= 0:
                return moved
            discarded += moved
        return discarded

    def receive(self, number: int, buffers: Sequence[memoryview]) -> int:
        try:
            return os.readv(number, buffers)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def send(self, number: int, pieces: Sequence[bytes | memoryview], *, more: bool) -> int:
        first = pieces[0]
        if more and len(pieces) == 1 and isinstance(first, bytes):  # a header, to share a segment with its payload
            sent: int = _send(number, first, len(first), _SEND_FLAGS)
            return sent if sent >= 0 else -ctypes.get_errno()
        try:
            return os.writev(number, pieces)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _arrived(self, number: int) -> bool:
        """Whether there is something to read at socket `number` (FIONREAD)."""
        try:
            fcntl.ioctl(number, termios.FIONREAD, self._answer)
        except OSError:
            return False  # whatever is wrong with it, the next call that reads will say
        return self._answer != _NOTHING


def _splice(number_in: int, number_out: int, count: int, flags: int) -> int:
    """splice(2): bytes, or -errno."""
    try:
        return os.splice(number_in, number_out, count, flags=flags)
    except OSError as error:
        return -(error.errno or errno.EIO)
