"""What all connections without a wire protocol have in common: the queue, the life, one answer for each request.

Files, streams and `null:` differ only in how they are opened and how a request is begun. Everything else is here, so
that all keep the promises of ports.py: methods only queue, and the listener hears out of `pump` or a completion.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import TypeVar, cast

from nbdshard.common.errors import BugError, NbdshardError, RequestError, TimedOut
from nbdshard.common.limits import (
    FLUSH_BYTES_PER_SECOND,
    FLUSH_SECONDS,
    HANDSHAKE_SECONDS,
    MIB,
    REQUEST_SECONDS,
    REQUEST_SECONDS_PER_MIB,
)
from nbdshard.common.messages import EndpointAddress, EndpointDescription, Side
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Descriptor, Kind, Operation, Ring
from nbdshard.worker.ports import Extents, Listener, Payload

Value = TypeVar("Value")


class Life(Enum):
    """Where a connection is in its life."""

    NEW = "Made, and not yet started."
    STARTING = "To be opened at the next pump."
    OPENING = "Being opened; nobody may ask anything of it yet."
    OPEN = "Up: requests are taken and answered."
    LEAVING = "Takes no more requests; closes when those it has are answered."
    CLOSING = "Answers nothing any more; what is under way is cancelled or awaited."
    CLOSED = "The descriptor is gone."


_ANSWERING = frozenset({Life.OPEN, Life.LEAVING})
_OVER = frozenset({Life.CLOSING, Life.CLOSED})


class Task(Enum):
    """What a request asks for; the value is the words for an error message."""

    READ = "reading"
    WRITE = "writing"
    ZERO = "zeroing"
    EXTENTS = "asking for extents"
    FLUSH = "flushing"


class Request:
    """One request of the copier: `buffer` or `piped` is its payload.

    `moved` counts bytes transferred so far; `expires` is on the loop's clock.
    """

    __slots__ = ("allocated", "buffer", "expires", "handle", "moved", "piped", "seconds", "task", "where")

    def __init__(
        self,
        task: Task,
        handle: int,
        where: Range,
        payload: Payload,
        *,
        allocated: bool = False,
    ) -> None:
        self.task = task
        self.handle = handle
        self.where = where
        self.buffer = payload if isinstance(payload, memoryview) else _NOTHING
        self.piped = None if isinstance(payload, memoryview) else payload
        self.allocated = allocated
        self.moved = 0
        self.seconds = 0.0
        self.expires = 0.0


_WHOLE = Range(0, (1 << 63) - 1)  # what a flush is about
_NOTHING = memoryview(b"")
_RAISED = -1  # the result of a CALL whose function raised


class LocalConnection(ABC):
    """A connection that speaks no protocol. Implements `ports.Connection` but for how it opens and begins a request.

    `on_ready(connection)` is called once `description` is set, `on_lost(connection, error)` at most once, both out of
    `pump`, `tick` or a completion, never out of another method. What is asked after `disconnect` or `close` is dropped.
    """

    def __init__(
        self,
        ring: Ring,
        address: EndpointAddress,
        side: Side,
        on_ready: Callable[[LocalConnection], None],
        on_lost: Callable[[LocalConnection, NbdshardError], None],
    ) -> None:
        self.address = address
        self.side = side
        self.peer = address.address
        self.description = EndpointDescription(self.peer, None)
        self.listener: Listener | None = None
        self.life = Life.NEW
        self._ring = ring
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._descriptor: Descriptor | None = None
        self._queue: deque[Request] = deque()
        self._under_way: dict[Request, None] = {}  # begun and not answered, in order
        self._unflushed_bytes = 0
        self._opening_expires = 0.0

    # -- what each kind adds -------------------------------------------------------------------------------------------

    @abstractmethod
    def _open(self) -> None:
        """Begin to open; ends in `_opened` or `_not_opened`, even when the connection is closed before."""

    @abstractmethod
    def _begin(self, request: Request) -> None:
        """Begin `request`; ends in `_answer`, now or later, or in `_lose`."""

    def _may_begin(self) -> bool:
        """Whether another request may begin beside those under way."""
        return True

    def _may_leave(self) -> bool:
        """Whether a soft end, with everything answered, may close the descriptor now; else `_leave_if_done` later."""
        return True

    # -- ports.Connection ----------------------------------------------------------------------------------------------

    @property
    def splices(self) -> bool:
        return False

    def read(self, handle: int, where: Range, into: Payload) -> None:
        self._enqueue(Request(Task.READ, handle, where, into))

    def write(self, handle: int, where: Range, payload: Payload) -> None:
        self._enqueue(Request(Task.WRITE, handle, where, payload))

    def zero(self, handle: int, where: Range, *, allocated: bool) -> None:
        self._enqueue(Request(Task.ZERO, handle, where, _NOTHING, allocated=allocated))

    def extents(self, handle: int, where: Range) -> None:
        self._enqueue(Request(Task.EXTENTS, handle, where, _NOTHING))

    def flush(self, handle: int) -> None:
        self._enqueue(Request(Task.FLUSH, handle, _WHOLE, _NOTHING))

    def _enqueue(self, request: Request) -> None:
        if self.life is Life.OPEN:
            self._queue.append(request)

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self, now: float, handles: int) -> None:
        """Begin to open at the next `pump`; `handles` requests at most will be outstanding."""
        if self.life is Life.NEW:
            self.life = Life.STARTING
            self._opening_expires = now + HANDSHAKE_SECONDS

    @property
    def has_work(self) -> bool:
        """There is something to do for `pump`."""
        return self.life is Life.STARTING or (bool(self._queue) and self._may_begin())

    def pump(self, now: float) -> None:
        """Begin what is queued. Call once in every turn of the loop, before `Ring.wait`."""
        if self.life is Life.STARTING:
            self.life = Life.OPENING
            self._open()
        # What is queued while a listener is being told waits for the next turn, so that a turn is bounded.
        for _ in range(len(self._queue)):
            if not self._queue or not self._may_begin():
                break
            self._start_request(self._queue.popleft(), now)

    def _start_request(self, request: Request, now: float) -> None:
        request.seconds = self._seconds_for(request)
        request.expires = now + request.seconds
        self._under_way[request] = None
        if self.listener is not None:
            self.listener.sent(request.handle)
        if self.life in _ANSWERING:
            self._begin(request)

    def _seconds_for(self, request: Request) -> float:
        if request.task is Task.FLUSH:
            return FLUSH_SECONDS + self._unflushed_bytes / FLUSH_BYTES_PER_SECOND
        return REQUEST_SECONDS + REQUEST_SECONDS_PER_MIB * request.where.length / MIB

    def tick(self, now: float) -> None:
        """Look at the clock: a disk that does not answer is lost. Call about once a second."""
        if self.life is Life.OPENING and now >= self._opening_expires:
            self._lose(TimedOut(self.peer, "opening", HANDSHAKE_SECONDS))
        late = next((request for request in self._under_way if now >= request.expires), None)
        if late is not None:
            self._lose(TimedOut(self.peer, late.task.value, late.seconds))

    def disconnect(self) -> None:
        """Finish what was asked, then close. Idempotent."""
        if self.life is Life.OPEN:
            self.life = Life.LEAVING
            self._leave_if_done()
        elif self.life is not Life.LEAVING:
            self.close()

    def close(self) -> None:
        """Close at once; the listener hears nothing more. `closed` is true when the ring has let go. Idempotent."""
        if self.life in _OVER:
            return
        is_opening = self.life is Life.OPENING
        self.life = Life.CLOSING
        self._queue.clear()
        self._under_way.clear()
        if not is_opening:  # else what is being opened has to be closed when it is there
            self._release()

    @property
    def closed(self) -> bool:
        return self.life is Life.CLOSED

    def _leave_if_done(self) -> None:
        if self.life is Life.LEAVING and not self._queue and not self._under_way and self._may_leave():
            self.close()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            self.life = Life.CLOSED
        else:
            self._ring.submit(Operation(Kind.CLOSE, descriptor, owner=self._released))

    def _released(self, _: Operation) -> None:
        self.life = Life.CLOSED

    # -- for the kinds -------------------------------------------------------------------------------------------------

    def _opened(self, description: EndpointDescription, descriptor: Descriptor | None) -> None:
        self._descriptor = descriptor
        if self.life is not Life.OPENING:
            self._release()
            return
        self.description = description
        self.life = Life.OPEN
        self._on_ready(self)

    def _not_opened(self, error: NbdshardError) -> None:
        was_awaited = self.life is Life.OPENING
        self.life = Life.CLOSED
        if was_awaited:
            self._on_lost(self, error)

    def _lose(self, error: NbdshardError) -> None:
        if self.life not in _OVER:
            self.close()
            self._on_lost(self, error)

    def _is_under_way(self, request: Request) -> bool:
        """Whether `request` was begun, and neither answered nor dropped by `close`."""
        return request in self._under_way

    def _answer(
        self, request: Request, error: RequestError | None = None, count: int = 0, extents: Extents | None = None
    ) -> None:
        """Give `request` its one answer; none when the connection was closed meanwhile."""
        if not self._is_under_way(request):
            return
        del self._under_way[request]
        if error is None and request.task in (Task.WRITE, Task.ZERO):
            self._unflushed_bytes += request.where.length
        elif error is None and request.task is Task.FLUSH:
            self._unflushed_bytes = 0
        if self.listener is not None:
            self.listener.done(request.handle, error, count, extents)
        self._leave_if_done()

    def _call(self, function: Callable[[], Value], then: Callable[[Value | OSError], None]) -> None:
        """Run `function` on a thread of the ring, then `then` with what it came to, even after `close`.

        The descriptor stays open until `function` has returned.
        """

        def finished(operation: Operation) -> None:
            then(cast(Value | OSError, _outcome(operation)))

        self._ring.submit(Operation(Kind.CALL, self._descriptor, function=function, owner=finished))


def _outcome(operation: Operation) -> object:
    """The value of a call, or its OSError. Any other exception is a fault of ours, and raised here."""
    if operation.result == 0 or isinstance(operation.value, OSError):
        return operation.value
    if operation.result == _RAISED and isinstance(operation.value, BaseException):
        raise BugError(f"a call failed: {operation.value!r}") from operation.value
    return OSError(-operation.result, os.strerror(-operation.result))  # it never ran


def refusal(number: int, message: str = "") -> RequestError:
    """The failure of one request: `number` is the `errno` of its system call."""
    # Linux has one number for both; NBD knows it as ENOTSUP.
    name = "ENOTSUP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, f"errno {number}")
    return RequestError(name, number, message or os.strerror(number))
