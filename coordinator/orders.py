"""What `nbdshard ctl` and a running coordinator say to one another: one order, one answer, each a JSON object.

Each is one packet of a SOCK_SEQPACKET socket, so there is nothing to frame, and its length is bounded by who receives.
Imported when the first order comes: most jobs hear none.
"""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import ORDER_BYTES_MAX, RATE_BYTES_MIN
from nbdshard.coordinator.job import Pace, Status
from nbdshard.coordinator.progress import Meter

ORDER_VERSION: Final = 1
_TEXT_CHARACTERS_MAX: Final = 1000
_PATH_CHARACTERS_MAX: Final = 4096

Word = Literal["status", "pause", "continue", "rate"]
Limit = Annotated[int, msgspec.Meta(ge=RATE_BYTES_MIN, le=(1 << 63) - 1)]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be done. `bytes_per_second`: of "rate" only; None: no limit."""

    version: int
    order: Word
    bytes_per_second: Limit | None = None


class JobStatus(msgspec.Struct, frozen=True):
    """How a job stands, once the order is carried out. Bytes, seconds; `phase` as in progress as JSON."""

    job: str
    phase: str
    paused: bool
    rate_limit_bytes_per_second: int | None
    bytes_total: int | None
    bytes_done: int
    rate_bytes_per_second: int
    eta_seconds: float | None
    elapsed_seconds: float
    workers: int
    connections: int
    waiting_for: str | None
    journal: str | None = None  # where it is, or will be once there is something to resume


class Answer(msgspec.Struct, frozen=True):
    """`error` is a line for the user, and nothing was done; or `status` is there."""

    version: int = ORDER_VERSION
    error: str = ""
    status: JobStatus | None = None


class _Versioned(msgspec.Struct, frozen=True):
    """What every version of an order has."""

    version: int


def encode(what: Order | Answer) -> bytes:
    """One packet."""
    return msgspec.json.encode(what)


def decode_order(packet: bytes) -> Order:
    """The order in `packet`. Raises UserError with a line for who sent it."""
    if len(packet) > ORDER_BYTES_MAX:
        raise UserError(f"an order has at most {ORDER_BYTES_MAX} bytes")
    try:
        version = msgspec.json.decode(packet, type=_Versioned).version
        if version != ORDER_VERSION:
            raise UserError(f"the running job understands orders of version {ORDER_VERSION}, not {version}")
        return msgspec.json.decode(packet, type=Order)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"not an order: {error}") from None


def decode_answer(packet: bytes) -> Answer:
    """The answer in `packet`. Raises UserError."""
    try:
        return msgspec.json.decode(packet, type=Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the job's answer cannot be understood: {error}") from None


def pace_after(order: Order, pace: Pace) -> Pace:
    """How fast the job is to go when `order` has come."""
    match order.order:
        case "rate":
            return msgspec.structs.replace(pace, limit=order.bytes_per_second)
        case "pause":
            return msgspec.structs.replace(pace, is_paused=True)
        case "continue":
            return msgspec.structs.replace(pace, is_paused=False)
        case "status":
            return pace


def describe(job: str, journal: str, status: Status, meter: Meter, now: float) -> JobStatus:
    """`status` as it is told. `meter` has seen it."""
    left = meter.seconds_left(status.size)
    return JobStatus(
        job=job,
        phase=status.phase,
        paused=status.pace.is_paused,
        rate_limit_bytes_per_second=status.pace.limit,
        bytes_total=status.size,
        bytes_done=meter.done,
        rate_bytes_per_second=round(meter.rate),
        eta_seconds=None if left is None or status.pace.is_paused else round(left, 1),
        elapsed_seconds=round(meter.elapsed(now), 3),
        workers=status.workers,
        connections=status.connections,
        waiting_for=status.waiting_for[:_TEXT_CHARACTERS_MAX] or None,
        journal=os.fsencode(journal).decode("utf-8", "backslashreplace")[:_PATH_CHARACTERS_MAX] or None,
    )
