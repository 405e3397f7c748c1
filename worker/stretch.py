"""What a lane is given to copy, and what it gives back. Plain data."""

from __future__ import annotations

import msgspec

from nbdshard.common.messages import Side
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork


class Stretch:
    """Data of one lease, side by side, that one lane copies. Written to by its thread, read by the copier's.

    `at`: where it is to be read next. `left`: bytes neither acknowledged nor found to be zeroes. `credited` and
    `is_charged` (it has taken tokens of the rate) are the copier's own.
    """

    __slots__ = (
        "at",
        "copied",
        "credited",
        "end",
        "is_charged",
        "lease",
        "left",
        "spliced",
        "start",
        "zeroed",
        "zeroes",
    )

    def __init__(self, lease: LeaseWork, where: Range) -> None:
        self.lease = lease
        self.start = self.at = where.start
        self.end = where.end
        self.left = where.length
        self.copied = 0  # acknowledged by the destination
        self.spliced = 0  # of them
        self.zeroed = 0  # acknowledged by the destination, and no payload
        self.zeroes: list[tuple[int, int]] = []  # found in what was read, and left to the copier
        self.credited = (0, 0, 0)  # of `copied`, `spliced` and `zeroed`
        self.is_charged = False

    def __str__(self) -> str:
        return f"lease {self.lease.lease}, [{self.start}, {self.end})"


class Unanswered(msgspec.Struct, frozen=True):
    """A request that a lane has sent, and whose answer is still to come."""

    cookie: int
    where: Range
    stretch: Stretch
    is_zero: bool = False  # a WRITE_ZEROES
    spliced: int = 0  # bytes of its payload that never entered user space


class Outcome(msgspec.Struct):
    """How a lane gives its connections back, with nothing half sent or half received on either unless it `lost` one.

    `source_bytes` and `target_bytes` have been received and not been understood: they come first. `error` is an errno;
    0 with `lost` means that the server has closed the connection.
    """

    reads: list[Unanswered] = msgspec.field(default_factory=list)
    writes: list[Unanswered] = msgspec.field(default_factory=list)
    unwritten: list[tuple[Stretch, Range]] = msgspec.field(default_factory=list)  # read, and to be read again
    is_flushing: bool = False
    source_bytes: bytes = b""
    target_bytes: bytes = b""
    lost: Side | None = None
    error: int = 0
    is_late: bool = False  # a lease ended in the middle of a WRITE: nothing more may be sent on its connection
    failed_write: int | None = None  # the cookie of a write to a file that failed with `error`
    bug: BaseException | None = None
