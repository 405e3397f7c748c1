"""A copier with lanes on a bench: lanes that do what a test says, between connections that record who has them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from math import inf

from nbdshard.common.errors import RequestError
from nbdshard.common.messages import EndpointDescription, JobOptions
from nbdshard.common.ranges import Range
from nbdshard.worker.lane_ends import FileSource, FileTarget
from nbdshard.worker.lending import LanePort, LaneSource, LaneTarget, Lendable
from nbdshard.worker.local import refusal
from nbdshard.worker.ports import Payload
from nbdshard.worker.shape import CopyShape
from nbdshard.worker.stretch import Outcome, Stretch, Unanswered
from support.copier_bench import Bench, Call, Recorder, Splicing, splicing
from support.images import KIB

REQUEST = 256 * KIB


class ScriptedLane:
    """Implements `LanePort`: does nothing by itself."""

    def __init__(self, why: str = "") -> None:
        """`why`: what `prepare` says."""
        self.feed: deque[Stretch] = deque()
        self.finished: deque[Stretch] = deque()
        self.feed_low = 0
        self.flush_cookie = 8  # as many as there are requests, by default
        self.is_out = False
        self.wants_flush = False
        self.flushed = False
        self.remarks: deque[str] = deque()
        self.copied = 0
        self.loans = 0
        self.stops = 0
        self.is_closed = False
        self.writing: list[Stretch] = []
        self.outcome: Outcome | None = None
        self._why = why

    def prepare(self) -> str:
        return self._why

    def begin(self, source: LaneSource, target: LaneTarget) -> None:
        assert not self.is_out
        self.is_out = True
        self.wants_flush = self.flushed = False
        self.copied = 0
        self.loans += 1

    def stop(self) -> None:
        self.stops += 1

    def look(self) -> None:
        """It has nothing to tell."""

    def take_outcome(self) -> Outcome | None:
        outcome = self.outcome
        if outcome is not None:
            self.outcome = None
            self.is_out = False
        return outcome

    def oldest_read(self) -> tuple[float, int]:
        return inf, 0

    def oldest_write(self) -> tuple[float, int]:
        return inf, 0

    @property
    def flush_sent(self) -> float:
        return 0.0

    def stretches_written(self) -> list[Stretch]:
        return list(self.writing)

    def close(self) -> None:
        self.is_closed = True

    # -- what a test has it do -----------------------------------------------------------------------------------------

    def take(self) -> Stretch:
        """Begin with the next stretch it was fed."""
        return self.feed.popleft()

    def ask(
        self, stretch: Stretch, cookie: int, length: int = REQUEST, *, is_zero: bool = False, spliced: int = 0
    ) -> Unanswered:
        """Send a request for what comes next in `stretch`, and leave it unanswered."""
        where = Range.of(stretch.at, length)
        stretch.at = where.end
        return Unanswered(cookie, where, stretch, is_zero, spliced)

    def copy(self, stretch: Stretch, length: int | None = None, *, spliced: int = 0) -> None:
        """Copy so much of what comes next, or all that is left."""
        length = stretch.end - stretch.at if length is None else length
        stretch.at += length
        stretch.copied += length
        stretch.spliced += spliced
        self.copied += length
        self._settle(stretch, length)

    def zero(self, stretch: Stretch, length: int) -> None:
        """What comes next is zeroes, and the destination has zeroed it."""
        stretch.at += length
        stretch.zeroed += length
        self._settle(stretch, length)

    def skip(self, stretch: Stretch, length: int) -> None:
        """What comes next is zeroes."""
        stretch.zeroes.append((stretch.at, stretch.at + length))
        stretch.at += length
        self._settle(stretch, length)

    def _settle(self, stretch: Stretch, length: int) -> None:
        stretch.left -= length
        if not stretch.left:
            self.finished.append(stretch)

    def copy_all(self) -> None:
        """Copy all that it was fed."""
        while self.feed:
            self.copy(self.feed.popleft())


class LendableRecorder(Recorder, Lendable):
    """A recorder that can be lent: an NBD connection, or what is shared as a file is."""

    is_shared = False

    def __init__(self, name: str, description: EndpointDescription, splices: bool = False) -> None:
        super().__init__(name, description, splices=splices)
        self.lane: LanePort | None = None
        self.is_reluctant = False  # it refuses to be lent
        self.came_back: list[tuple[bytes, int | None, str]] = []
        self.announced: list[Range] = []
        self.moved: list[Range] = []

    def lend_source(self, lane: LanePort, request_bytes: int) -> LaneSource | None:
        assert request_bytes == REQUEST
        return FileSource(-1) if self._lend(lane) else None

    def lend_target(self, lane: LanePort) -> LaneTarget | None:
        return FileTarget(-1) if self._lend(lane) else None

    def _lend(self, lane: LanePort) -> bool:
        assert self.lane is None
        assert self.is_shared or not self.open, "something is under way"
        if self.is_reluctant:
            return False
        self.lane = lane
        return True

    def _record(self, call: Call) -> None:
        assert self.is_shared or not (self.lane and self.lane.is_out), f"{call} while it is lent"
        super()._record(call)

    def adopt_read(self, handle: int, where: Range, into: Payload) -> None:
        self.read(handle, where, into)
        if not self.is_shared:
            self.calls[-1].name = "adopted read"

    def adopt_write(self, handle: int, where: Range, *, is_zero: bool) -> None:
        self._record(Call(self, "adopted zero" if is_zero else "adopted write", handle, where))

    def adopt_flush(self, handle: int) -> None:
        self._record(Call(self, "adopted flush", handle))

    def take_back(self, data: bytes, lost: int | None, reason: str = "") -> None:
        assert self.lane is not None
        self.lane = None
        self.came_back.append((data, lost, reason))

    def lane_reads(self, where: Range) -> None:
        self.announced.append(where)

    def lane_moved(self, where: Range) -> None:
        self.moved.append(where)

    def lane_flushes(self) -> None:
        """Nothing is timed here."""

    def lane_flushed(self) -> None:
        """Nothing is timed here."""

    def refusal(self, error: int) -> RequestError:
        return refusal(error)


class SharedRecorder(LendableRecorder):
    """As a local file is."""

    is_shared = True


class SharedSource(LendableRecorder):
    """A file to read from, and a connection to write to."""

    def __init__(self, name: str, description: EndpointDescription, splices: bool = False) -> None:
        super().__init__(name, description, splices)
        self.is_shared = name.startswith("source")


class LanesBench(Bench):
    """A copier whose lanes are in `lanes`, in the order they were made."""

    def __init__(
        self,
        options: JobOptions,
        pipes: Splicing | None,
        *,
        why: str = "",
        kind: type[Recorder] = LendableRecorder,
        **how: object,
    ) -> None:
        self.lanes: list[ScriptedLane] = []

        def make(_: CopyShape) -> ScriptedLane:
            self.lanes.append(ScriptedLane(why))
            return self.lanes[-1]

        super().__init__(options, splicing=pipes, kind=kind, make_lane=make, **how)  # type: ignore[arg-type]

    @property
    def lane(self) -> ScriptedLane:
        return self.lanes[0]

    def turn(self, seconds: float = 0.0) -> None:
        """The lane has woken the shell, whose turn always ends in a pump."""
        self.copier.lanes.collect()
        self.copier.has_work = True
        self.pump(seconds)

    def end(self, outcome: Outcome | None = None, lane: ScriptedLane | None = None) -> None:
        """A lane is over. What is left of stretches it had begun is in its feed again, as `Lane` has it."""
        lane = lane or self.lane
        lane.outcome = outcome or Outcome()
        self.turn()

    def reply(self, call: Call, error: RequestError | None = None, data: bytes = b"d" * REQUEST) -> None:
        """An adopted request is answered: as `answer`, but it was sent by the lane."""
        listener = call.connection.listener
        assert listener is not None
        assert call.name.startswith("adopted")
        call.connection.open.remove(call)
        if call.name == "adopted read" and error is None:
            listener.arriving(call.handle)
            if call.piped is not None:
                assert self.splicing is not None
                self.splicing.source.fill(call.piped, data)
            elif call.buffer is not None:
                call.buffer[:] = data
        listener.done(call.handle, error, call.where.length if call.where else 0, None)
        self.pump()


@contextlib.contextmanager
def lanes_bench(
    *,
    requests: int = 8,
    sparse_unit: int = 0,
    extents: bool = False,
    is_spliced: bool = True,
    block_minimum: int = 1,
    **how: object,
) -> Iterator[LanesBench]:
    """Requests of REQUEST bytes; all is data, unless there are `extents`."""
    options = JobOptions(
        request_size=REQUEST,
        requests=requests,
        queue_size=requests * REQUEST,
        sparse_unit=sparse_unit,
        extents=extents,
    )
    destination = EndpointDescription("here", 1 << 30, can_zero=True, can_flush=True, block_minimum=block_minimum)
    with splicing(REQUEST) as pipes:
        yield LanesBench(options, pipes if is_spliced else None, destination=destination, **how)  # type: ignore[arg-type]
