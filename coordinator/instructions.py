"""What the scheduler tells its shell to do. The shell decides nothing: it carries these out in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from nbdshard.common.messages import FromCoordinator
from nbdshard.common.ranges import Range
from nbdshard.coordinator.job import Outcome


@dataclass(frozen=True, slots=True)
class Send:
    """Queue `message` to `worker`. One that cannot be routed any more is dropped: silence will tell."""

    worker: str
    message: FromCoordinator


@dataclass(frozen=True, slots=True)
class Start:
    """Start `count` local worker processes. Each answers with a `Hello`, or with `worker_gone`/`worker_unstartable`."""

    count: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the local process of `worker` (SIGKILL by its pidfd) and reap it; answered by `worker_gone`."""

    worker: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Create the destination or set its size, in bytes (0 when the source is a stream); answered by `prepared`."""

    size: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The scheduler knows `worker` no more: its routing can be dropped."""

    worker: str


@dataclass(frozen=True, slots=True)
class Journal:
    """Record what a later run need not copy again, before any instruction that comes after this one is carried out.

    `durable`: acknowledged by a flush on the connections that wrote it, and no flush sent before is without an answer.
    `demoted`: a flush had covered it, and an earlier one then failed or was lost, so it is copied again. It never was
    in `durable` before; taking it out is a second lock. Both are merged and in order.
    """

    durable: tuple[Range, ...] = ()
    demoted: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over; comes exactly once and last. Processes that never said `Hello` may still have to be killed."""

    outcome: Outcome


Instruction: TypeAlias = Send | Start | Kill | Prepare | Forget | Journal | Finish
