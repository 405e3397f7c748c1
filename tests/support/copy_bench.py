"""A copier, its pipes and its lane between two real servers on a real ring, turned by the test as a worker turns them.

What a worker adds is left out: the control channel, and connecting anew. So each way payload can go is tried with each
fault in the time of a few turns, and it is seen which way it went.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from math import inf

from nbdshard.common.errors import TimedOut
from nbdshard.common.limits import LANE_BYTES_MIN
from nbdshard.common.messages import Counters, ErrorReport, Failed, JobOptions, Lease, Written
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Ring, open_ring
from nbdshard.worker.copier import Copier
from nbdshard.worker.lane import Lane
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.shape import CopyShape, ZeroPolicy
from nbdshard.worker.stretch import Outcome
from support.images import KIB, MIB
from support.link_bench import TURN_SECONDS, End, LinkBench

WAYS = ("buffers", "pipes", "lanes")
BY_CALLS = "buffers by calls"  # as "buffers", of a worker whose leases end: nothing that is sent waits in the ring
REQUEST = 256 * KIB  # the shortest that is spliced
SIZE = LANE_BYTES_MIN + 2 * MIB  # enough to be lent again after a fault in the first half mebibyte
LEASE_SECONDS = 100_000.0
AHEAD_SECONDS = 4.0  # in a turn, while a test lets time fly
OPTIONS = JobOptions(
    request_size=REQUEST, requests=64, queue_size=16 * MIB, sparse_unit=None, extents=False, attempts=3
)


class CountedLane(Lane):
    """`moved`: bytes that it has copied in all of its loans. `odd`: those loans that an odd reply has ended."""

    moved = 0
    odd = 0

    def take_outcome(self) -> Outcome | None:
        outcome = super().take_outcome()
        if outcome is not None:
            self.moved += self.copied
            self.odd += bool(outcome.source_bytes or outcome.target_bytes)
        return outcome


def is_waiting(lane: Lane) -> bool:
    """For one of the sides, which cannot show then what the other would do; or for its next loan."""
    return not lane.is_out or inf in (lane.oldest_read()[0], lane.oldest_write()[0])


class CopyBench(LinkBench):
    """One connection to either side, and one lease. `way`: one of WAYS, or BY_CALLS."""

    handles = OPTIONS.requests + 1  # one for a flush

    def __init__(self, ring: Ring, way: str) -> None:
        super().__init__(ring, SystemPlumbing(), REQUEST)
        self.way = way
        self.lanes: list[CountedLane] = []
        self.remarks: list[str] = []
        self.now = time.monotonic()
        self._ahead_seconds = 0.0  # of the clock, as the links see it
        self._copier: Copier | None = None
        self._work: LeaseWork | None = None
        self._is_losing = False

    # -- the worker's part ---------------------------------------------------------------------------------------------

    def connect(self, source: str, target: str, options: JobOptions = OPTIONS) -> None:
        """A copier between two servers, given by their URIs."""
        is_spliced = self.way in ("pipes", "lanes")
        is_direct = is_spliced or self.way == BY_CALLS
        self.source = self.open(source, "source", splice=is_direct)
        self.target = self.open(target, "destination", splice=is_direct)
        ends = self.source.link, self.target.link
        shape = CopyShape.of(ends[0].description, ends[1].description, options, splice=is_spliced)
        pipes = self.pool if is_spliced else None
        copier = Copier(shape, "job", 1, self.now, pipes, self._make_lane if self.way == "lanes" else None)
        ends[0].listener = copier.add_source(ends[0])
        ends[1].listener = copier.add_target(ends[1], options.requests)
        self._copier = copier

    def _make_lane(self, shape: CopyShape) -> Lane:
        room = (shape.request_size, shape.sparse_unit, shape.requests, shape.queue_size)
        may_zero = shape.zero_policy is ZeroPolicy.REQUEST
        lane = CountedLane(*room, time.monotonic, self.ring.wake, SystemPlumbing(), zeroes=may_zero)
        self.lanes.append(lane)
        return lane

    @property
    def copier(self) -> Copier:
        assert self._copier is not None
        return self._copier

    def turn(self, seconds: float = TURN_SECONDS) -> bool:
        self.now = time.monotonic() + self._ahead_seconds
        if self._copier is not None:
            self._copier.collect()
            if not self._is_losing:
                self._copier.pump(self.now)
            self.remarks += self._copier.remarks
            self._copier.remarks.clear()
        return super().turn(seconds)

    def lost_one(self) -> None:
        self._is_losing = True
        if self._copier is not None:
            self._copier.drain()
        for end in self.ends:
            end.link.disconnect()

    # -- what a test asks for ------------------------------------------------------------------------------------------

    def begin(self, size: int = SIZE) -> None:
        """Lease the first `size` bytes."""
        self.copier.grant(Lease("job", 1, 1, Range(0, size), LEASE_SECONDS), self.now + LEASE_SECONDS)
        self._work = self.copier.leases[1]

    def copy(self, size: int = SIZE) -> Counters:
        """Copy so much, whatever goes wrong on the way; and leave both servers."""
        self.begin(size)
        return self.finish()

    def finish(self) -> Counters:
        """The end of a copy that was begun: all of it is written."""
        self.until("the lease to be over", lambda: self.told() or any(end.lost for end in self.ends))
        (written,) = self.told()
        assert isinstance(written, Written), written
        self.copier.drain()
        self.until("the copier to be idle", lambda: self.copier.idle)
        self.leave()
        assert [end.lost for end in self.ends] == [[], []]
        self._assert_way(written.done)
        return written.done

    def told(self) -> list[Written | Failed]:
        """How the lease ended, once it has."""
        return [message for message in self.copier.outbox if isinstance(message, Written | Failed)]

    def fail(self) -> Failed:
        """The end of a copy that was begun, and whose lease fails."""
        self.until("the lease to be over", self.told)
        (failed,) = self.told()
        assert isinstance(failed, Failed), failed
        return failed

    def time_out(self) -> End:
        """As `lose`, by a request that has grown too old: once nothing comes any more, time flies."""
        self.stays_quiet(0.1)
        self.until("the lane to wait", lambda: all(is_waiting(lane) for lane in self.lanes))

        def is_over() -> bool:
            self._ahead_seconds += AHEAD_SECONDS
            for end in self.ends:
                end.link.tick(self.now)
            return any(end.lost for end in self.ends)

        self.until("a request to be given up", is_over)
        lost = self.lose()
        assert isinstance(lost.lost[0], TimedOut)
        return lost

    def lose(self) -> End:
        """The end of a copy that was begun, by the loss of one connection. The other was left softly."""
        self.until("a connection to be lost", lambda: any(end.lost for end in self.ends))
        self.until("the links to be closed", lambda: all(end.link.closed for end in self.ends))
        self.settle()
        assert sum(bool(end.lost) for end in self.ends) == 1, [end.lost for end in self.ends]
        (lost,) = [end for end in self.ends if end.lost]
        assert len(lost.lost) == 1
        self.copier.abort(ErrorReport("connection", "lost"))
        assert not any(isinstance(message, Written) for message in self.told())
        return lost

    @property
    def acknowledged(self) -> int:
        """Bytes that count as copied or zeroed."""
        assert self._work is not None
        return self._work.copied + self._work.zeroed

    def _assert_way(self, done: Counters) -> None:
        """The payload went the way it was to go."""
        if self.way in ("buffers", BY_CALLS):
            assert done.spliced == 0
        if self.way == "lanes":
            (lane,) = self.lanes
            assert lane.moved or lane.odd  # all may have been asked, and nothing answered yet, when the fault came
        else:
            assert not self.lanes

    def close(self) -> None:
        if self._copier is not None:
            self._copier.drain()
        super().close()
        if self._copier is not None:
            self._copier.close()


@contextlib.contextmanager
def copy_bench(ring: str, way: str) -> Iterator[CopyBench]:
    """Nothing is left open when the block ends, however it ends."""
    loop, _ = open_ring(ring)
    try:
        bench = CopyBench(loop, way)
        try:
            yield bench
        finally:
            bench.close()
            bench.pool.close()
    finally:
        loop.close()
