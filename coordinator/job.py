"""One copy job as the coordinator sees it: what was asked for, how far it is, how it ended. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

import msgspec

from nbdshard.common.limits import (
    BACKOFF_SECONDS_MAX,
    CHECKPOINT_BYTES,
    CHECKPOINT_SECONDS,
    CONNECTIONS_DEFAULT,
    HEARTBEAT_SECONDS,
    LEASE_SECONDS,
    LOCAL_LEASE_SECONDS,
)
from nbdshard.common.messages import Counters, EndpointAddress, EndpointDescription, JobOptions, LeafRun
from nbdshard.common.ranges import Range


class EarlierLeaves(Protocol):
    """The journal of an earlier run."""

    def leaves(self, where: Range) -> Sequence[LeafRun]:
        """The digests of what is durable in `where`, in order; what is left out are zeroes."""


class Pace(msgspec.Struct, frozen=True):
    """How fast the user wants the job to go. It may be changed while the job runs."""

    limit: int | None = None  # bytes read per second, by all workers together; None: as fast as it goes
    is_paused: bool = False  # nothing more is begun


class Job(msgspec.Struct, frozen=True):
    """What was asked for. `connections` is the total per side, shared out among the workers."""

    uuid: str
    epoch: int  # raised at each start of the coordinator: what an earlier one was told does not count
    source: EndpointAddress
    destinations: tuple[EndpointAddress, ...]  # exactly one in this version
    options: JobOptions
    connections: int = CONNECTIONS_DEFAULT
    workers: int = 1  # worker processes wanted
    range_size: int | None = None  # bytes; None: chosen by the planner
    local_workers: bool = True  # workers are processes of ours: started by `Start`, killed by `Kill`
    destination_grows: bool = False  # a regular file or a stream: `Prepare` gives it its size
    machine: str = ""  # the coordinator's own machine id, to compare with `Hello.machine`
    loss_seconds: float = 0.0  # how long a server that was lost is waited for; 0: not at all
    loss_hinted: bool = False  # nobody has asked for it: what the server hints counts
    reconnect_seconds: float = BACKOFF_SECONDS_MAX  # the longest pause before it is tried again
    reconnect_hinted: bool = False
    lease_seconds: float = LEASE_SECONDS
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    expected: tuple[EndpointDescription, EndpointDescription] | None = None  # what an earlier run found
    is_resumed: bool = False  # an earlier run of it ended as it did; its workers may still hold leases
    durable: tuple[Range, ...] = ()  # what the journal of an earlier run has: not copied again
    unreadable: tuple[Range, ...] = ()  # where that run wrote zeroes for what it could not read
    earlier: EarlierLeaves | None = None  # ... and the digests of it, for a checksum
    verify: bool = False  # what was written is read back at the end, and compared with the source
    checkpoint_seconds: float = CHECKPOINT_SECONDS  # what was written is flushed after so long ...
    rate: int | None = None  # bytes read per second, by all workers together; None: no limit
    checkpoint_bytes: int = CHECKPOINT_BYTES  # ... or when it is so much, whichever comes first

    @property
    def granted_seconds(self) -> float:
        """What workers are told. Ours are killed and reaped before their ranges are given away: their leases need no
        end, and an end would come with every Ctrl-Z and fg."""
        return LOCAL_LEASE_SECONDS if self.local_workers else self.lease_seconds


class Verdict(Enum):
    """How a job ended."""

    COMPLETE = auto()  # every byte is at the destination (and durable as far as `Outcome.durable` says)
    DIFFERENT = auto()  # everything was compared, and `Outcome.comparison` says where the two sides differ
    FAILED = auto()  # `Outcome.error` says why
    STOPPED = auto()  # the user asked for it
    PAUSED = auto()  # a server was lost, and did not come back in time; `Outcome.error` names it
    UNFENCED = auto()  # a worker was not heard to close its connections: it may still write to the destination


class Comparison(msgspec.Struct, frozen=True):
    """What a comparison has found, of all bytes or, if the job ended before, of those that `counters` counts.

    `differing` are the bytes of the blocks of DIFFERENCE_BYTES that differ, `differences` the first of those in order,
    neighbours as one; `is_cut`: there are more. `sizes`: of both ends in bytes; None of what was copied and read back.
    """

    counters: Counters
    differing: int
    differences: tuple[Range, ...]
    is_cut: bool
    sizes: tuple[int, int] | None


class Outcome(msgspec.Struct, frozen=True):
    """The end of a job: what the summary line and the exit code are made of."""

    verdict: Verdict
    error: str  # one line; "" when complete
    counters: Counters
    size: int | None  # bytes; None when no worker ever found out
    durable: bool  # False: the server has no FLUSH, or `--no-flush`
    flush_asked: bool
    workers: int  # that took part (opened both sides)
    source_connections: int  # most at one time
    destination_connections: int
    rings: frozenset[str]
    unfenced: tuple[str, ...]  # "host/pid" of workers that were not heard to close their connections
    source_peer: str
    destination_peer: str
    resumed: int = 0  # bytes that an earlier run had made durable; not in `counters`
    unreadable: tuple[Range, ...] = ()  # zeroes are there for what the source could not read, in whichever run
    checksum: str = ""  # of a job that is complete and was to have one, in hexadecimal (common/blkhash.py)
    comparison: Comparison | None = None  # None: nothing was to be compared, or the job did not come to that

    @property
    def done(self) -> int:
        """Bytes that are at the destination, by whichever run."""
        return self.counters.total + self.resumed


class Status(msgspec.Struct, frozen=True):
    """How far a job is, for the progress display.

    `counters` holds completed bytes, those of leases under way too; it falls back when a range has to be copied
    again, which the display hides. `resumed` are those that an earlier run had made durable, and not among them.
    `phase` is "opening", "copying", "paused", "flushing", "verifying", "stopping" or "done". `verified` are the bytes
    of a copy that were read back; None before that begins, and where it is not asked for, which `verifies` tells.
    """

    size: int | None
    counters: Counters
    workers: int  # connected now
    source_connections: int
    destination_connections: int
    phase: str
    waiting_for: str = ""  # why nobody is connected any more: the line of the last loss; "" while somebody is
    waiting_seconds: float = 0.0  # for so long already ...
    waiting_seconds_max: float = 0.0  # ... of so many
    resumed: int = 0
    unreadable_bytes: int = 0  # zeroes are at the destination for them
    verifies: bool = False
    verified: int | None = None
    pace: Pace = Pace()

    @property
    def done(self) -> int:
        """Bytes that are at the destination, by whichever run."""
        return self.counters.total + self.resumed

    @property
    def moved(self) -> int:
        """Bytes that this phase has done in this run: what its rate is made of."""
        return self.counters.total if self.verified is None else self.verified

    @property
    def connections(self) -> int:
        """Connections to that side which has more of them."""
        return max(self.source_connections, self.destination_connections)
