"""The copier: leases in, requests on connections and reports out. Pure: no I/O, clock or ring.

The shell adds connections, grants leases, passes on what the connections report, and calls `pump(now)` once after each
batch of events; the copier queues requests on its connections and messages in `outbox`. Its rules:

- No WRITE is queued before its READ ended without error and all payload is held.
- A lease's clock is looked at before each write is queued; whoever sends what is queued compares the time with
  `earliest_expiry` before each piece, and calls `expire`. An expired lease writes nothing more.
- A failed read is asked again, a failed write is sent again from its buffer, `attempts` times in all; then the lease
  fails, and with it nothing else (or, of what is to be salvaged, the read is cut: salvage.py). What was spliced is gone
  after a failed write: it is read again, and both go through a buffer from then on.
- Counters count acknowledged bytes only.
"""

from __future__ import annotations

from math import inf

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import LEASES_PER_WORKER, ZERO_BYTES_MAX
from nbdshard.common.messages import ErrorReport, Lease, Side, Written
from nbdshard.common.ranges import Range
from nbdshard.worker.flushes import Flushes
from nbdshard.worker.lanes import Lanes, MakeLane
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.leaseholder import Leaseholder
from nbdshard.worker.lending import Lendable
from nbdshard.worker.operation import Operation, Part
from nbdshard.worker.payloads import Payloads
from nbdshard.worker.piped import PipePool
from nbdshard.worker.ports import Connection, Extents
from nbdshard.worker.reports import request_failure, too_small
from nbdshard.worker.salvage import Salvage, give_up, places
from nbdshard.worker.shape import CopyShape
from nbdshard.worker.sides import Source, Target
from nbdshard.worker.states import OperationEvent
from nbdshard.worker.writer import Writer


