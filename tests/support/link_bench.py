"""NBD links with real pipes on a real ring, turned by the test as the worker's loop turns them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nbdshard.common.errors import NbdshardError, RequestError
from nbdshard.common.limits import MIB
from nbdshard.common.messages import Side
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Ring, open_ring
from nbdshard.worker.deadlines import Timeouts
from nbdshard.worker.link import NbdLink
from nbdshard.worker.piped import PipedPayload, PipePool
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.ports import Extents
from support.waiting import WAIT_SECONDS

HANDLES = 16
TIMEOUTS = Timeouts(connect=4.0, handshake=10.0, request=30.0)
TURN_SECONDS = 0.02
QUIET_TURNS = 3  # in a row, in which nothing happened: nothing is under way any more


@dataclass(slots=True)
class Answer:
    """What the listener heard of one request."""

    sent: int = 0
    arriving: int = 0
    done: int = 0
    error: RequestError | None = None


@dataclass(slots=True)
class End:
    """A link and all it told. Is its `ports.Listener`."""

    link: NbdLink = field(init=False)
    ready: int = 0
    lost: list[NbdshardError] = field(default_factory=list)
    answers: dict[int, Answer] = field(default_factory=dict)
    on_done: Callable[[int], None] | None = None
    extents_found: Extents | None = None

    # -- ports.Listener

    def sent(self, handle: int) -> None:
        self._of(handle).sent += 1

    def arriving(self, handle: int) -> None:
        self._of(handle).arriving += 1

    def done(self, handle: int, error: RequestError | None, count: int, extents: Extents | None) -> None:
        answer = self._of(handle)
        answer.done += 1
        answer.error = error
        self.extents_found = extents
        if self.on_done is not None:
            self.on_done(handle)

    def _of(self, handle: int) -> Answer:
        assert not self.lost, "told of a request after the connection was lost"
        answer = self.answers[handle]
        assert not answer.done, "told of a request that is done"
        return answer

    # -- requests

    def read(self, handle: int, where: Range, into: PipedPayload | memoryview) -> Answer:
        answer = self.answers[handle] = Answer()
        self.link.read(handle, where, into)
        return answer

    def write(self, handle: int, where: Range, payload: PipedPayload | memoryview) -> Answer:
        answer = self.answers[handle] = Answer()
        self.link.write(handle, where, payload)
        return answer

    def zero(self, handle: int, where: Range) -> Answer:
        answer = self.answers[handle] = Answer()
        self.link.zero(handle, where, allocated=False)
        return answer

    def extents(self, handle: int, where: Range) -> Answer:
        answer = self.answers[handle] = Answer()
        self.link.extents(handle, where)
        return answer

    def flush(self, handle: int) -> Answer:
        answer = self.answers[handle] = Answer()
        self.link.flush(handle)
        return answer


class LinkBench:
    """One loop. `activity` counts the waits that ended before their time."""

    handles = HANDLES  # of each link

    def __init__(self, ring: Ring, plumbing: SystemPlumbing, pipe_size: int) -> None:
        self.ring = ring
        self.plumbing = plumbing
        self.pool = PipePool(plumbing, pipe_size)
        self.pool.grow(self.handles)
        self.ends: list[End] = []
        self.activity = 0
        self.now = 0.0  # the links' clock stands still unless a test moves it

    def open(self, uri: str, side: Side, *, splice: bool = True) -> End:
        """A link that is ready."""
        end = End()

        def is_ready(_: NbdLink) -> None:
            end.ready += 1

        def is_lost(_: NbdLink, error: NbdshardError) -> None:
            end.lost.append(error)
            self.lost_one()

        plumbing = self.plumbing if splice else None
        end.link = NbdLink(self.ring, parse_uri(uri), side, TIMEOUTS, is_ready, is_lost, plumbing=plumbing)
        end.link.listener = end
        self.ends.append(end)
        end.link.start(self.now, self.handles)
        self.until("the link to be ready", lambda: end.ready or end.lost)
        assert not end.lost, end.lost
        return end

    def lost_one(self) -> None:
        """A link has told of its loss."""

    def room(self, length: int) -> PipedPayload:
        """A pipe for `length` bytes."""
        payload = self.pool.take(length)
        assert payload is not None, self.pool.limited
        return payload

    def turn(self, seconds: float = TURN_SECONDS) -> bool:
        """One turn of the loop; whether anything happened."""
        for end in self.ends:
            end.link.pump(self.now)
        has_work = any(end.link.has_work for end in self.ends)
        completions = self.ring.wait(0.0 if has_work else seconds)
        for operation in completions:
            if operation.owner is not None:
                operation.owner(operation)
        happened = has_work or bool(completions)
        self.activity += happened
        return happened

    def until(self, what: str, condition: Callable[[], object]) -> None:
        """Turn until `condition` holds. Raises TimeoutError naming `what`."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {WAIT_SECONDS:g} s in vain for {what}; lost: {[e.lost for e in self.ends]}")
            self.turn()

    def settle(self) -> None:
        """Turn until nothing happens any more."""
        quiet = 0
        deadline = time.monotonic() + WAIT_SECONDS
        while quiet < QUIET_TURNS:
            assert time.monotonic() < deadline, "something happens without end"
            quiet = 0 if self.turn() else quiet + 1

    def stays_quiet(self, seconds: float = 0.3) -> None:
        """Nothing happens for a while, once all that is under way has come: the loop sleeps, and does not spin."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._is_quiet(seconds):
            assert time.monotonic() < deadline, "the loop does not sleep"

    def _is_quiet(self, seconds: float) -> bool:
        before, end = self.activity, time.monotonic() + seconds
        while self.activity == before and time.monotonic() < end:
            self.turn(0.1)
        return self.activity == before

    def done(self, *answers: Answer) -> None:
        """Turn until `answers` are complete, each told once and in order."""
        self.until("the answers", lambda: all(answer.done for answer in answers))
        assert [(answer.sent, answer.done) for answer in answers] == [(1, 1)] * len(answers)

    def read_piped(self, source: End, handle: int, where: Range) -> PipedPayload:
        """The payload of `where`, in a pipe as far as possible."""
        payload = self.room(where.length)
        answer = source.read(handle, where, payload)
        self.done(answer)
        assert answer.error is None, answer.error
        return payload

    def bytes_of(self, payload: PipedPayload) -> bytes:
        """A copy of what `payload` has; it may still be sent."""
        buffer = bytearray(payload.length)
        assert payload.look(memoryview(buffer))
        return bytes(buffer)

    def leave(self) -> None:
        """Disconnect every link softly; all of them close."""
        for end in self.ends:
            end.link.disconnect()
        self.until("the links to be closed", lambda: all(end.link.closed for end in self.ends))

    def close(self) -> None:
        for end in self.ends:
            end.link.close()
        self.until("the links to be closed", lambda: all(end.link.closed for end in self.ends))


@contextlib.contextmanager
def link_bench(ring: str, *, plumbing: SystemPlumbing | None = None, pipe_size: int = MIB) -> Iterator[LinkBench]:
    """Nothing is left open when the block ends, however it ends."""
    loop, _ = open_ring(ring)
    try:
        bench = LinkBench(loop, plumbing or SystemPlumbing(), pipe_size)
        try:
            yield bench
            bench.close()
        finally:
            bench.pool.close()
    finally:
        loop.close()
