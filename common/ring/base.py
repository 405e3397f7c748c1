"""What both rings share: taking in and checking, holding, completing, and how a descriptor ends."""

from __future__ import annotations

import os
import select
import socket
import stat
from abc import ABC, abstractmethod
from errno import ECANCELED
from functools import partial
from time import monotonic

from nbdshard.common.errors import BugError
from nbdshard.common.limits import RING_BUFFERS_MAX, RING_CLOSE_SECONDS, RING_OPERATIONS_MAX
from nbdshard.common.ring.interface import Descriptor, Kind, Operation, Splice
from nbdshard.common.ring.threads import Threads, call
from nbdshard.common.ring.wake import Waker

# A module's name is found faster than an attribute of an enum, and these are looked up for every operation.
RECEIVE, SEND, READ, WRITE = Kind.RECEIVE, Kind.SEND, Kind.READ, Kind.WRITE
POLL, SYNC, CALL, CLOSE = Kind.POLL, Kind.SYNC, Kind.CALL, Kind.CLOSE
WATCH, SPLICE = Kind.WATCH, Kind.SPLICE

EDGE = select.EPOLLET
OFFSET_MAX = (1 << 63) - 1  # off_t
SPLICE_BYTES_MAX = 0x7FFFF000  # MAX_RW_COUNT: the kernel moves no more at once, and io_uring's field has 32 bits
SPLICE_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE  # the first is about the pipe only

Pins = list[memoryview]
NOTHING: Pins = []