class Copier(Leaseholder[LeaseWork]):
    """One worker's part of one job."""

    def __init__(
        self,
        shape: CopyShape,
        job: str,
        epoch: int,
        now: float,
        pipes: PipePool | None = None,
        make_lane: MakeLane | None = None,
    ) -> None:
        """`pipes`: where payload that need not enter user space goes; None: all of it goes through buffers.

        `make_lane`: None for a copier that does everything itself.
        """
        super().__init__(shape, job, epoch, now)
        self.sources: list[Source] = []
        self.flushes = Flushes(self)
        self.payloads = Payloads(shape.request_size, pipes)
        self._writer = Writer(shape, self)
        self.lanes = Lanes(shape, make_lane, self)
        self._salvage = Salvage(shape)
        self._operations = 0  # not EMPTY
        self._next_source = 0

    # -- the shell's side ----------------------------------------------------------------------------------------------

    def add_source(self, connection: Connection) -> Source:
        """Use one more connection to the source; the returned listener hears of its requests."""
        self.has_work = True
        rows = max(self.shape.depth, self.shape.requests)
        if isinstance(connection, Lendable) and connection.is_shared:
            rows = self.shape.depth + self.shape.requests  # a lane's come on top of what was read beside it
        source = Source(len(self.sources), connection, self.shape.depth, rows, self)
        self.sources.append(source)
        self.payloads.grow(rows)
        self.lanes.join()
        return source

    def add_target(self, connection: Connection, requests: int) -> Target:
        """Use one more connection to the destination, with up to `requests` requests in flight."""
        self.has_work = True
        target = Target(len(self.targets), connection, requests, self.shape.queue_size, self)
        self.targets.append(target)
        self.lanes.join()
        return target

    def grant(self, message: Lease, expires: float) -> None:
        """Begin a lease that is over when `expires` has come. One that is known already is a repeated message."""
        if not self._admits(message):
            return
        self.earliest_expiry = min(self.earliest_expiry, expires)
        self.leases[message.lease] = lease = LeaseWork(
            message.lease,
            message.range,
            expires=expires,
            alignment=self.shape.alignment,
            hole_min=self.shape.hole_min,
            until_end=message.until_end,
        )
        if self.shape.checksum:
            from nbdshard.worker.leaves import LeafDigests  # a copy without a checksum does not load it

            lease.digests = LeafDigests(message.range)

    def renew(self, now: float, expires: float) -> None:
        """The coordinator has heard of us: what is not over at `now` is good until `expires` at least."""
        for lease in self.leases.values():
            if now < lease.expires < expires:
                lease.expires = expires
        self._find_earliest_expiry(now)

    def expire(self, now: float) -> bool:
        """`earliest_expiry` has come: give up the leases that are over.

        Whether a request that writes under one of them is not yet acknowledged. It may be queued, or half sent: nothing
        more may be sent on its connection then, which only closing it ensures.
        """
        self.now = now
        over = [lease for lease in self.leases.values() if now >= lease.expires]
        for lease in over:
            self.abandon(lease, ErrorReport(kind="connection", text="the lease expired"))
        self._find_earliest_expiry(now)
        return self._writer.is_writing(over) or self.lanes.is_writing(over)

    def _find_earliest_expiry(self, now: float) -> None:
        self.earliest_expiry = min(
            (lease.expires for lease in self.leases.values() if now < lease.expires), default=inf
        )

    def limit(self, rate: int | None) -> None:
        """Read no more than `rate` bytes per second from now on; None: without a limit; 0: begin nothing."""
        if rate != self.bucket.rate and (not rate or self.bucket.rate is None):
            self.lanes.stop()  # they have been given more than that, or less than they could have
        super().limit(rate)

    def drain(self) -> None:
        """Begin nothing more; `idle` tells when what was begun is finished."""
        self.draining = True
        self.lanes.stop()
        super().drain()

    @property
    def targets(self) -> list[Target]:
        """The connections to the destination."""
        return self._writer.targets

    @property
    def idle(self) -> bool:
        """Nothing is under way on any connection."""
        return self._operations == 0 and not self.flushes.busy and self.lanes.idle

    def flush(self, flush: int) -> None:
        """Flush every connection to the destination, and answer with `Flushed`."""
        self.flushes.ask(flush)

    def collect(self) -> None:
        """See what the lanes have done; also where nothing is begun any more."""
        self.lanes.collect()

    @property
    def remarks(self) -> list[str]:
        """Lines for the log; who has told them clears the list."""
        return self.lanes.remarks

    def close(self) -> None:
        """Every connection is closed: end the lanes."""
        self.lanes.close()

    @property
    def at_rest(self) -> bool:
        """Idle, and not even an answer about block status is to come: somebody else may have the connections."""
        return self.idle and not any(source.vector.used for source in self.sources)

    def report_progress(self) -> None:
        """Queue a Progress message for every lease that got further since the last."""
        self.lanes.collect()
        super().report_progress()

    def pump(self, now: float) -> None:
        """Queue all requests that have become possible. Call after every batch of events, and at `deadline`."""
        self.now = now
        self.has_work = False
        self.bucket.ask_again()
        self.lanes.collect()
        self._try_again()
        self._writer.pump()
        if not self.draining and self.sources and self.targets:
            if not self.bucket.is_closed:
                self._ask_extents()
            self.lanes.pump()
            if not self.bucket.is_closed:
                self._begin_reads()
            self._finish_quiet_leases()
            self._want_leases(1 if self.shape.synchronous else LEASES_PER_WORKER)

    # -- beginning work ------------------------------------------------------------------------------------------------

    def _ask_extents(self) -> None:
        for lease in self.leases.values():
            unknown = lease.unknown
            if unknown is None or not lease.wants_extents or lease.abandoned:
                continue
            if not self.shape.ask_extents:
                lease.learn_data()
                continue
            # The last connections first: a lane may want the others.
            free = (each for each in reversed(self.sources) if each.vector.used <= each.active and not each.is_lent)
            source = next(free, None)
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
        full = 0
        while full < len(self.sources):
            source = self.sources[self._next_source % len(self.sources)]
            self._next_source += 1
            if source.active >= source.depth or source.is_lent:
                full += 1
            elif self._begin_next(source):
                full = 0
            else:
                return  # nor would there be anything for another one

    def _may_begin_spliced(self) -> bool:
        """Whether another pipe may be taken: few are kept in use, unless the sources are slow to answer."""
        return self.payloads.piped < self.payloads.pipes_per_source * len(self.sources)

    def _begin_next(self, source: Source) -> bool:
        """Begin the next read on `source`; zeroes met on the way are noted. False when there is nothing to read."""
        for lease in list(self.leases.values()):  # one that has expired may go while its zeroes are issued
            if lease.suspects and not lease.abandoned:
                if not self.bucket.admits(lease.suspects[-1].length, self.now):
                    continue
                self._begin_read(source, lease, lease.suspects.pop(), is_suspect=True)
                return True
            if self.shape.splice and lease.is_dense and lease.has_data and not self._may_begin_spliced():
                return False
            while self._may_take_from(lease) and (piece := lease.next_piece(self.shape.request_size)):
                if not piece.zero:
                    self._begin_read(source, lease, piece.where)
                    return True
                if lease.digests is not None:
                    lease.digests.add_zeroes(piece.where)
                self._writer.note_zeroes(lease, piece.where)
                if self.shape.synchronous and self._operations:
                    return True
            if lease.wants_probe and not lease.abandoned:
                self._begin_read(source, lease, Range.of(lease.where.end, 1))
                return True
        return False

    def _may_take_from(self, lease: LeaseWork) -> bool:
        if lease.abandoned or self.lanes.serves(lease):
            return False
        return not lease.has_data or self.bucket.admits(self.shape.request_size, self.now)  # zeroes cost nothing

    def _begin_read(self, source: Source, lease: LeaseWork, where: Range, *, is_suspect: bool = False) -> None:
        self.bucket.take(where.length)
        operation = self.begin(lease, where)
        operation.is_suspect = is_suspect
        self.payloads.hold(operation, splice=lease.is_dense and not is_suspect and self.shape.may_splice(where))
        lease.reads += 1
        source.begin(operation)
        operation.advance(OperationEvent.BEGIN_READ)
        source.read(operation)

    # -- what the sides report -----------------------------------------------------------------------------------------

    def extents_done(self, lease: LeaseWork, error: RequestError | None, extents: Extents | None) -> None:
        """Block status of the lease's unknown part. One that failed says nothing: all of it is read as data."""
        self.has_work = True
        lease.asking = False
        if error is not None or not extents:
            lease.learn_data()
        else:
            lease.learn(extents)

    def read_arriving(self, operation: Operation) -> None:
        """The fastest answer so far tells what the source takes when nothing holds it up."""
        if self.payloads.learn(max(0.0, self.now - operation.asked)):
            self.has_work = True

    def read_done(self, operation: Operation, error: RequestError | None, count: int) -> None:
        """A read ended. Its payload is whole and held, or there was an error."""
        lease = operation.lease
        if self.given_up(lease):
            self.drop(operation)
        elif error is not None:
            self._read_failed(operation, error)
        elif lease.until_end:
            self._stream_read(operation, count)
        else:
            self._held(operation)

    def _held(self, operation: Operation) -> None:
        """What `operation` is to write is whole: all that was read, or zeroes in the place of what cannot be."""
        if (digests := operation.lease.digests) is not None:
            assert operation.buffer is not None  # nothing is spliced
            digests.add_data(operation.where.start, operation.buffer, operation.where.length)
        operation.advance(OperationEvent.READ_DONE)
        self._writer.write(operation)

    def _read_failed(self, operation: Operation, error: RequestError) -> None:
        source = self.sources[operation.source]
        operation.attempts += 1
        if operation.attempts < self._salvage.attempts(operation, error):
            operation.advance(OperationEvent.READ_FAILED)
            self.read_again(operation, operation.attempts)
        elif not self._salvage.applies(error):
            self.fail(operation.lease, "source", "read", source.connection, operation.where, error)
            self.drop(operation)
        elif self._salvage.cut(operation):
            self.drop(operation)
        else:
            self.payloads.hold_in_memory(operation)
            give_up(operation)
            self._held(operation)

    def read_again(self, operation: Operation, attempts: int) -> None:
        """After a pause, and into a buffer: what may fail again must be held."""
        self.payloads.hold_in_memory(operation)

        def again() -> None:
            if self.given_up(operation.lease):
                self.drop(operation)
            else:
                self.bucket.take(operation.where.length)
                self.sources[operation.source].read(operation)

        self.later(operation.lease, attempts, again)

    def _stream_read(self, operation: Operation, count: int) -> None:
        """A stream's read: a short one is its end, and the lease ends there."""
        lease, where = operation.lease, operation.where
        if count > 0 and where.start >= lease.where.end:
            self.abandon(lease, too_small(self.targets[0].connection.description.peer, lease.where.end))
            self.drop(operation)
            return
        if count < where.length:
            lease.end = where.start + count
            lease.segments.clear()
            lease.known_until = lease.where.end
        if count == 0:
            self.drop(operation)
            return
        operation.where = Range.of(where.start, count)
        operation.advance(OperationEvent.READ_DONE)
        self._writer.write(operation)

    # -- the end of operations and leases ------------------------------------------------------------------------------

    def begin(self, lease: LeaseWork, where: Range) -> Operation:
        """A new operation of `lease`, EMPTY still."""
        lease.outstanding += 1
        self._operations += 1
        return Operation(lease, where)

    def drop(self, operation: Operation) -> None:
        """End an operation whose bytes are not written by itself: they joined the zeroes, or were given up."""
        operation.advance(OperationEvent.DROPPED)
        self.release(operation)

    def release(self, operation: Operation) -> None:
        """An operation is EMPTY: free its row and its buffer."""
        self.has_work = True
        if operation.source >= 0:
            self.sources[operation.source].end(operation)
            operation.lease.reads -= 1
        self.payloads.release(operation)
        self._operations -= 1
        operation.lease.outstanding -= 1
        if operation.lease.abandoned:
            self._forget_if_quiet(operation.lease)

    def note_zeroes(self, lease: LeaseWork, where: Range) -> None:
        """Passed on to the writer."""
        self._writer.note_zeroes(lease, where)

    def stretch_over(self, lease: LeaseWork) -> None:
        """A lane has done a stretch of `lease`, or given it back."""
        self.has_work = True
        if lease.abandoned:
            self._forget_if_quiet(lease)

    def _finish_quiet_leases(self) -> None:
        """Issue the zeroes of leases whose reads are over; report as written those with nothing left."""
        for lease in list(self.leases.values()):
            if lease.abandoned or not lease.exhausted:
                continue
            if lease.outstanding == 0 and not lease.zeroes:
                self._written(lease)
            elif lease.reads == 0:
                self._writer.issue_held_zeroes(lease)

    def _written(self, lease: LeaseWork) -> None:
        del self.leases[lease.lease]
        self.flushes.written(lease.lease)
        told = list(lease.digests.messages(self.job, self.epoch, lease.lease)) if lease.digests is not None else []
        leaves = sum(run.count for message in told for run in message.runs)
        self.outbox += told
        done, unreadable = lease.counters, places(lease)
        self.outbox.append(Written(self.job, self.epoch, lease.lease, done, lease.end, unreadable, leaves))

    def _call_back(self, lease: LeaseWork) -> None:
        self.lanes.stop(lease)

    def fail(
        self, lease: LeaseWork, side: Side, doing: str, connection: Connection, where: Range, error: RequestError
    ) -> None:
        """A request failed for the last time, and its lease with it."""
        peer = connection.description.peer
        self.abandon(lease, request_failure(side, peer, doing, where, error, self.shape.attempts))

    def part_done(self, target: Target, part: Part, error: RequestError | None) -> None:
        """Passed on to the writer."""
        self.has_work = True
        self._writer.part_done(target, part, error)

    def flush_done(self, target: Target, error: RequestError | None) -> None:
        """Passed on to the flush under way."""
        self.has_work = True
        self.flushes.done(target, error)
