"""The ring over epoll, for where io_uring is refused; the same promises, kept by system calls of our own.

Each descriptor is registered once, edge-triggered for both directions, when it first has to be waited for: after that
an operation costs one system call if it can be done at once, and no epoll_ctl ever. An operation is tried when it is
started; only after EAGAIN does it wait for an edge, so no edge can be missed. File I/O goes to threads.

How a stream is read and written depends on what it is:

- Non-blocking descriptors (all sockets should be): readv, writev.
- Blocking ones (standard input or output that other processes share; O_NONBLOCK would be switched on for them too):
  preadv2 and pwritev2 with RWF_NOWAIT. Where the kernel has no such thing for the file (terminals; pipes before Linux
  6.4) poll first, then read what is there, or write at most PIPE_BUF bytes: neither waits, unless another process
  that shares the stream takes the data, or the room, in between.
- Regular files and block devices, which are always "ready" and may wait for a disk: threads, for SPLICE too.
"""

from __future__ import annotations

import os
import select
import stat
from enum import Enum, auto
from errno import EAGAIN, ECANCELED, EOPNOTSUPP
from functools import partial

from nbdshard.common.limits import RING_EVENTS_MAX
from nbdshard.common.ring.base import (
    CALL,
    CLOSE,
    EDGE,
    POLL,
    READ,
    RECEIVE,
    SEND,
    SPLICE_FLAGS,
    SYNC,
    WATCH,
    Pins,
    RingBase,
)
from nbdshard.common.ring.interface import Descriptor, Operation, Splice
from nbdshard.common.ring.threads import Job, system_call

EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI | select.EPOLLET
ENDED = select.EPOLLERR | select.EPOLLHUP  # reported whether asked for or not, and both directions must look
READABLE = select.EPOLLIN | ENDED
WRITABLE = select.EPOLLOUT | ENDED
POSITION = -1  # to preadv2 and pwritev2: as readv and writev, at the current position if there is one


class Mode(Enum):
    """How a stream is read and written; see the module's text."""

    NON_BLOCKING = auto()  # readv, writev
    NO_WAIT = auto()  # preadv2, pwritev2 with RWF_NOWAIT
    POLL_FIRST = auto()  # poll, then read, or write a little
    THREAD = auto()  # it never says EAGAIN, it just takes its time


class Watch:
    """One attached descriptor, and the tickets of the operations that wait for it; 0 for none."""

    __slots__ = ("number", "mode", "registered", "reader", "writer", "pollers")

    def __init__(self, number: int) -> None:
        self.number = number
        self.mode = _mode_of(number)
        self.registered = False
        self.reader = 0
        self.writer = 0
        self.pollers: list[int] = []