class RingBase(ABC):
    """An operation is known by its ticket: a number that is never given twice in a ring's life.

    A completion, a cancellation or a retry names a ticket, so one that comes late finds nothing and can never reach
    a newer operation. `_held` maps the ticket of each pending operation to the operation and to memoryviews of
    our own on its buffers: as long as they exist nobody can free or resize what the kernel writes to, whatever the
    owner does with its own views.
    """

    name = ""
    _epoll: select.epoll  # what `wait` waits in; made and closed by the implementation

    def __init__(self) -> None:
        self._waker = Waker()
        self._threads = Threads(self._waker.wake)
        self._attached: dict[int, Descriptor] = {}
        self._held: dict[int, tuple[Operation, Pins]] = {}
        self._ticket = 0  # the last one given; 0 itself belongs to no operation
        self._watching: dict[int, Operation] = {}  # WATCHes by the descriptor's number, from their start
        self._queue: list[int] = []  # tickets submitted since the last wait
        self._closing: list[Operation] = []  # CLOSEs that wait for the descriptor's other operations
        self._done: list[Operation] = []
        self._open = True

    # -- the contract, as far as it is the same everywhere

    @property
    def in_flight(self) -> int:
        return len(self._held)

    def attach(self, number: int, *, is_socket: bool) -> Descriptor:
        """See the contract. Raises OSError (EBADF) if `number` is not open."""
        if not self._open:
            raise BugError("the ring is closed")
        if number in self._attached:
            raise BugError(f"descriptor {number} is attached already")
        if not stat.S_ISSOCK(os.fstat(number).st_mode) and is_socket:
            raise BugError(f"descriptor {number} is not a socket")
        if is_socket and os.get_blocking(number):
            raise BugError(f"descriptor {number} is a blocking socket")
        descriptor = Descriptor(number, is_socket)
        self._attached[number] = descriptor
        return descriptor

    def submit(self, operation: Operation) -> None:
        """Queue `operation`. BugError, and nothing queued, if the contract forbids it."""
        if objection := self._objection(operation):
            raise BugError(f"{operation.kind.name} {objection}")
        kind = operation.kind
        descriptor = operation.descriptor
        moves_buffers = kind is RECEIVE or kind is SEND or kind is READ or kind is WRITE
        pins = _pin(operation) if moves_buffers else NOTHING
        if descriptor is not None:
            if kind is RECEIVE:
                descriptor.receiving = True
            elif kind is SEND:
                descriptor.sending = True
            elif kind is WATCH:
                descriptor.watched = True
            elif kind is CLOSE:
                descriptor.closing = True
            descriptor.pending += 1
        operation.pending = True
        self._ticket = ticket = self._ticket + 1
        operation.slot = ticket
        self._held[ticket] = (operation, pins)
        self._queue.append(ticket)

    def cancel(self, operation: Operation) -> None:
        """Ask for an early end. A CLOSE, and an operation that is not pending, are left as they are."""
        if not operation.pending or operation.kind is CLOSE:
            return
        ticket = operation.slot
        if ticket not in self._held or self._held[ticket][0] is not operation:
            raise BugError(f"cancelling a {operation.kind.name} that is pending on another ring")
        if self._is_queued(ticket) or self._threads.cancel(operation):
            self._complete(ticket, -ECANCELED)
        else:
            self._cancel_started(ticket, operation)

    def change_watch(self, operation: Operation, mask: int) -> None:
        """See the contract."""
        descriptor = operation.descriptor
        if not operation.pending or operation.kind is not WATCH or descriptor is None:
            raise BugError("changing a watch that is not pending")
        operation.mask = mask
        if self._watching.get(descriptor.number) is operation:  # else it has not begun
            self._epoll.modify(descriptor.number, mask | EDGE)

    def _end_watch(self, ticket: int, operation: Operation) -> None:
        """A started WATCH is cancelled."""
        if operation.descriptor is not None:
            self._epoll.unregister(operation.descriptor.number)
        self._complete(ticket, -ECANCELED)

    def wake(self) -> None:
        """Make a `wait` under way, or else the next one, return."""
        self._waker.wake()

    def wait(self, timeout: float) -> list[Operation]:
        """See the contract; not to be called from a completion's owner, nor on a closed ring (BugError)."""
        if not self._open:
            raise BugError("wait on a closed ring")
        deadline = monotonic() + timeout
        while self._turn(timeout):
            timeout = deadline - monotonic()
            if timeout <= 0:
                break
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Cancel, reap, close; see the contract. Descriptors are shut down first, so that peers see the end."""
        if not self._open:
            return
        self._open = False
        for descriptor in self._attached.values():
            shut_down(descriptor)
        for ticket, (operation, _) in list(self._held.items()):
            if operation.kind is CLOSE:
                self._complete(ticket, -ECANCELED)
            else:
                self.cancel(operation)
        deadline = monotonic() + RING_CLOSE_SECONDS
        while self._held and (remaining := deadline - monotonic()) > 0:
            self._done.clear()
            self._turn(remaining)
        self._threads.close(max(0.0, deadline - monotonic()))
        self._free()
        for descriptor in self._attached.values():
            os.close(descriptor.number)
            descriptor.closing = descriptor.closed = True
        self._attached.clear()
        self._waker.close()

    # -- for the implementations

    @abstractmethod
    def _turn(self, timeout: float) -> bool:
        """Start what is queued, and wait unless something is done; whether to go on (nothing done, not woken)."""

    @abstractmethod
    def _is_queued(self, ticket: int) -> bool:
        """Whether the operation has not been started yet."""

    @abstractmethod
    def _cancel_started(self, ticket: int, operation: Operation) -> None:
        """End a started operation that is not on a thread's queue; soon, but not necessarily at once."""

    @abstractmethod
    def _free(self) -> None:
        """Give back what the implementation owns."""

    def _objection(self, operation: Operation) -> str:
        """Why `operation` may not be submitted, for after its kind's name; "" if it may."""
        kind = operation.kind
        descriptor = operation.descriptor
        if operation.pending:
            return "was submitted while it is pending"
        if not self._open:
            return "on a closed ring"
        if kind is CALL and operation.function is None:
            return "without a function"
        if len(self._held) >= RING_OPERATIONS_MAX and kind is not CLOSE:  # which needs nothing of the kernel's queues
            return f"would be one more than the {RING_OPERATIONS_MAX} operations allowed in flight"
        if descriptor is None:
            return "" if kind is CALL else "without a descriptor"
        if kind is SPLICE and (objection := _objection_to_splice(operation, descriptor)):
            return objection
        if descriptor.closing:
            return f"for descriptor {descriptor.number}, which is closing or closed"
        if self._attached.get(descriptor.number) is not descriptor:
            return f"for descriptor {descriptor.number}, which this ring does not have"
        if (descriptor.receiving and kind is RECEIVE) or (descriptor.sending and kind is SEND):
            return f"for descriptor {descriptor.number}, which has one pending"
        if descriptor.watched and kind is not CLOSE:
            return f"for descriptor {descriptor.number}, which is watched"
        if kind is WATCH and (descriptor.pending or not descriptor.is_socket):
            return f"of descriptor {descriptor.number}, which is no socket or has something pending"
        return ""

    def _complete(self, ticket: int, result: int, value: object = None) -> None:
        """The end of an operation: its buffers are let go, and the next `wait` returns it."""
        operation = self._held.pop(ticket)[0]
        operation.result = result
        operation.value = value
        operation.pending = False
        descriptor = operation.descriptor
        if descriptor is not None:
            descriptor.pending -= 1
            if operation.kind is RECEIVE:
                descriptor.receiving = False
            elif operation.kind is SEND:
                descriptor.sending = False
            elif operation.kind is WATCH:
                descriptor.watched = False
                self._watching.pop(descriptor.number, None)
        self._done.append(operation)

    def _start_call(self, operation: Operation) -> None:
        self._threads.start(operation, partial(call, operation.function))

    def _collect_threads(self) -> None:
        for operation, (result, value) in self._threads.take():
            self._complete(operation.slot, result, value)

    def _begin_close(self, operation: Operation) -> None:
        """Shut the descriptor of a CLOSE down and cancel what is left; `_end_closes` does the rest."""
        descriptor = operation.descriptor
        if descriptor is None:
            raise BugError("CLOSE without a descriptor")
        shut_down(descriptor)
        for other, _ in list(self._held.values()):
            if other.descriptor is descriptor:
                self.cancel(other)
        self._closing.append(operation)

    def _end_closes(self) -> None:
        waiting = []
        for operation in self._closing:
            descriptor = operation.descriptor
            if descriptor is None or not operation.pending:
                continue
            if descriptor.pending > 1:  # the CLOSE itself is one
                waiting.append(operation)
            else:
                self._complete(operation.slot, self._close_descriptor(descriptor))
        self._closing = waiting

    def _close_descriptor(self, descriptor: Descriptor) -> int:
        """Close it: 0, or -errno. Linux frees the number either way; EIO tells of a write-back that failed."""
        del self._attached[descriptor.number]
        descriptor.closed = True
        try:
            os.close(descriptor.number)
        except OSError as error:
            return -(error.errno or 0)
        return 0


