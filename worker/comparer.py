"""The comparer: leases in, reads on the connections to both sides, differences out. Pure; has the place of a copier.

What both sides say is zero is equal, and not read. Where one says so the other is read, and must be zeroes. All else is
read from both sides into a pair of buffers, and compared when both are whole. Nothing is ever written or flushed. So
the end of a lease needs no clock here either: a comparison that goes on does no harm, and a report that comes late is
dropped.
"""

from __future__ import annotations

from typing import Final

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import DIFFERENCE_BYTES, ZERO_BYTES_MAX
from nbdshard.common.messages import Compared, EndpointDescription, Flushed, JobOptions, Lease, Side
from nbdshard.common.ranges import Range
from nbdshard.worker.compare_lease import CompareWork
from nbdshard.worker.differing import find_differing
from nbdshard.worker.leaseholder import Leaseholder
from nbdshard.worker.operation import Vector
from nbdshard.worker.ports import Connection, Extents
from nbdshard.worker.reports import request_failure
from nbdshard.worker.shape import CopyShape

SIDES: Final[tuple[Side, Side]] = ("source", "destination")
_NO_BYTES: Final = bytearray()


class Pair:
    """A stretch under way on both sides. `read` counts the bytes of each side that are in its buffer once it is whole;
    the rest of the stretch is zeroes there."""

    __slots__ = ("attempts", "buffers", "pending", "read", "where", "work")

    def __init__(self, work: CompareWork, where: Range) -> None:
        self.work = work
        self.where = where
        self.buffers = [_NO_BYTES, _NO_BYTES]
        self.read = [0, 0]
        self.attempts = [0, 0]
        self.pending = 0  # sides whose read is not answered, or waits for its next try


class Reader:
    """One connection to either side, and its rows. Implements `ports.Listener`."""

    def __init__(self, comparer: Comparer, side: int, connection: Connection, requests: int) -> None:
        self.side = side
        self.connection = connection
        self.vector: Vector[Pair | CompareWork] = Vector(requests + 1)  # one row more, for block status
        self.active = 0  # pairs that read here, also while they wait for their next try
        self.asking = False  # a block status request is under way
        self._comparer = comparer

    def read(self, pair: Pair, where: Range) -> None:
        view = memoryview(pair.buffers[self.side])[: where.length]
        self.connection.read(self.vector.take(pair), where, view)

    def ask(self, work: CompareWork, where: Range) -> None:
        self.asking = True
        self.connection.extents(self.vector.take(work), where)

    def sent(self, handle: int) -> None:
        """Nothing depends on it."""

    def arriving(self, handle: int) -> None:
        """Nothing depends on it."""

    def done(self, handle: int, error: RequestError | None, count: int, extents: Extents | None) -> None:
        entry = self.vector[handle]
        self.vector.release(handle)
        if isinstance(entry, Pair):
            self._comparer.read_done(self, entry, error)
        else:
            self.asking = False
            self._comparer.extents_done(self, entry, error, extents)


