"""The ring over io_uring, by python-liburing. Imported only where io_uring is used (`choose` does it).

Measured on kernel 6.18, two cores, a ping-pong of 64 bytes with another process, microseconds for a round trip:

    ===========================================  =========
    waiting in io_uring, COOP_TASKRUN             13.9-14.0
    epoll on the ring's descriptor, COOP_TASKRUN  14.2-14.5
    waiting in io_uring, DEFER_TASKRUN            14.6
    epoll on a registered eventfd, DEFER_TASKRUN  15.2-15.7
    ===========================================  =========

So the ring always waits in epoll: it costs next to nothing, and epoll_wait releases the interpreter's lock, which
python-liburing does not while it waits. With the lock held no thread could run a CALL, nor call `wake`.
DEFER_TASKRUN is not used: its task work does not wake who polls the ring's descriptor (tried: it hangs). With
COOP_TASKRUN the work is done on the way out of any system call of this thread, and it does wake epoll_wait.

SIGPIPE: the interpreter ignores it from its start, which holds for kernel threads that write on our behalf too; a
program that sets it back to SIG_DFL must not use the ring.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from collections.abc import Iterable
from errno import EAGAIN, EBUSY, ECANCELED, EINTR
from typing import Any

import liburing as L

from nbdshard.common.limits import RING_EVENTS_MAX, RING_OPERATIONS_MAX, RING_RETRY_SECONDS, RING_THREADS_MAX
from nbdshard.common.ring.base import CALL, CLOSE, EDGE, POLL, READ, RECEIVE, SEND, SPLICE_FLAGS, WATCH, Pins, RingBase
from nbdshard.common.ring.interface import Operation, Splice

ENTRIES = RING_OPERATIONS_MAX // 2  # of the submission queue; the completion queue has twice as many
FLAGS = (
    L.IORING_SETUP_SINGLE_ISSUER | L.IORING_SETUP_COOP_TASKRUN | L.IORING_SETUP_TASKRUN_FLAG | L.IORING_SETUP_SUBMIT_ALL
)
CURRENT_POSITION = (1 << 64) - 1  # the offset -1: where the file is, for streams that have a position
NO_OFFSET = -1  # of a pipe
ERESTARTSYS = 512  # the kernel's own: told to stop before anything moved, so that it can be done over
RETRY = 1 << 62  # set in the user_data of a poll that stands in for an operation that was told EAGAIN


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer (stable since 3.11); only `obj` is ever set here."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("rest", ctypes.c_ssize_t * 9),
    )


def _iovec_leaks() -> bool:
    view = memoryview(bytearray(1))
    before = sys.getrefcount(view)
    L.Iovec([view])
    return sys.getrefcount(view) > before


# python-liburing 2026.3.30 gets the buffer of each memoryview it puts into an Iovec and never releases it: view and
# buffer would live for ever (tried: 100,000 views of 1000 bytes were 137 MB). So the release is made up for, if
# the version at hand needs it. Releasing a memoryview's export only counts it down and looks at nothing but `obj`.
IOVEC_LEAKS = _iovec_leaks()
_leaked = _PyBuffer()
_leaked_address = ctypes.addressof(_leaked)
_release = ctypes.pythonapi.PyBuffer_Release
_release.argtypes = (ctypes.c_void_p,)
_release.restype = None


def iovec_of(pins: Pins) -> object:
    """An Iovec of `pins`, which the caller must hold for as long as the kernel may use their memory."""
    iovec = L.Iovec(pins)
    if IOVEC_LEAKS:
        for pin in pins:
            _leaked.obj = id(pin)
            _release(_leaked_address)
    return iovec


SYS_IO_URING_REGISTER = 427  # on every architecture
REGISTER_IOWQ_MAX_WORKERS = 19  # IORING_REGISTER_IOWQ_MAX_WORKERS, which python-liburing leaves out
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def bound_workers(ring_fd: int, count: int) -> None:
    """At most `count` kernel threads for what may wait and is not done to a regular file: SPLICE into a pipe.

    Without it the kernel starts one for each that waits (tried: 252, for 300 pieces of a file not in memory). Those for
    the rest it bounds by itself, by four for each processor. Raises OSError, of io_uring_register(2).
    """
    counts = (ctypes.c_uint * 2)(0, count)  # bounded work, where 0 changes nothing, and unbounded
    if _syscall(SYS_IO_URING_REGISTER, ring_fd, REGISTER_IOWQ_MAX_WORKERS, counts, len(counts)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class UringRing(RingBase):
    """One io_uring. Entries are prepared and submitted inside `wait` only, so nothing is ever left half submitted.

    user_data is the operation's ticket, with RETRY added for the poll before another try, and 0 for a cancellation.
    """

    name = "io_uring"
    socket_flags = (
        0  # RWF_*; with RWF_NOWAIT every kernel says EAGAIN as only old ones do by themselves (a test's double)
    )

    def __init__(self) -> None:
        """Raises OSError: io_uring_setup(2), mmap(2), io_uring_register(2), epoll_create(2), pipe(2)."""
        self._ring = L.Ring()
        L.io_uring_queue_init(ENTRIES, self._ring, FLAGS)
        try:
            bound_workers(self._ring.ring_fd, RING_THREADS_MAX)
            self._epoll = select.epoll()
            super().__init__()
        except OSError:  # no more descriptors
            L.io_uring_queue_exit(self._ring)
            raise
        self._epoll.register(self._ring.ring_fd, select.EPOLLIN)
        self._epoll.register(self._waker.number, select.EPOLLIN)
        self._cqe = L.Cqe()
        self._iovecs: list[object] = []  # until submitted: then the kernel has its own copy (FEAT_SUBMIT_STABLE)
        self._prepared = 0  # entries in the submission queue
        self._started = 0  # the last ticket that left the queue
        self._again: list[int] = []  # user_data to prepare once more
        self._cancels: list[int] = []  # user_data to cancel
        self._unwanted: set[int] = set()  # tickets that a cancellation was asked for

    def missing_opcodes(self, names: Iterable[str]) -> list[str]:
        """Those of `names` ("IORING_OP_READV") that the kernel does not have."""
        probe = L.io_uring_get_probe_ring(self._ring)
        codes = L.io_uring_op.__members__
        return [name for name in names if not L.io_uring_opcode_supported(probe, codes[name])]

    # -- one turn of the loop

    def _turn(self, timeout: float) -> bool:
        if self._queue or self._again or self._cancels or self._prepared:
            self._start()
            self._submit()
            self._harvest()
            if self._done:
                if not self._watching:
                    return False
                timeout = 0.0  # operations that are done must not starve those that watch
            if self._queue or self._again or self._cancels or self._prepared:
                timeout = min(timeout, RING_RETRY_SECONDS)  # something new, or the kernel had no memory just now
        elif self._done:
            timeout = 0.0  # cancelled since the last wait
        woken = completed = False
        for number, events in self._epoll.poll(timeout if timeout > 0.0 else 0.0, RING_EVENTS_MAX):
            watch = self._watching.get(number)
            if watch is not None:
                watch.result = events
                self._done.append(watch)
            elif number == self._waker.number:
                self._waker.drain()
                woken = True
            else:
                completed = True
        # The ring's descriptor is readable, or a thread has woken us, as long as there is something to take.
        if completed or woken or self._closing:
            self._harvest()
        return not (woken or self._done)

    def _harvest(self) -> None:
        self._reap()
        self._collect_threads()
        if self._closing:
            self._end_closes()

    def _start(self) -> None:
        """Prepare everything that waits for it, as far as there is room."""
        for source in (self._again, self._queue):
            count = 0
            for user_data in source:
                if not self._start_one(user_data):
                    break
                count += 1
            del source[:count]
        while self._cancels:
            sqe = self._entry()
            if sqe is None:
                break
            L.io_uring_prep_cancel64(sqe, self._cancels.pop(), 0)
            sqe.user_data = 0
            sqe.flags = L.IOSQE_CQE_SKIP_SUCCESS

    def _start_one(self, user_data: int) -> bool:
        """Start the operation of `user_data`; False if there is no room now."""
        ticket = user_data & ~RETRY
        held = self._held.get(ticket)
        if held is None:  # cancelled since
            return True
        operation, pins = held
        kind = operation.kind
        if kind is CALL:
            self._start_call(operation)
        elif kind is CLOSE:
            self._submit()  # what was prepared for the descriptor before
            if self._prepared:
                return False
            self._started = ticket
            self._begin_close(operation)
        elif kind is WATCH:
            number = operation.descriptor.number  # type: ignore[union-attr]  # `submit` has checked it
            try:
                self._epoll.register(number, operation.mask | EDGE)
                self._watching[number] = operation
            except OSError as error:  # the user's share of watches is used up (epoll(7))
                self._complete(ticket, -(error.errno or 0))
        elif ticket in self._unwanted:
            self._complete(ticket, -ECANCELED)
        else:
            sqe = self._entry()
            if sqe is None:
                return False
            self._prepare(sqe, user_data, operation, pins)
        if ticket > self._started:
            self._started = ticket
        return True

    def _prepare(self, sqe: Any, user_data: int, operation: Operation, pins: Pins) -> None:
        kind = operation.kind
        descriptor = operation.descriptor
        assert descriptor is not None  # `submit` has checked it
        number = descriptor.number
        if user_data & RETRY:
            L.io_uring_prep_poll_add(sqe, number, select.POLLIN if kind is RECEIVE else select.POLLOUT)
        elif pins:
            iovec = iovec_of(pins)
            self._iovecs.append(iovec)
            offset = CURRENT_POSITION if kind is RECEIVE or kind is SEND else operation.offset
            flags = self.socket_flags if descriptor.is_socket else 0
            if kind is RECEIVE or kind is READ:
                L.io_uring_prep_readv(sqe, number, iovec, offset, flags)
            else:
                L.io_uring_prep_writev(sqe, number, iovec, offset, flags)
        elif kind is POLL:
            L.io_uring_prep_poll_add(sqe, number, operation.mask)
        elif isinstance(operation, Splice):
            pipe, length, offset = operation.pipe, operation.length, operation.offset
            if operation.into_pipe:
                L.io_uring_prep_splice(sqe, number, offset, pipe, NO_OFFSET, length, SPLICE_FLAGS)
            else:
                L.io_uring_prep_splice(sqe, pipe, NO_OFFSET, number, offset, length, SPLICE_FLAGS)
        else:
            L.io_uring_prep_fsync(sqe, number, L.IORING_FSYNC_DATASYNC)
        sqe.user_data = user_data

    def _entry(self) -> Any:
        """An empty submission entry, or None: the queue is full and the kernel takes nothing just now."""
        sqe = L.io_uring_get_sqe(self._ring)
        if sqe is None:
            self._submit()
            sqe = L.io_uring_get_sqe(self._ring)
            if sqe is None:
                return None
        self._prepared += 1
        return sqe

    def _submit(self) -> None:
        while self._prepared:
            try:
                self._prepared -= L.io_uring_submit(self._ring)
            except OSError as error:
                if error.errno == EINTR:
                    continue
                if error.errno in (EAGAIN, EBUSY):  # no memory, or completions first: the next turn tries again
                    return
                raise
        self._iovecs.clear()

    def _reap(self) -> None:
        """Complete what the kernel has finished."""
        if L.io_uring_cq_has_overflow(self._ring):  # cancellations come on top of RING_OPERATIONS_MAX
            L.io_uring_get_events(self._ring)
        cqe, held, count = self._cqe, self._held, 0
        try:
            for _ in L.CqeIter(self._ring, cqe):
                entry = cqe[0]
                count += 1
                user_data = entry.user_data
                try:
                    result = entry.res
                except OSError as error:
                    result = -(error.errno or 0)
                if result >= 0 and user_data in held:
                    self._complete(user_data, result)
                elif user_data:
                    self._reap_unusual(user_data, result)
        finally:
            if count:
                L.io_uring_cq_advance(self._ring, count)
        if self._unwanted:
            self._unwanted.intersection_update(held)

    def _reap_unusual(self, user_data: int, result: int) -> None:
        """A completion that failed, or that may not be the operation's end: that of the poll in its place.

        EAGAIN: io_uring waits by itself for what is not ready, but older kernels do not if the descriptor has
        O_NONBLOCK and its driver knows no attempt without waiting (terminals).
        ERESTARTSYS: a cancellation found a SPLICE out of a pipe just about to begin (tried: one in ten thousand). It
        is done over, by which it is seen to be unwanted and ends as every other cancelled operation.
        """
        ticket = user_data & ~RETRY
        held = self._held.get(ticket)
        if held is None:
            return
        kind = held[0].kind
        if result == -ERESTARTSYS or (user_data & RETRY and result >= 0):
            self._again.append(ticket)
        elif result == -EAGAIN and not user_data & RETRY and (kind is RECEIVE or kind is SEND):
            self._again.append(user_data | RETRY)
        else:
            self._complete(ticket, result)

    # -- what RingBase asks for

    def _is_queued(self, ticket: int) -> bool:
        return ticket > self._started

    def _cancel_started(self, ticket: int, operation: Operation) -> None:
        if operation.kind is WATCH:
            self._end_watch(ticket, operation)
        elif operation.kind is not CALL:  # a function that runs on a thread runs to its end
            self._unwanted.add(ticket)
            self._cancels += (ticket, ticket | RETRY) if operation.kind in (RECEIVE, SEND) else (ticket,)

    def _free(self) -> None:
        if self._held:
            # The kernel may still write to these buffers: they must outlive the ring, so they are never freed.
            _abandoned.append(self._held)
        self._epoll.close()
        L.io_uring_queue_exit(self._ring)


_abandoned: list[object] = []
