"""The copier's half of each connection: its vector, and what waits for it. Pure; the decisions are in copier.py."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Protocol

from nbdshard.common.errors import BugError, RequestError
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.lending import Lendable
from nbdshard.worker.operation import Gone, Operation, Part, Vector
from nbdshard.worker.ports import Connection, Extents
from nbdshard.worker.states import OperationEvent


class Decisions(Protocol):
    """What the sides tell the copier."""

    now: float

    def read_arriving(self, operation: Operation) -> None: ...

    def read_done(self, operation: Operation, error: RequestError | None, count: int) -> None: ...

    def extents_done(self, lease: LeaseWork, error: RequestError | None, extents: Extents | None) -> None: ...

    def part_done(self, target: Target, part: Part, error: RequestError | None) -> None: ...

    def flush_done(self, target: Target, error: RequestError | None) -> None: ...


class Source:
    """A connection to the source. Implements `ports.Listener`."""

    def __init__(self, index: int, connection: Connection, depth: int, rows: int, copier: Decisions) -> None:
        """`depth`: operations at a time; `rows`: handles, as many at least."""
        self.index = index
        self.connection = connection
        self.is_lent = False  # to a lane: nothing may be asked on it
        self.vector: Vector[Operation | LeaseWork] = Vector(rows + 1)  # one row more, for block status
        self.depth = depth
        self.active = 0  # operations that own a row
        self._copier = copier

    def begin(self, operation: Operation) -> None:
        """Give `operation` a row; it keeps it until it is EMPTY again."""
        operation.source = self.index
        operation.handle = self.vector.take(operation)
        self.active += 1

    def adopt(self, operation: Operation, handle: int) -> None:
        """As `begin`, in a row of somebody else's choice."""
        self.vector.take_at(handle, operation)
        operation.source, operation.handle = self.index, handle
        operation.asked = -inf  # when, nobody here knows: its answer teaches nothing of the source
        self.active += 1

    def end(self, operation: Operation) -> None:
        self.vector.release(operation.handle)
        operation.source = operation.handle = -1
        self.active -= 1

    def read(self, operation: Operation) -> None:
        if operation.piped is not None:
            self.connection.read(operation.handle, operation.where, operation.piped)
            return
        assert operation.buffer is not None
        view = memoryview(operation.buffer)[: operation.where.length]
        self.connection.read(operation.handle, operation.where, view)

    def ask(self, lease: LeaseWork, where: Range) -> None:
        self.connection.extents(self.vector.take(lease), where)

    def sent(self, handle: int) -> None:
        entry = self.vector[handle]
        if isinstance(entry, Operation):
            entry.advance(OperationEvent.REQUEST_SENT)
            entry.asked = self._copier.now

    def arriving(self, handle: int) -> None:
        entry = self.vector[handle]
        if isinstance(entry, Operation):
            entry.advance(OperationEvent.REPLY_ARRIVING)
            self._copier.read_arriving(entry)

    def done(self, handle: int, error: RequestError | None, count: int, extents: Extents | None) -> None:
        entry = self.vector[handle]
        if isinstance(entry, Operation):
            self._copier.read_done(entry, error, count)
        else:
            self.vector.release(handle)
            self._copier.extents_done(entry, error, extents)


class Target:
    """A connection to a destination: its own vector of parts, and the parts that wait for room. A `ports.Listener`."""

    FLUSH = object()  # what a flush's row holds

    def __init__(self, index: int, connection: Connection, requests: int, queue_size: int, copier: Decisions) -> None:
        self.index = index
        self.connection = connection
        self.vector: Vector[Part | object] = Vector(requests + 1)  # one row more, for the flush
        self.requests = requests
        self.queue_size = queue_size
        self.waiting: deque[Part] = deque()
        self.active = 0  # parts that own a row
        self.bytes_in_flight = 0
        self.flushing = False
        self.is_lent = False  # to a lane: nothing may be asked on it
        self.is_laned = False  # a lane works on it, now and then
        self._copier = copier

    def has_room(self, size: int) -> bool:
        """Whether one more request with `size` bytes of payload may be sent."""
        fits = self.bytes_in_flight + size <= self.queue_size or self.bytes_in_flight == 0
        return self.active < self.requests and fits

    def submit(self, part: Part, *, allocated: bool) -> None:
        """Send `part` now; the caller has looked at `has_room`."""
        handle = self.vector.take(part)
        self.active += 1
        if part.payload is None:
            self.connection.zero(handle, part.where, allocated=allocated)
            return
        self.bytes_in_flight += part.where.length
        if isinstance(part.payload, Gone):
            raise BugError(f"a write of {part.where} has no payload")
        if part.is_merge:
            self.connection.read(handle, part.where, part.payload)
        else:
            self.connection.write(handle, part.where, part.payload)

    def flush(self) -> None:
        if self.flushing:
            raise BugError("a flush is under way")
        self.flushing = True
        # A server that answers a write twice must not have answered the flush.
        self.connection.flush(self.vector.take_longest_unused(self.FLUSH))

    def adopt(self, part: Part, handle: int) -> None:
        """`part` was sent by somebody else, with this handle."""
        self.vector.take_at(handle, part)
        self.active += 1
        if part.payload is not None:
            self.bytes_in_flight += part.where.length

    def flush_over(self) -> None:
        """The flush that a lane was asked for has succeeded."""
        self.flushing = False

    def flush_again(self) -> None:
        """The flush that a lane was asked for was not begun."""
        self.flushing = False
        self.flush()

    def adopt_flush(self, connection: Lendable, handle: int) -> None:
        """The flush that a lane was asked for is not answered."""
        self.vector.take_at(handle, self.FLUSH)
        connection.adopt_flush(handle)

    def sent(self, handle: int) -> None:
        part = self.vector[handle]
        if isinstance(part, Part) and not part.is_merge:
            part.operation.parts_unsent -= 1
            if part.operation.parts_unsent == 0:
                part.operation.advance(OperationEvent.WRITES_SENT)

    def arriving(self, handle: int) -> None:
        """Payload of a merge's read; nothing depends on it."""

    def done(self, handle: int, error: RequestError | None, count: int, extents: Extents | None) -> None:
        part = self.vector[handle]
        self.vector.release(handle)
        if not isinstance(part, Part):
            self.flushing = False
            self._copier.flush_done(self, error)
            return
        self.active -= 1
        if part.payload is not None:
            self.bytes_in_flight -= part.where.length
        self._copier.part_done(self, part, error)