class Comparer(Leaseholder[CompareWork]):
    """One worker's part of one job that compares."""

    def __init__(
        self,
        shape: CopyShape,
        options: JobOptions,
        ends: tuple[EndpointDescription, EndpointDescription],
        job: str,
        epoch: int,
        now: float = 0.0,
    ) -> None:
        """`shape`: that of a copy between the same `ends`, which are source and destination."""
        super().__init__(shape, job, epoch, now)
        self.readers: tuple[list[Reader], list[Reader]] = ([], [])
        self.remarks: list[str] = []
        self._sizes = _sizes(options, ends)
        self._asks = tuple(options.extents and end.can_extents for end in ends)  # for block status
        self._alignment = max(shape.alignment, DIFFERENCE_BYTES)
        self._minimum = tuple(end.block_minimum for end in ends)
        self._pairs = 0  # under way
        self._buffers: list[bytearray] = []  # not in use; the last one used is the first to be used again

    # -- the shell's side: as of a copier ------------------------------------------------------------------------------

    def add_source(self, connection: Connection) -> Reader:
        """Read the source over one more connection; the returned listener hears of its requests."""
        return self._add(0, connection)

    def add_target(self, connection: Connection, requests: int) -> Reader:
        """Read the destination over one more connection."""
        del requests
        return self._add(1, connection)

    def _add(self, side: int, connection: Connection) -> Reader:
        self.has_work = True
        reader = Reader(self, side, connection, self.shape.depth)
        self.readers[side].append(reader)
        return reader

    def grant(self, message: Lease, expires: float) -> None:
        """Begin a lease. One that is known already is a repeated message."""
        del expires
        if not self._admits(message):
            return
        work = CompareWork(
            message.lease, message.range, self._sizes, alignment=self._alignment, hole_min=self.shape.hole_min
        )
        for known, asks in zip(work.maps, self._asks, strict=True):
            if known is not None and not asks:
                known.learn_data()
        self.leases[message.lease] = work

    def renew(self, now: float, expires: float) -> None:
        """No lease ends here."""

    def expire(self, now: float) -> bool:
        """No lease ends here, and nothing is written."""
        self.now = now
        return False

    def flush(self, flush: int) -> None:
        """Nothing was written."""
        self.outbox.append(Flushed(self.job, self.epoch, flush, [], durable=True))

    @property
    def idle(self) -> bool:
        """Nothing is under way on any connection."""
        return self._pairs == 0

    @property
    def at_rest(self) -> bool:
        """Idle, and no answer about block status is to come."""
        return self.idle and not any(reader.vector.used for side in self.readers for reader in side)

    def collect(self) -> None:
        """Nobody else works for it."""

    def close(self) -> None:
        """It has nothing to close."""

    def pump(self, now: float) -> None:
        """Queue all requests that have become possible. Call after every batch of events, and at `deadline`."""
        self.now = now
        self.has_work = False
        self.bucket.ask_again()
        self._try_again()
        if self.draining or not all(self.readers):
            return
        if not self.bucket.is_closed:
            for work in self.leases.values():
                self._ask_extents(work)
            self._begin_pairs()
        for work in list(self.leases.values()):
            if work.exhausted and not work.outstanding and not work.abandoned:
                self._compared(work)
        self._want_leases()

    # -- beginning work ------------------------------------------------------------------------------------------------

    def _ask_extents(self, work: CompareWork) -> None:
        for side, known in enumerate(work.maps):
            if known is None or work.abandoned or not known.wants_extents or known.unknown is None:
                continue
            reader = next((each for each in self.readers[side] if not each.asking), None)
            if reader is not None:
                known.asking = True
                length = min(known.unknown.length, ZERO_BYTES_MAX)
                reader.ask(work, self._whole_blocks(side, known.unknown.start, length))

    def _begin_pairs(self) -> None:
        for work in self.leases.values():
            while not work.abandoned:
                readers = [min(side, key=lambda reader: reader.active) for side in self.readers]
                if any(reader.active >= self.shape.depth for reader in readers):
                    return
                piece = work.next_piece(self.shape.request_size, self._may_read)
                if piece is None:
                    break
                if all(piece.zero):
                    work.skipped += piece.where.length
                else:
                    self.bucket.take(piece.where.length)
                    self._begin(work, piece.where, [reader for reader in readers if not piece.zero[reader.side]])

    def _may_read(self) -> bool:
        return self.bucket.admits(self.shape.request_size, self.now)

    def _begin(self, work: CompareWork, where: Range, readers: list[Reader]) -> None:
        pair = Pair(work, where)
        pair.pending = len(readers)
        work.outstanding += 1
        self._pairs += 1
        for reader in readers:
            side = reader.side
            pair.read[side] = min(where.end, self._sizes[side]) - where.start
            pair.buffers[side] = self._buffers.pop() if self._buffers else bytearray(self.shape.request_size)
            reader.active += 1
            reader.read(pair, self._to_read(pair, side))

    def _to_read(self, pair: Pair, side: int) -> Range:
        """What is asked for: whole blocks of that side, also where the comparison ends inside one."""
        return self._whole_blocks(side, pair.where.start, pair.read[side])

    def _whole_blocks(self, side: int, start: int, length: int) -> Range:
        return Range.of(start, length + -length % self._minimum[side])

    # -- what the connections report -----------------------------------------------------------------------------------

    def extents_done(
        self, reader: Reader, work: CompareWork, error: RequestError | None, extents: Extents | None
    ) -> None:
        """Block status of a lease's unknown part. One that failed says nothing: all of it is read."""
        self.has_work = True
        known = work.maps[reader.side]
        assert known is not None
        known.asking = False
        if error is not None or not extents:
            known.learn_data()
        else:
            known.learn(extents)

    def read_done(self, reader: Reader, pair: Pair, error: RequestError | None) -> None:
        """A read ended: its payload is whole, or there was an error."""
        self.has_work = True
        work = pair.work
        if error is not None and not self.given_up(work):
            self._read_failed(reader, pair, error)
            return
        self._side_over(reader, pair)

    def _side_over(self, reader: Reader, pair: Pair) -> None:
        """One side of `pair` has been read, or was given up."""
        reader.active -= 1
        pair.pending -= 1
        if pair.pending:
            return
        work = pair.work
        if not self.given_up(work):
            start = pair.where.start
            first, second = zip(pair.buffers, pair.read, strict=True)
            for begin, end in find_differing(first, second):
                work.differences.add(Range(start + begin, start + end))
            work.compared += pair.where.length
        self._buffers += [buffer for buffer in pair.buffers if buffer is not _NO_BYTES]
        work.outstanding -= 1
        self._pairs -= 1
        if work.abandoned:
            self._forget_if_quiet(work)

    def _read_failed(self, reader: Reader, pair: Pair, error: RequestError) -> None:
        side, where = reader.side, self._to_read(pair, reader.side)
        pair.attempts[side] += 1
        attempts = pair.attempts[side]
        if attempts >= self.shape.attempts:
            peer = reader.connection.description.peer
            self.abandon(pair.work, request_failure(SIDES[side], peer, "read", where, error, attempts))
            self._side_over(reader, pair)
            return

        def again() -> None:
            if self.given_up(pair.work):
                self._side_over(reader, pair)
            else:
                reader.read(pair, where)

        self.later(pair.work, attempts, again)

    # -- the end of leases ---------------------------------------------------------------------------------------------

    def _compared(self, work: CompareWork) -> None:
        del self.leases[work.lease]
        found = work.differences
        self.outbox.append(Compared(self.job, self.epoch, work.lease, work.counters, found.total_bytes, found.ranges))


def _sizes(options: JobOptions, ends: tuple[EndpointDescription, EndpointDescription]) -> tuple[int, int]:
    """Where either side ends, in bytes; what is read back ends with the source, whatever else the destination has."""
    first, second = (end.size or 0 for end in ends)
    return (first, second) if options.mode == "compare" else (first, first)
