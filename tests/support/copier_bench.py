"""A copier on a bench: connections that only record what is asked of them, and answer when a test says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbdshard.common.errors import RequestError
from nbdshard.common.messages import EndpointDescription, FromWorker, JobOptions, Lease
from nbdshard.common.nbd.payload import Piece
from nbdshard.common.ranges import Range
from nbdshard.worker.copier import Copier
from nbdshard.worker.lanes import MakeLane
from nbdshard.worker.piped import PipedPayload, PipePool
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.ports import Extents, Listener, Payload
from nbdshard.worker.shape import CopyShape
from support.arrival import Arrival, arrival

KIB = 1 << 10
JOB, EPOCH = "job", 1
EIO = RequestError("EIO", 5)
ENOTSUP = RequestError("ENOTSUP", 95)
EINVAL = RequestError("EINVAL", 22)


@dataclass(slots=True, eq=False)
class Call:
    """One request as a connection was asked for it."""

    connection: Recorder
    name: str  # the method's
    handle: int
    where: Range | None = None
    buffer: memoryview | None = None
    piped: PipedPayload | None = None
    allocated: bool | None = None
    left: bytes = b""  # the payload of a spliced write, once it has left

    def __repr__(self) -> str:
        return f"{self.connection.name}.{self.name}({self.handle}, {self.where})"

    @property
    def payload(self) -> bytes:
        """What a write carries; of a spliced one, after it was answered."""
        return self.left if self.buffer is None else bytes(self.buffer)


@dataclass(slots=True, eq=False)
class Recorder:
    """Implements `ports.Connection`: `calls` in the order they came, `open` those not yet answered."""

    name: str
    description: EndpointDescription
    calls: list[Call] = field(default_factory=list)
    open: list[Call] = field(default_factory=list)
    listener: Listener | None = None
    splices: bool = False

    def _record(self, call: Call) -> None:
        assert call.handle not in [other.handle for other in self.open], f"handle {call.handle} is in use"
        self.calls.append(call)
        self.open.append(call)

    def read(self, handle: int, where: Range, into: Payload) -> None:
        assert len(into) == where.length
        self._record(Call(self, "read", handle, where, *_held(into)))

    def write(self, handle: int, where: Range, payload: Payload) -> None:
        assert len(payload) == where.length
        self._record(Call(self, "write", handle, where, *_held(payload)))

    def zero(self, handle: int, where: Range, *, allocated: bool) -> None:
        self._record(Call(self, "zero", handle, where, allocated=allocated))

    def extents(self, handle: int, where: Range) -> None:
        self._record(Call(self, "extents", handle, where))

    def flush(self, handle: int) -> None:
        self._record(Call(self, "flush", handle))

    def made(self, name: str) -> list[Range | None]:
        """The ranges of all calls of `name`, in order."""
        return [call.where for call in self.calls if call.name == name]

    def pending(self, name: str) -> list[Call]:
        """Calls of `name` that are not answered."""
        return [call for call in self.open if call.name == name]


def _held(payload: Payload) -> tuple[memoryview | None, PipedPayload | None]:
    return (payload, None) if isinstance(payload, memoryview) else (None, payload)


OPTIONS = JobOptions(request_size=4 * KIB, requests=4, queue_size=64 * KIB, sparse_unit=0, extents=False)


@dataclass(frozen=True, slots=True)
class Splicing:
    """Real pipes between the recorders: what a read brings comes over `source`, what a write has goes to `target`."""

    pipes: PipePool
    source: Arrival
    target: Arrival


@contextlib.contextmanager
def splicing(size: int, plumbing: SystemPlumbing | None = None) -> Iterator[Splicing]:
    """With pipes of `size` bytes; everything is closed when the block ends."""
    plumbing = plumbing or SystemPlumbing()
    with arrival(plumbing) as source, arrival(plumbing) as target:
        pipes = PipePool(plumbing, size)
        try:
            yield Splicing(pipes, source, target)
        finally:
            pipes.close()


class Bench:
    """One copier with `sources` and `targets` recorders, and a clock that stands still unless it is moved.

    `splicing`: both sides can splice, and this is what through.
    """

    def __init__(
        self,
        options: JobOptions = OPTIONS,
        *,
        sources: int = 1,
        targets: int = 1,
        source: EndpointDescription | None = None,
        destination: EndpointDescription | None = None,
        splicing: Splicing | None = None,
        kind: type[Recorder] = Recorder,
        make_lane: MakeLane | None = None,
    ) -> None:
        source = source or EndpointDescription("there", 1 << 30, can_extents=True, can_multi_conn=True)
        destination = destination or EndpointDescription("here", 1 << 30, can_zero=True, can_flush=True)
        self.now = 100.0
        self.splicing = splicing
        splices = splicing is not None
        self.shape = CopyShape.of(source, destination, options, splice=splices)
        self.copier = Copier(self.shape, JOB, EPOCH, self.now, splicing.pipes if splicing else None, make_lane)
        self.sources = [kind(f"source{index}", source, splices=splices) for index in range(sources)]
        self.targets = [kind(f"target{index}", destination, splices=splices) for index in range(targets)]
        for recorder in self.sources:
            recorder.listener = self.copier.add_source(recorder)
        for recorder in self.targets:
            recorder.listener = self.copier.add_target(recorder, options.requests)

    @property
    def source(self) -> Recorder:
        return self.sources[0]

    @property
    def target(self) -> Recorder:
        return self.targets[0]

    def lease(self, start: int, end: int, *, number: int = 1, seconds: float = 10.0, until_end: bool = False) -> None:
        """Grant a lease and let the copier begin with it."""
        self.copier.grant(Lease(JOB, EPOCH, number, Range(start, end), seconds, until_end), self.now + seconds)
        self.pump()

    def pump(self, seconds: float = 0.0) -> None:
        """Some time passes; then the copier has its turn. It would have asked for it, if anything comes of it."""
        self.now += seconds
        retry = self.copier.deadline()
        is_due = self.copier.has_work or (retry is not None and retry <= self.now)
        before = self._done_so_far()
        self.copier.pump(self.now)
        assert is_due or self._done_so_far() == before, "the copier had something to do, and did not say so"

    def _done_so_far(self) -> tuple[int, int]:
        return len(self.copier.outbox), sum(len(recorder.calls) for recorder in (*self.sources, *self.targets))

    def answer(
        self,
        call: Call,
        error: RequestError | None = None,
        *,
        data: bytes = b"",
        count: int | None = None,
        extents: Extents | None = None,
    ) -> None:
        """The request left, and this is the outcome; then the copier has its turn.

        `data` is what a read brings: all of it, or one byte that fills the buffer; without any it brings b"d".
        A spliced read that fails may have brought something too. What a spliced write carries leaves in any case.
        """
        listener = call.connection.listener
        assert listener is not None
        call.connection.open.remove(call)
        listener.sent(call.handle)
        length = call.where.length if call.where is not None else 0
        if call.name == "read" and error is None and call.buffer is not None and count != 0:
            length = length if count is None else count
            content = data if len(data) > 1 else (data or b"d") * length
            call.buffer[: len(content)] = content
            listener.arriving(call.handle)
        if call.piped is not None and self.splicing is not None:
            self._move(self.splicing, call, call.piped, data if error or len(data) > 1 else (data or b"d") * length)
        listener.done(call.handle, error, length if count is None else count, extents)
        self.pump()

    def _move(self, splicing: Splicing, call: Call, piped: PipedPayload, data: bytes) -> None:
        if call.name == "write":
            call.left = splicing.target.leave(list[Piece](piped.pieces))
        elif data:
            assert call.connection.listener is not None
            call.connection.listener.arriving(call.handle)
            splicing.source.fill(piped, data)

    def answer_all(self, *recorders: Recorder) -> None:
        """Everything asked, and what follows from it, succeeds; reads bring b"d", extents say that all is data."""
        recorders = recorders or (*self.sources, *self.targets)
        for _ in range(10_000):
            call = next((recorder.open[0] for recorder in recorders if recorder.open), None)
            if call is None:
                return
            extents = [(call.where, 0)] if call.name == "extents" and call.where is not None else None
            self.answer(call, extents=extents)
        raise AssertionError("the copier never comes to an end")

    def told(self, kind: type[FromWorker]) -> list[FromWorker]:
        """All messages of one kind that the copier has queued so far."""
        return [message for message in self.copier.outbox if isinstance(message, kind)]


def path_of(call: Call) -> str:
    """Where the payload of a request is."""
    return "pipe" if call.piped is not None else "buffer"
