"""The copier: leases in, requests on connections and reports out. Pure: no I/O, clock or ring.

The shell adds connections, grants leases, passes on what the connections report, and calls `pump(now)` once after each
batch of events; the copier queues requests on its connections and messages in `outbox`. Its rules:

- No WRITE is queued before its READ ended without error and all payload is held.
- A lease's clock is looked at before each write; an expired lease writes nothing more.
- A failed read is asked again, a failed write is sent again from its buffer, ATTEMPTS_PER_REQUEST times in all; then
  the lease fails, and with it nothing else.
- Counters count acknowledged bytes only.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import (
    ATTEMPTS_PER_REQUEST,
    LEASES_PER_WORKER,
    RETRY_DELAY_SECONDS,
    ZERO_BYTES_MAX,
    ZERO_RUNS_MAX,
)
from nbdshard.common.messages import ErrorReport, Failed, FromWorker, Lease, Progress, Side, Wanted, Written
from nbdshard.common.ranges import Range
from nbdshard.worker.flushes import Flushes
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.operation import BufferPool, Operation, Part
from nbdshard.worker.ports import Connection, Extents
from nbdshard.worker.shape import CopyShape, ZeroPolicy
from nbdshard.worker.sides import Source, Target
from nbdshard.worker.states import OperationEvent, OperationState
from nbdshard.worker.zeroes import find_runs

_ZERO_REFUSALS = frozenset({"ENOTSUP", "EINVAL", "EOVERFLOW"})  # the server cannot zero this: write zeroes instead


class Copier:
    """One worker's part of one job."""

    def __init__(self, shape: CopyShape, job: str, epoch: int, now: float) -> None:
        self.shape = shape
        self.job = job
        self.epoch = epoch
        self.now = now
        self.outbox: list[FromWorker] = []
        self.sources: list[Source] = []
        self.targets: list[Target] = []
        self.leases: dict[int, LeaseWork] = {}
        self.draining = False
        self.flushes = Flushes(self)
        self._buffers = BufferPool(shape.request_size)
        self._zeroes = memoryview(bytes(shape.request_size)) if shape.zero_policy is ZeroPolicy.FILL else None
        self._delayed: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._wish = 0  # leases the coordinator knows we want
        self._operations = 0  # not EMPTY
        self._next_source = 0

    # -- the shell's side ----------------------------------------------------------------------------------------------

    def add_source(self, connection: Connection) -> Source:
        """Use one more connection to the source; the returned listener hears of its requests."""
        source = Source(len(self.sources), connection, self.shape.depth, self)
        self.sources.append(source)
        self._buffers.grow(self.shape.depth)
        return source

    def add_target(self, connection: Connection, requests: int) -> Target:
        """Use one more connection to the destination, with up to `requests` requests in flight."""
        target = Target(len(self.targets), connection, requests, self.shape.queue_size, self)
        self.targets.append(target)
        return target

    def grant(self, message: Lease, now: float) -> None:
        """Begin a lease. One that is known already is a repeated message."""
        if message.lease in self.leases or self.draining:
            return
        self._wish = max(0, self._wish - 1)
        self.leases[message.lease] = LeaseWork(
            message.lease,
            message.range,
            expires=now + message.seconds,
            alignment=self.shape.alignment,
            until_end=message.until_end,
        )

    def renew(self, now: float, seconds: float) -> None:
        """The coordinator was heard: what has not expired is good for another `seconds`."""
        for lease in self.leases.values():
            if now < lease.expires:
                lease.expires = now + seconds

    def revoke(self, lease_id: int) -> None:
        """Give a lease up; reported as failed once nothing of it is on the wire."""
        if lease := self.leases.get(lease_id):
            self._abandon(lease, ErrorReport(kind="connection", text="the lease was revoked"))

    def drain(self) -> None:
        """Begin nothing more; `idle` tells when what was begun is finished."""
        self.draining = True
        for lease in list(self.leases.values()):
            self._abandon(lease, None)

    def abort(self, error: ErrorReport) -> None:
        """The connections are gone: every lease has failed. Nothing is under way any more."""
        self.draining = True
        for lease in self.leases.values():
            self.outbox.append(Failed(self.job, self.epoch, lease.lease, error))
        self.leases.clear()

    @property
    def idle(self) -> bool:
        """Nothing is under way on any connection."""
        return self._operations == 0 and not self.flushes.busy

    def report_progress(self) -> None:
        """Queue a Progress message for every lease that got further since the last."""
        for lease in self.leases.values():
            done = lease.counters
            if done != lease.reported and not lease.abandoned:
                lease.reported = done
                self.outbox.append(Progress(self.job, self.epoch, lease.lease, done))

    def deadline(self) -> float | None:
        """When `pump` has something to do even if nothing happens: the next retry."""
        return self._delayed[0][0] if self._delayed else None

    def pump(self, now: float) -> None:
        """Queue all requests that have become possible. Call after every batch of events, and at `deadline`."""
        self.now = now
        while self._delayed and self._delayed[0][0] <= now:
            heapq.heappop(self._delayed)[2]()
        for target in self.targets:
            self._pump_target(target)
        if not self.draining and self.sources and self.targets:
            self._ask_extents()
            self._begin_reads()
            self._finish_quiet_leases()
            self._want_leases()

    # -- beginning work ------------------------------------------------------------------------------------------------

    def _want_leases(self) -> None:
        room = (1 if self.shape.synchronous else LEASES_PER_WORKER) - len(self.leases)
        if room > 0 and room != self._wish:
            self._wish = room
            self.outbox.append(Wanted(self.job, self.epoch, room))

    def _ask_extents(self) -> None:
        for lease in self.leases.values():
            unknown = lease.unknown
            if unknown is None or lease.asking or lease.abandoned:
                continue
            if not self.shape.ask_extents:
                lease.learn_data()
                continue
            source = next((source for source in self.sources if source.vector.used <= source.active), None)
            if source is None:
                return
            lease.asking = True
            source.ask(lease, Range.of(unknown.start, min(unknown.length, ZERO_BYTES_MAX)))

    def _begin_reads(self) -> None:
        if self.shape.synchronous:
            if self._operations == 0 and self.sources[0].active < 1:
                self._begin_next(self.sources[0])
            return
        # Each connection in turn, so that no one of them is filled while its neighbours starve.
        idle = 0
        while idle < len(self.sources):
            source = self.sources[self._next_source % len(self.sources)]
            self._next_source += 1
            idle = 0 if source.active < source.depth and self._begin_next(source) else idle + 1

    def _begin_next(self, source: Source) -> bool:
        """Begin the next read on `source`; zeroes met on the way are noted. False when there is nothing to read."""
        for lease in self.leases.values():
            while not lease.abandoned and (piece := lease.next_piece(self.shape.request_size)):
                if not piece.zero:
                    self._begin_read(source, lease, piece.where)
                    return True
                self._note_zeroes(lease, piece.where)
                if self.shape.synchronous and self._operations:
                    return True
            if lease.wants_probe and not lease.abandoned:
                self._begin_read(source, lease, Range.of(lease.where.end, 1))
                return True
        return False

    def _begin_read(self, source: Source, lease: LeaseWork, where: Range) -> None:
        operation = Operation(lease, where)
        operation.buffer = self._buffers.take()
        lease.outstanding += 1
        lease.reads += 1
        self._operations += 1
        source.begin(operation)
        operation.advance(OperationEvent.BEGIN_READ)
        source.read(operation)

    # -- what the sides report -----------------------------------------------------------------------------------------

    def extents_done(self, lease: LeaseWork, error: RequestError | None, extents: Extents | None) -> None:
        """Block status of the lease's unknown part. One that failed says nothing: all of it is read as data."""
        lease.asking = False
        if error is not None or not extents:
            lease.learn_data()
        else:
            lease.learn(extents)

    def read_done(self, operation: Operation, error: RequestError | None, count: int) -> None:
        """A read ended. Its payload is whole and held, or there was an error."""
        lease = operation.lease
        if self._given_up(lease):
            self._drop(operation)
        elif error is not None:
            self._read_failed(operation, error)
        elif lease.until_end:
            self._stream_read(operation, count)
        else:
            operation.advance(OperationEvent.READ_DONE)
            self._write(operation)

    def _read_failed(self, operation: Operation, error: RequestError) -> None:
        source = self.sources[operation.source]
        operation.attempts += 1
        if operation.attempts >= ATTEMPTS_PER_REQUEST:
            self._fail(operation.lease, "source", "read", source.connection, operation.where, error)
            self._drop(operation)
            return
        operation.advance(OperationEvent.READ_FAILED)

        def again() -> None:
            if self._given_up(operation.lease):
                self._drop(operation)
            else:
                source.read(operation)

        self._later(operation.attempts, again)

    def _stream_read(self, operation: Operation, count: int) -> None:
        """A stream's read: a short one is its end, and the lease ends there."""
        lease, where = operation.lease, operation.where
        if count > 0 and where.start >= lease.where.end:
            self._fail_too_long(lease)
            self._drop(operation)
            return
        if count < where.length:
            lease.end = where.start + count
            lease.segments.clear()
            lease.known_until = lease.where.end
        if count == 0:
            self._drop(operation)
            return
        operation.where = Range.of(where.start, count)
        operation.advance(OperationEvent.READ_DONE)
        self._write(operation)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self, operation: Operation) -> None:
        """WRITING begins: find the zeroes in the payload, and queue a WRITE for every stretch of the rest."""
        if self.shape.needs_merge(operation.where):
            self._merge(operation)
            return
        buffer, where, unit = operation.buffer, operation.where, self.shape.sparse_unit
        assert buffer is not None
        view = memoryview(buffer)
        data = [(0, where.length)]
        if unit:
            data = []
            for start, end, zero in find_runs(buffer, where.length, unit, where.start % unit):
                if zero:
                    self._note_zeroes(operation.lease, Range(where.start + start, where.start + end))
                else:
                    data.append((start, end))
        parts = [
            Part(operation, Range(where.start + start, where.start + end), view[start:end], is_zero=False)
            for start, end in data
        ]
        if not parts:
            self._drop(operation)
            return
        operation.parts_left = operation.parts_unsent = len(parts)
        target = self._target_of(operation)
        for part in parts:
            self._queue(target, part)

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
        assert buffer is not None and old is not None
        buffer[where.length : where.length + kept] = old[len(old) - kept :]
        whole = Range(where.start, part.where.end)
        operation.advance(OperationEvent.READ_DONE)
        operation.parts_left = operation.parts_unsent = 1
        view = memoryview(buffer)[: whole.length]
        self._queue(self._target_of(operation), Part(operation, whole, view, is_zero=False))

    def _target_of(self, operation: Operation) -> Target:
        return self.targets[max(operation.source, 0) % len(self.targets)]

    def _queue(self, target: Target, part: Part) -> None:
        if target.waiting or not target.has_room(part):
            target.waiting.append(part)
        else:
            self._submit(target, part)

    def _pump_target(self, target: Target) -> None:
        while target.waiting and target.has_room(target.waiting[0]):
            self._submit(target, target.waiting.popleft())

    def _submit(self, target: Target, part: Part) -> None:
        lease = part.operation.lease
        if self.now >= lease.expires and not lease.abandoned:
            self._abandon(lease, ErrorReport(kind="connection", text="the lease expired"))
        if self._given_up(lease):
            self._part_over(part)
        else:
            target.submit(part, allocated=self.shape.allocated)

    def part_done(self, target: Target, part: Part, error: RequestError | None) -> None:
        """A write, a zeroing or a merge's read was answered."""
        operation = part.operation
        lease = operation.lease
        if error is not None and not self._given_up(lease):
            self._part_failed(target, part, error)
            return
        if error is None and part.is_merge and not self._given_up(lease):
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

    def _part_failed(self, target: Target, part: Part, error: RequestError) -> None:
        operation = part.operation
        part.attempts += 1
        if part.payload is None and error.errno_name in _ZERO_REFUSALS:
            operation.advance(OperationEvent.WRITE_FAILED)
            self._fill_instead(target, part)
            return
        if part.attempts >= ATTEMPTS_PER_REQUEST:
            doing = "read" if part.is_merge else "write" if part.payload is not None else "zero"
            self._fail(operation.lease, "destination", doing, target.connection, part.where, error)
            self._part_over(part)
            return
        if part.is_merge:
            operation.advance(OperationEvent.READ_FAILED)
        else:
            operation.advance(OperationEvent.WRITE_FAILED if part.payload else OperationEvent.ZERO_FAILED)
            operation.parts_unsent += 1
        self._later(part.attempts, lambda: self._queue(target, part))

    def _part_over(self, part: Part) -> None:
        operation = part.operation
        operation.parts_left -= 1
        if operation.parts_left == 0:
            if operation.state is OperationState.CONFIRMING:
                operation.advance(OperationEvent.CONFIRMED)
                self._release(operation)
            else:
                self._drop(operation)

    # -- zeroes --------------------------------------------------------------------------------------------------------

    def _note_zeroes(self, lease: LeaseWork, where: Range) -> None:
        """`where` is zero at the source. Held back, so that neighbours join; in order and at once for streams."""
        if self.shape.zero_policy is ZeroPolicy.SKIP:
            lease.skipped += where.length
            return
        lease.zeroes.add(where)
        if self.shape.synchronous or len(lease.zeroes) > ZERO_RUNS_MAX:
            self._issue_zeroes(lease, lease.zeroes.pop_first())

    def _issue_zeroes(self, lease: LeaseWork, where: Range) -> None:
        operation = Operation(lease, where)
        operation.advance(OperationEvent.BEGIN_ZERO)
        lease.outstanding += 1
        self._operations += 1
        if self._zeroes is None:
            parts = [Part(operation, piece, None, is_zero=True) for piece in where.split(ZERO_BYTES_MAX)]
        else:
            parts = self._fill_parts(operation, where)
        operation.parts_left = operation.parts_unsent = len(parts)
        target = self.targets[where.start // self.shape.request_size % len(self.targets)]
        for part in parts:
            self._queue(target, part)

    def _fill_parts(self, operation: Operation, where: Range) -> list[Part]:
        if self._zeroes is None:
            self._zeroes = memoryview(bytes(self.shape.request_size))
        zeroes = self._zeroes
        pieces = where.split(self.shape.request_size)
        return [Part(operation, piece, zeroes[: piece.length], is_zero=True) for piece in pieces]

    def _fill_instead(self, target: Target, part: Part) -> None:
        """The server refused to zero `part`: write zeroes as data in its place."""
        operation = part.operation
        parts = self._fill_parts(operation, part.where)
        operation.parts_left += len(parts) - 1
        operation.parts_unsent += len(parts)
        for piece in parts:
            self._queue(target, piece)

    # -- the end of operations and leases ------------------------------------------------------------------------------

    def _drop(self, operation: Operation) -> None:
        operation.advance(OperationEvent.DROPPED)
        self._release(operation)

    def _release(self, operation: Operation) -> None:
        if operation.source >= 0:
            self.sources[operation.source].end(operation)
            operation.lease.reads -= 1
        if operation.buffer is not None:
            self._buffers.give(operation.buffer)
            operation.buffer = None
        self._operations -= 1
        operation.lease.outstanding -= 1
        if operation.lease.abandoned:
            self._forget_if_quiet(operation.lease)

    def _finish_quiet_leases(self) -> None:
        """Issue the zeroes of leases whose reads are over; report as written those with nothing left."""
        for lease in list(self.leases.values()):
            if lease.abandoned or not lease.exhausted:
                continue
            if lease.outstanding == 0 and not lease.zeroes:
                self._written(lease)
            elif lease.reads == 0:
                while lease.zeroes:
                    self._issue_zeroes(lease, lease.zeroes.pop_first())

    def _written(self, lease: LeaseWork) -> None:
        del self.leases[lease.lease]
        self.flushes.written(lease.lease)
        self.outbox.append(Written(self.job, self.epoch, lease.lease, lease.counters, lease.end))

    def _given_up(self, lease: LeaseWork) -> bool:
        return lease.abandoned or self.draining

    def _abandon(self, lease: LeaseWork, error: ErrorReport | None) -> None:
        if not lease.abandoned:
            lease.abandoned = True
            lease.error = error
            self._forget_if_quiet(lease)

    def _forget_if_quiet(self, lease: LeaseWork) -> None:
        if lease.outstanding == 0 and self.leases.pop(lease.lease, None) is not None and lease.error is not None:
            self.outbox.append(Failed(self.job, self.epoch, lease.lease, lease.error))

    def _fail(
        self,
        lease: LeaseWork,
        side: Side,
        doing: str,
        connection: Connection,
        where: Range,
        error: RequestError,
    ) -> None:
        peer = connection.description.peer
        text = (
            f"{side} {peer}: {doing} of {where.length} bytes at offset {where.start} failed "
            f"{ATTEMPTS_PER_REQUEST} times: {error}"
        )
        report = ErrorReport("request", text, side, peer, where.start, where.length, error.errno_name)
        self._abandon(lease, report)

    def _fail_too_long(self, lease: LeaseWork) -> None:
        peer = self.targets[0].connection.description.peer
        text = f"destination {peer}: smaller than the source, which goes on after {lease.where.end} bytes"
        self._abandon(lease, ErrorReport("user", text, "destination", peer))

    def _later(self, attempts: int, action: Callable[[], None]) -> None:
        """Try again after a pause that doubles with each attempt."""
        when = self.now + RETRY_DELAY_SECONDS * (1 << (attempts - 1))
        heapq.heappush(self._delayed, (when, next(self._order), action))

    def flush_done(self, target: Target, error: RequestError | None) -> None:
        """Passed on to the flush under way."""
        self.flushes.done(target, error)
