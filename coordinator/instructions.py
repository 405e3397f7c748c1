"""What the scheduler tells its shell to do. The shell decides nothing: it carries these out in order."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from nbdshard.common.messages import FromCoordinator, LeafRun
from nbdshard.common.ranges import Range
from nbdshard.coordinator.job import Outcome


class Send(msgspec.Struct, frozen=True):
    """Queue `message` to `worker`. One that cannot be routed any more is dropped: silence will tell."""

    worker: str
    message: FromCoordinator


class Start(msgspec.Struct, frozen=True):
    """Start `count` local worker processes. Each answers with a `Hello`, or with `worker_gone`/`worker_unstartable`."""

    count: int


class Kill(msgspec.Struct, frozen=True):
    """Kill the local process of `worker` (SIGKILL by its pidfd) and reap it; answered by `worker_gone`."""

    worker: str


class Prepare(msgspec.Struct, frozen=True):
    """Create the destination or set its size, in bytes (0 when the source is a stream); answered by `prepared`."""

    size: int


class Forget(msgspec.Struct, frozen=True):
    """The scheduler knows `worker` no more: its routing can be dropped."""

    worker: str


class Journal(msgspec.Struct, frozen=True):
    """Record what a later run need not copy again, before any instruction that comes after this one is carried out.

    `durable`: acknowledged by a flush on the connections that wrote it, and no flush sent before is without an answer.
    `demoted`: a flush had covered it, and an earlier one then failed or was lost, so it is copied again. It never was
    in `durable` before; taking it out is a second lock. `unreadable`: zeroes are there for what the source could not
    read. All are merged and in order.
    `leaves`: the digests of what is durable, in a job with a checksum; those of zeroes are left out.
    """

    durable: tuple[Range, ...] = ()
    unreadable: tuple[Range, ...] = ()
    demoted: tuple[Range, ...] = ()
    leaves: tuple[LeafRun, ...] = ()


class Finish(msgspec.Struct, frozen=True):
    """The job is over; comes exactly once and last. Processes that never said `Hello` may still have to be killed."""

    outcome: Outcome


Instruction: TypeAlias = Send | Start | Kill | Prepare | Forget | Journal | Finish