def _pin(operation: Operation) -> Pins:
    """Memoryviews of our own on the operation's buffers, after a look at what it asks for."""
    kind = operation.kind
    pins = [memoryview(buffer) for buffer in operation.buffers[:RING_BUFFERS_MAX]]
    writable = kind is RECEIVE or kind is READ
    length = 0
    for pin in pins:
        length += pin.nbytes
        if writable and pin.readonly:
            raise BugError(f"{kind.name} into a read-only buffer")
        if not pin.c_contiguous:
            raise BugError(f"{kind.name} of a buffer with gaps")
    if not length:
        raise BugError(f"{kind.name} of no bytes: its result 0 would look like the end of the stream")
    if (kind is READ or kind is WRITE) and not 0 <= operation.offset <= OFFSET_MAX:
        raise BugError(f"{kind.name} at offset {operation.offset}")
    return pins


def _objection_to_splice(operation: Operation, descriptor: Descriptor) -> str:
    """What is wrong with what a SPLICE asks for; "" if nothing is."""
    if descriptor.is_socket:
        return f"for descriptor {descriptor.number}, which is a socket"
    if not isinstance(operation, Splice) or operation.pipe < 0:
        return "without a pipe"
    if not 0 < operation.length <= SPLICE_BYTES_MAX:
        return f"of {operation.length} bytes"
    if not 0 <= operation.offset <= OFFSET_MAX:
        return f"at offset {operation.offset}"
    return ""


def shut_down(descriptor: Descriptor) -> None:
    """shutdown(2) both ways, if it is a socket: the peer gets the end of the stream even while we still hold it."""
    if not descriptor.is_socket:
        return
    handle = socket.socket(fileno=descriptor.number)
    try:
        handle.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ENOTCONN: never connected, or reset by the peer, so there is nobody to tell; close(2) follows anyway
    finally:
        handle.detach()
