"""The copier's second half: payload and zeroes on their way to the destination. Pure; the first half is copier.py."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import ZERO_BYTES_MAX, ZERO_RUNS_MAX
from nbdshard.common.messages import ErrorReport, Side
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.operation import Gone, Operation, Part
from nbdshard.worker.payloads import Payloads
from nbdshard.worker.piped import PipedPayload
from nbdshard.worker.ports import Connection
from nbdshard.worker.shape import CopyShape, ZeroPolicy
from nbdshard.worker.sides import Target
from nbdshard.worker.states import OperationEvent, OperationState

_ZERO_REFUSALS = frozenset({"ENOTSUP", "EINVAL", "EOVERFLOW"})  # the server cannot zero this: write zeroes instead


class Owner(Protocol):
    """What the writer needs of the copier, which owns leases, operations and the clock."""

    now: float
    payloads: Payloads

    def begin(self, lease: LeaseWork, where: Range) -> Operation: ...
    def release(self, operation: Operation) -> None: ...
    def drop(self, operation: Operation) -> None: ...
    def given_up(self, lease: LeaseWork) -> bool: ...
    def abandon(self, lease: LeaseWork, error: ErrorReport | None) -> None: ...
    def later(self, lease: LeaseWork, attempts: int, action: Callable[[], None]) -> None: ...
    def read_again(self, operation: Operation, attempts: int) -> None: ...
    def fail(
        self, lease: LeaseWork, side: Side, doing: str, connection: Connection, where: Range, error: RequestError
    ) -> None: ...


class Writer:
    """Takes operations from WRITING or ZEROING to EMPTY."""

    def __init__(self, shape: CopyShape, owner: Owner) -> None:
        self.shape = shape
        self.targets: list[Target] = []
        self._owner = owner
        self._zeroes: memoryview | None = None  # one request of them, made when they are first written as data

    def pump(self) -> None:
        """Send what waited for room."""
        for target in self.targets:
            self._send(target)

    def _send(self, target: Target) -> None:
        while target.waiting and not target.is_lent and target.has_room(self._payload_size(target.waiting[0])):
            self._submit(target, target.waiting.popleft())

    def is_writing(self, leases: Collection[LeaseWork]) -> bool:
        """Whether a connection has a request of theirs that writes, and that is not answered."""
        return any(
            isinstance(part, Part) and not part.is_merge and part.operation.lease in leases
            for target in self.targets
            for part in target.vector.entries()
        )

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, operation: Operation) -> None:
        """WRITING begins: find the zeroes in the payload, and queue a WRITE for every stretch of the rest."""
        if self.shape.needs_merge(operation.where):
            self._merge(operation)
            return
        where = operation.where
        data = self._find_data(operation) if self.shape.sparse_unit else [(0, where.length)]
        piped = operation.piped  # whole, if it is there: what has to be cut is in a buffer by now
        view = memoryview(operation.buffer or b"")
        parts = [
            Part(
                operation,
                Range(where.start + start, where.start + end),
                view[start:end] if piped is None else piped,
                is_zero=False,
            )
            for start, end in data
        ]
        if not parts:
            self._owner.drop(operation)
            return
        operation.parts_left = operation.parts_unsent = len(parts)
        target = self._target_of(operation)
        for part in parts:
            part.attempts = operation.writes_lost
            self._queue(target, part)

    def _find_data(self, operation: Operation) -> list[tuple[int, int]]:
        """Note the zeroes in the payload; the rest of it, as offsets in it."""
        start, data = operation.where.start, []
        for begin, end, zero in self._owner.payloads.find_runs(operation, self.shape.sparse_unit):
            if zero:
                self.note_zeroes(operation.lease, Range(start + begin, start + end))
            else:
                data.append((begin, end))
        operation.lease.is_dense = data == [(0, operation.where.length)]
        return data

    def _merge(self, operation: Operation) -> None:
        """The source ends inside a block of the destination: read that block, put our bytes over its beginning."""
        unit, end = self.shape.merge_unit, operation.where.end
        assert operation.buffer is not None
        operation.advance(OperationEvent.MERGE)
        block = Range.of(end - end % unit, unit)
        part = Part(operation, block, memoryview(bytearray(unit)), is_zero=False)
        part.is_merge = True
        operation.parts_left = 1
        self._queue(self._target_of(operation), part)

    def _merged(self, operation: Operation, part: Part) -> None:
        where, kept = operation.where, part.where.end - operation.where.end
        buffer, old = operation.buffer, part.payload
        assert buffer is not None and isinstance(old, memoryview)
        buffer[where.length : where.length + kept] = old[len(old) - kept :]
        whole = Range(where.start, part.where.end)
        operation.advance(OperationEvent.READ_DONE)
        operation.parts_left = operation.parts_unsent = 1
        view = memoryview(buffer)[: whole.length]
        self._queue(self._target_of(operation), Part(operation, whole, view, is_zero=False))

    def _target_of(self, operation: Operation) -> Target:
        return self.targets[max(operation.source, 0) % len(self.targets)]

    def _queue(self, target: Target, part: Part) -> None:
        target.waiting.append(part)
        self._send(target)

    def _payload_size(self, part: Part) -> int:
        """Of the next request that `part` becomes, at most."""
        if part.fills:
            return min(part.where.length, self.shape.request_size)
        return part.where.length if part.payload is not None else 0

    def _submit(self, target: Target, part: Part) -> None:
        lease = part.operation.lease
        if self._owner.now >= lease.expires and not lease.abandoned:
            self._owner.abandon(lease, ErrorReport(kind="connection", text="the lease expired"))
        if self._owner.given_up(lease):
            self._part_over(part)
        else:
            target.submit(self._cut(target, part) if part.fills else part, allocated=self.shape.allocated)

    def part_done(self, target: Target, part: Part, error: RequestError | None) -> None:
        """A write, a zeroing or a merge's read was answered."""
        operation = part.operation
        lease = operation.lease
        if error is not None and not self._owner.given_up(lease):
            self._part_failed(target, part, error)
            return
        if error is None and part.is_merge and not self._owner.given_up(lease):
            self._merged(operation, part)
            return
        if error is None and not part.is_merge:
            self._credit(part)
        self._part_over(part)

    def _credit(self, part: Part) -> None:
        lease = part.operation.lease
        if part.is_zero:
            lease.zeroed += part.where.length
        else:
            lease.copied += min(part.where.end, part.operation.where.end) - part.where.start
            if isinstance(part.payload, PipedPayload):
                lease.spliced += part.where.length - part.payload.in_memory
            elif isinstance(part.payload, Gone):
                lease.spliced += part.payload.spliced

    def _part_failed(self, target: Target, part: Part, error: RequestError) -> None:
        operation = part.operation
        part.attempts += 1
        if part.payload is None and error.errno_name in _ZERO_REFUSALS:
            operation.advance(OperationEvent.WRITE_FAILED)
            self._fill_instead(target, part)
            return
        if part.attempts >= self.shape.attempts:
            doing = "read" if part.is_merge else "write" if part.payload is not None else "zero"
            self._owner.fail(operation.lease, "destination", doing, target.connection, part.where, error)
            self._part_over(part)
            return
        if isinstance(part.payload, PipedPayload | Gone):
            operation.advance(OperationEvent.DATA_LOST)
            operation.writes_lost = part.attempts
            self._owner.read_again(operation, part.attempts)
            return
        if part.is_merge:
            operation.advance(OperationEvent.READ_FAILED)
        else:
            operation.advance(OperationEvent.WRITE_FAILED if part.payload else OperationEvent.ZERO_FAILED)
            operation.parts_unsent += 1
        self._owner.later(operation.lease, part.attempts, lambda: self._queue(target, part))

    def _part_over(self, part: Part) -> None:
        operation = part.operation
        operation.parts_left -= 1
        if operation.parts_left == 0:
            if operation.state is OperationState.CONFIRMING:
                operation.advance(OperationEvent.CONFIRMED)
                self._owner.release(operation)
            else:
                self._owner.drop(operation)

    # -- zeroes --------------------------------------------------------------------------------------------------------

    def note_zeroes(self, lease: LeaseWork, where: Range) -> None:
        """`where` is zero at the source. Held back, so that neighbours join; in order and at once for streams."""
        if self.shape.zero_policy is ZeroPolicy.SKIP:
            lease.skipped += where.length
            return
        lease.zeroes.add(where)
        if self.shape.synchronous or len(lease.zeroes) > ZERO_RUNS_MAX:
            self._issue_zeroes(lease, lease.zeroes.pop_first())

    def issue_held_zeroes(self, lease: LeaseWork) -> None:
        """No more neighbours can come: every run of zeroes held back for `lease` is sent."""
        while lease.zeroes:
            self._issue_zeroes(lease, lease.zeroes.pop_first())

    def _issue_zeroes(self, lease: LeaseWork, where: Range) -> None:
        operation = self._owner.begin(lease, where)
        operation.advance(OperationEvent.BEGIN_ZERO)
        if self.shape.zero_policy is ZeroPolicy.FILL:
            parts = [Part(operation, where, None, is_zero=True)]
            parts[0].fills = True
        else:
            parts = [Part(operation, piece, None, is_zero=True) for piece in where.split(ZERO_BYTES_MAX)]
        operation.parts_left = operation.parts_unsent = len(parts)
        targets = [target for target in self.targets if not target.is_laned] or self.targets
        target = targets[where.start // self.shape.request_size % len(targets)]
        for part in parts:
            self._queue(target, part)

    def _fill_instead(self, target: Target, part: Part) -> None:
        """The server refused to zero `part`: write zeroes as data in its place."""
        part.fills = True
        part.operation.parts_unsent += 1
        self._queue(target, part)

    def _cut(self, target: Target, part: Part) -> Part:
        """One request's worth of zeroes off the front of `part`; the rest of it goes on waiting, first in the queue."""
        if self._zeroes is None:
            self._zeroes = memoryview(bytes(self.shape.request_size))
        operation, where, unit = part.operation, part.where, self.shape.request_size
        end = min(where.end, (where.start // unit + 1) * unit)
        if end < where.end:
            part.where = Range(end, where.end)
            operation.parts_left += 1
            operation.parts_unsent += 1
            target.waiting.appendleft(part)
        return Part(operation, Range(where.start, end), self._zeroes[: end - where.start], is_zero=True)
