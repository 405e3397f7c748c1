"""What the copier sees of lanes: connections that can be lent, and the lane that works on them. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Final, Protocol

from nbdshard.common.errors import RequestError
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ranges import Range
from nbdshard.worker.pipes import Pipe
from nbdshard.worker.ports import Payload
from nbdshard.worker.stretch import Outcome, Stretch

NOTHING: Final = -2  # nothing has come within the time
ENDED: Final = -3  # nothing will come any more: see `error`


class LaneSource(Protocol):
    """Where a lane reads. `error`: an errno, or 0 for the end of the stream, once something has ended it."""

    error: int

    def open(self) -> None:
        """The thread begins to use it."""

    def close(self) -> None:
        """It is done with it."""

    def ask(self, cookie: int, start: int, length: int) -> int:
        """Ask for data: 0, or an errno."""

    def reply(self, starts: Sequence[int], lengths: Sequence[int]) -> int:
        """The cookie of the read whose data comes next; or ODD (quick.py), NOTHING or ENDED."""

    def fill(self, pipe: Pipe, start: int, count: int) -> int:
        """Move up to `count` bytes of that data, which begin at `start`, into the pipe; as os.splice, or -errno."""

    def receive(self, view: memoryview, start: int) -> int:
        """The same into memory."""

    def unread(self) -> bytes:
        """What was received of an odd reply."""


class LaneTarget(Protocol):
    """Where a lane writes. `gathers`: it takes several requests, of WRITE_ZEROES also, by `message` and `gather`."""

    error: int
    gathers: bool

    def open(self) -> None:
        """The thread begins to use it."""

    def close(self) -> None:
        """It is done with it."""

    def begin(self, cookie: int, start: int, length: int, payload: memoryview | None) -> int:
        """Begin a write: bytes of `payload` that went along, or -errno and nothing was sent. Then the rest follows."""

    def drain(self, pipe: Pipe, count: int) -> int:
        """Move up to `count` bytes of payload out of the pipe: bytes, or -errno (-EAGAIN: see `wait_for_room`)."""

    def send(self, view: memoryview) -> int:
        """The same out of memory."""

    def message(self, cookie: int, start: int, length: int, *, is_zero: bool) -> bytes:
        """The header of a WRITE, whose payload follows, or a WRITE_ZEROES."""

    def gather(self, pieces: Sequence[bytes | memoryview]) -> int:
        """Send `pieces`, one behind the other: bytes taken, or -errno."""

    def wait_for_room(self) -> None:
        """Until more may be sent, or for LANE_LOOK_SECONDS."""

    def flush(self, cookie: int) -> int:
        """Ask for a flush: 0, or -errno."""

    def wait_for_acks(self) -> None:
        """Until an answer may have come, or for LANE_LOOK_SECONDS."""

    def acks(self, starts: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Cookies that were answered by success; the last may be ODD or ENDED instead."""

    def unread(self) -> bytes:
        """What was received from an odd answer on."""


class LanePort(Protocol):
    """The copier's side of a lane (lane.Lane, which says what each means)."""

    flush_cookie: int
    feed: deque[Stretch]
    finished: deque[Stretch]
    feed_low: int
    is_out: bool
    wants_flush: bool
    flushed: bool
    copied: int
    remarks: deque[str]

    def prepare(self) -> str: ...
    def begin(self, source: LaneSource, target: LaneTarget) -> None: ...
    def stop(self) -> None: ...
    def look(self) -> None: ...
    def take_outcome(self) -> Outcome | None: ...
    def oldest_read(self) -> tuple[float, int]: ...
    def oldest_write(self) -> tuple[float, int]: ...
    @property
    def flush_sent(self) -> float: ...
    def stretches_written(self) -> list[Stretch]: ...
    def close(self) -> None: ...


class LaneAge:
    """For how long a lane's oldest request has been seen unanswered: by the clock of who looks, not of the lane.

    The first stands still while the process is stopped, the second does not.
    """

    __slots__ = ("_seen_at", "_since")

    def __init__(self) -> None:
        self._since = inf
        self._seen_at = 0.0

    def seconds(self, since: float, now: float) -> float:
        """`since`: when the lane sent it, inf if there is none."""
        if since != self._since:
            self._since, self._seen_at = since, now
        return 0.0 if since == inf else now - self._seen_at


class Lendable(ABC):
    """A connection that a lane can work on. `is_shared`: it takes requests all the same while it is lent."""

    description: EndpointDescription
    is_shared: bool = False

    @abstractmethod
    def lend_source(self, lane: LanePort, request_bytes: int) -> LaneSource | None:
        """The end that `lane` reads from until `take_back`; None while that may not be.

        A connection that is not shared moves nothing while it is lent. One that is to be closed or left is shut down
        or left when it is back, and the lane told to stop.
        """

    @abstractmethod
    def lend_target(self, lane: LanePort) -> LaneTarget | None:
        """The same to write to."""

    @abstractmethod
    def adopt_read(self, handle: int, where: Range, into: Payload) -> None:
        """A READ of the lane's is unanswered: as if it had been asked here."""

    @abstractmethod
    def adopt_write(self, handle: int, where: Range, *, is_zero: bool) -> None:
        """The same of a WRITE, whose payload has left, or of a WRITE_ZEROES."""

    @abstractmethod
    def adopt_flush(self, handle: int) -> None:
        """The same of a FLUSH."""

    @abstractmethod
    def take_back(self, data: bytes, lost: int | None, reason: str = "") -> None:
        """The lane is done, and what it left unanswered was adopted.

        `data` has come and was not understood. `lost`: the connection is of no use any more, an errno or 0 for its end;
        `reason` in the place of what an errno says. May have the listener hear of answers, and of the loss.
        """

    @abstractmethod
    def lane_reads(self, where: Range) -> None:
        """A lane will read `where` of a source."""

    @abstractmethod
    def lane_moved(self, where: Range) -> None:
        """A lane has read, or written, `where`."""

    @abstractmethod
    def lane_flushes(self) -> None:
        """The lane is asked to flush what it has moved."""

    @abstractmethod
    def lane_flushed(self) -> None:
        """It has."""

    @abstractmethod
    def refusal(self, error: int) -> RequestError:
        """A failed request, as a local end reports an errno."""