class EpollRing(RingBase):
    """One epoll instance and the threads."""

    name = "epoll"

    def __init__(self) -> None:
        self._epoll = select.epoll()
        super().__init__()
        self._epoll.register(self._waker.number, select.EPOLLIN)
        self._watches: dict[int, Watch] = {}
        self._started = 0  # the last ticket that left the queue

    def attach(self, number: int, *, is_socket: bool) -> Descriptor:
        descriptor = super().attach(number, is_socket=is_socket)
        self._watches[number] = Watch(number)
        return descriptor

    # -- one turn of the loop

    def _turn(self, timeout: float) -> bool:
        if self._queue:
            queue, self._queue = self._queue, []
            for ticket in queue:
                self._started = ticket
                if ticket in self._held:  # else cancelled since
                    self._start(ticket)
            self._harvest()
        woken = False
        # Always asked, if only for a moment: operations that succeed at once must not starve those that wait.
        for number, events in self._epoll.poll(0.0 if self._done else max(0.0, timeout), RING_EVENTS_MAX):
            watching = self._watching.get(number)
            if watching is not None:
                watching.result = events
                self._done.append(watching)
            elif number == self._waker.number:
                self._waker.drain()
                woken = True
            elif (watch := self._watches.get(number)) is not None:
                self._ready(watch, events)
        if woken or self._closing:
            self._harvest()
        return not (woken or self._done)

    def _harvest(self) -> None:
        self._collect_threads()
        if self._closing:
            self._end_closes()

    def _start(self, ticket: int) -> None:
        operation, pins = self._held[ticket]
        kind = operation.kind
        if kind is CALL:
            self._start_call(operation)
            return
        number = operation.descriptor.number  # type: ignore[union-attr]  # `submit` has checked it
        watch = self._watches[number]
        if kind is RECEIVE or kind is SEND:
            if not self._attempt(watch, ticket):
                if kind is RECEIVE:
                    watch.reader = ticket
                else:
                    watch.writer = ticket
                self._register(watch)
        elif kind is WATCH:
            try:
                if watch.registered:
                    self._epoll.modify(number, operation.mask | EDGE)
                else:
                    self._epoll.register(number, operation.mask | EDGE)
            except OSError as error:  # the user's share of watches is used up (epoll(7))
                self._complete(ticket, -(error.errno or 0))
                return
            watch.registered = False  # `_end_watch` takes it out
            self._watching[number] = operation
        elif kind is POLL:
            self._start_poll(watch, ticket, operation.mask)
        elif kind is CLOSE:
            self._begin_close(operation)
        elif kind is SYNC:
            self._threads.start(operation, partial(system_call, os.fdatasync, number))
        elif isinstance(operation, Splice):
            self._threads.start(operation, _splice_call(operation, number))
        else:
            function = os.preadv if kind is READ else os.pwritev
            self._threads.start(operation, partial(system_call, function, number, pins, operation.offset))

    def _start_poll(self, watch: Watch, ticket: int, mask: int) -> None:
        came_true = _poll_now(watch.number, mask)
        if came_true:
            self._complete(ticket, came_true)
        else:
            watch.pollers.append(ticket)
            self._register(watch)

    def _register(self, watch: Watch) -> None:
        if not watch.registered:
            self._epoll.register(watch.number, EDGES)  # reports what is true already as a first edge
            watch.registered = True

    def _ready(self, watch: Watch, events: int) -> None:
        if events & READABLE and watch.reader and self._attempt(watch, watch.reader):
            watch.reader = 0
        if events & WRITABLE and watch.writer and self._attempt(watch, watch.writer):
            watch.writer = 0
        if watch.pollers:
            waiting, watch.pollers = watch.pollers, []
            for ticket in waiting:
                came_true = events & (self._held[ticket][0].mask | ENDED)
                if came_true:
                    self._complete(ticket, came_true)
                else:
                    watch.pollers.append(ticket)

    # -- one attempt

    def _attempt(self, watch: Watch, ticket: int) -> bool:
        """Try a RECEIVE or SEND: True if it is complete (or on its way, on a thread), False if it has to wait."""
        operation, pins = self._held[ticket]
        receiving = operation.kind is RECEIVE
        number = watch.number
        try:
            if watch.mode is Mode.NON_BLOCKING:
                result = os.readv(number, pins) if receiving else os.writev(number, pins)
            elif watch.mode is Mode.THREAD:
                function = os.readv if receiving else os.writev
                self._threads.start(operation, partial(system_call, function, number, pins))
                return True
            elif watch.mode is Mode.NO_WAIT:
                at_once = os.preadv if receiving else os.pwritev
                result = at_once(number, pins, POSITION, os.RWF_NOWAIT)
            else:
                if not _poll_now(number, select.POLLIN if receiving else select.POLLOUT):
                    return False
                result = os.readv(number, pins) if receiving else os.write(number, _first_bytes(pins))
        except OSError as error:
            if error.errno == EAGAIN:
                return False
            if error.errno == EOPNOTSUPP and watch.mode is Mode.NO_WAIT:
                watch.mode = Mode.POLL_FIRST
                return self._attempt(watch, ticket)
            result = -(error.errno or 0)
        self._complete(ticket, result)
        return True

    # -- what RingBase asks for

    def _is_queued(self, ticket: int) -> bool:
        return ticket > self._started

    def _cancel_started(self, ticket: int, operation: Operation) -> None:
        if operation.descriptor is None:
            return
        if operation.kind is WATCH:
            self._end_watch(ticket, operation)
            return
        watch = self._watches[operation.descriptor.number]
        if ticket == watch.reader:
            watch.reader = 0
        elif ticket == watch.writer:
            watch.writer = 0
        elif ticket in watch.pollers:
            watch.pollers.remove(ticket)
        else:
            return  # it runs on a thread, to its end
        self._complete(ticket, -ECANCELED)

    def _close_descriptor(self, descriptor: Descriptor) -> int:
        watch = self._watches.pop(descriptor.number)
        if watch.registered:
            # close(2) would not do it if another process shares the open file: the number's next life would get
            # this one's edges.
            self._epoll.unregister(descriptor.number)
        return super()._close_descriptor(descriptor)

    def _free(self) -> None:
        self._epoll.close()


def _splice_call(operation: Splice, number: int) -> Job:
    pipe, length, offset = operation.pipe, operation.length, operation.offset
    if operation.into_pipe:
        return partial(system_call, os.splice, number, pipe, length, offset, None, SPLICE_FLAGS)
    return partial(system_call, os.splice, pipe, number, length, None, offset, SPLICE_FLAGS)


def _mode_of(number: int) -> Mode:
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind) or stat.S_ISBLK(kind):
        return Mode.THREAD
    return Mode.NO_WAIT if os.get_blocking(number) else Mode.NON_BLOCKING


def _poll_now(number: int, mask: int) -> int:
    """poll(2) without waiting: what of `mask` (and POLLERR, POLLHUP) is true now."""
    poller = select.poll()
    poller.register(number, mask)
    events = poller.poll(0)
    return events[0][1] if events else 0


def _first_bytes(pins: Pins) -> memoryview:
    """What may be written to a pipe that polls writable, without waiting: at most PIPE_BUF bytes."""
    first = next(pin for pin in pins if pin.nbytes)
    return first.cast("B")[: select.PIPE_BUF]
