"""The operation table's rows: operations, the parts they write, and the vectors whose indexes are NBD handles. Pure."""

from __future__ import annotations

from math import inf
from typing import Generic, TypeVar

from nbdshard.common.errors import BugError
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.piped import PipedPayload
from nbdshard.worker.ports import Payload
from nbdshard.worker.states import NEXT, OperationEvent, OperationState, illegal

Entry = TypeVar("Entry")


class Vector(Generic[Entry]):
    """A connection's handle space: index = handle, private to the connection, reused as soon as it is free."""

    __slots__ = ("_entries", "_free")

    def __init__(self, size: int) -> None:
        self._entries: list[Entry | None] = [None] * size
        self._free = list(range(size - 1, -1, -1))  # the lowest index on top: few rows are hot

    def __getitem__(self, handle: int) -> Entry:
        entry = self._entries[handle]
        if entry is None:
            raise BugError(f"handle {handle} is not in use")
        return entry

    @property
    def used(self) -> int:
        return len(self._entries) - len(self._free)

    @property
    def full(self) -> bool:
        return not self._free

    def take(self, entry: Entry) -> int:
        """Put `entry` in the lowest recently freed row; its index is the handle. The caller has looked at `full`."""
        handle = self._free.pop()
        self._entries[handle] = entry
        return handle

    def take_longest_unused(self, entry: Entry) -> int:
        """Put `entry` in the row that was free for the longest time: a reply that is said twice hardly names it."""
        handle = self._free.pop(0)
        self._entries[handle] = entry
        return handle

    def take_at(self, handle: int, entry: Entry) -> None:
        """Put `entry` in the row `handle`. Raises BugError where it is taken."""
        if self._entries[handle] is not None:
            raise BugError(f"handle {handle} is in use")
        self._free.remove(handle)
        self._entries[handle] = entry

    def release(self, handle: int) -> None:
        """Free the row."""
        self._entries[handle] = None
        self._free.append(handle)

    def entries(self) -> list[Entry]:
        """The rows in use, by handle."""
        return [entry for entry in self._entries if entry is not None]


class Operation:
    """One row: bytes on their way from the source to the destination, or a run of zeroes being written.

    Its payload is in `buffer`, or in `piped`, or in neither. `parts_left` counts its write requests not yet
    acknowledged, `parts_unsent` those not yet sent whole.
    """

    __slots__ = (
        "asked",
        "attempts",
        "buffer",
        "handle",
        "is_suspect",
        "lease",
        "parts_left",
        "parts_unsent",
        "piped",
        "source",
        "state",
        "where",
        "writes_lost",
    )

    def __init__(self, lease: LeaseWork, where: Range) -> None:
        self.state = OperationState.EMPTY
        self.lease = lease
        self.where = where
        self.source = -1  # the source connection it reads from; -1: it does not read
        self.handle = -1  # its row there
        self.buffer: bytearray | None = None
        self.piped: PipedPayload | None = None
        self.asked = inf  # when its READ was sent
        self.attempts = 0  # failed reads
        self.is_suspect = False  # part of a read that failed for good
        self.writes_lost = 0  # failed writes whose payload was spliced
        self.parts_left = 0
        self.parts_unsent = 0

    def __str__(self) -> str:
        return f"lease {self.lease.lease}, {self.where}"

    def advance(self, event: OperationEvent) -> None:
        """Follow the table. Raises IllegalEvent, with nothing changed, where it has no entry."""
        following = NEXT[self.state][event]
        if following is None:
            raise illegal(self.state, event, self)
        self.state = following


class Gone:
    """The payload of a WRITE that a lane has sent, `spliced` bytes of it: there is nothing to send it again from."""

    __slots__ = ("spliced",)

    def __init__(self, spliced: int) -> None:
        self.spliced = spliced


class Part:
    """One write request of an operation: data out of its buffer, or zeroes.

    `payload` is what is sent: None asks WRITE_ZEROES instead. `is_zero` says how it is counted. A part that `fills` is
    a run of zeroes of any length to be written as data: it is cut into requests only as they find room.
    """

    __slots__ = ("attempts", "fills", "is_merge", "is_zero", "operation", "payload", "where")

    def __init__(self, operation: Operation, where: Range, payload: Payload | Gone | None, *, is_zero: bool) -> None:
        self.operation = operation
        self.where = where
        self.payload = payload
        self.is_zero = is_zero
        self.fills = False
        self.is_merge = False  # reads the destination's last block instead of writing
        self.attempts = 0
