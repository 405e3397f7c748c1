"""The commands as a table: command number -> what it needs of the export, and what may answer it.

A command is added by a `CommandEntry` of one's own, from anywhere: `Client(export, peer, handles,
commands={**COMMANDS, mine.command: mine})`, then `client.submit(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import CHUNK_BYTES_MEAN_MIN, CHUNKS_WITHOUT_DATA_MAX
from nbdshard.common.nbd.constants import (
    Command,
    CommandFlag,
    Errno,
    ReplyType,
    TransmissionFlag,
    command_name,
)
from nbdshard.common.nbd.extents import ExtentCollector
from nbdshard.common.nbd.sinks import Sink
from nbdshard.common.nbd.wire import Malformed
from nbdshard.common.ranges import Range, RangeSet

_DF: Final = CommandFlag.DF.value


class Pending:
    """One request from its queueing to its `Done`: what was asked, and what of the answer has come."""

    __slots__ = (
        "begins",
        "chunks",
        "contents",
        "covered",
        "ends",
        "entry",
        "error",
        "extents",
        "finished",
        "flags",
        "handle",
        "length",
        "pieces",
        "shutdown",
        "sink",
        "start",
    )

    def __init__(self, handle: int, entry: CommandEntry, start: int, length: int, flags: int) -> None:
        self.handle = handle
        self.entry = entry
        self.start = start
        self.length = length
        self.flags = flags
        self.sink: Sink | None = None
        self.extents: ExtentCollector | None = None
        self.begins = 0  # position of its first byte in the stream that is sent
        self.ends = 0  # and of the byte after its last
        self.chunks = 0
        self.contents = 0  # chunks with data or a hole
        self.covered = 0  # bytes of a read that are there
        self.pieces: RangeSet | None = None  # which ones, once they did not come in order
        self.error: RequestError | None = None  # the first one of the reply
        self.shutdown = False  # one of its errors was ESHUTDOWN
        self.finished = False  # its last reply has come; `Done` waits for its last byte to be sent

    def count_chunk(self) -> None:
        """Raises Malformed when the reply has had more chunks than its length explains."""
        self.chunks += 1
        if self.chunks > CHUNKS_WITHOUT_DATA_MAX + self.length // CHUNK_BYTES_MEAN_MIN:
            raise Malformed(f"{self.chunks} chunks in a reply of {self.length} bytes")

    def fail(self, error: RequestError) -> None:
        """The request has failed, which its `Done` will tell."""
        if self.error is None:
            self.error = error
        self.shutdown |= error.errno_value == Errno.ESHUTDOWN

    def cover(self, offset: int, length: int) -> int:
        """Content for `length` bytes at `offset` of the export comes; returns the offset within the request.

        Raises Malformed where it is empty, out of bounds, overlaps what came before, or breaks a promised DF.
        """
        start = offset - self.start
        end = start + length
        if length == 0:
            raise Malformed("a chunk with no data")
        if start < 0 or end > self.length:
            raise Malformed(
                f"data for [{offset}, {offset + length}), outside of the request "
                f"[{self.start}, {self.start + self.length})"
            )
        self.contents += 1
        if self.contents > 1 and self.flags & _DF:
            raise Malformed("a second content chunk in a reply that must not be fragmented")
        if self.pieces is None:
            if start == self.covered:  # in order, as nearly always
                self.covered = end
                return start
            self.pieces = RangeSet([Range(0, self.covered)] if self.covered else [])
        if self.pieces.add(Range(start, end)) != length:
            raise Malformed(f"data for [{offset}, {offset + length}), some of which has come before")
        self.covered = self.pieces.total
        return start


class CommandEntry(msgspec.Struct, frozen=True):
    """One entry of the table.

    `needs` must be set in the export's flags; `flags` are the command flags that make sense, each with the
    transmission flag that exposes it; `content` are the chunk types that may answer besides NONE and errors;
    `missing` says what a reply without error lacks ("" if nothing).
    """

    command: int
    needs: TransmissionFlag = TransmissionFlag.HAS_FLAGS
    writes: bool = False  # refused on a read-only export
    ranged: bool = True  # has an offset and a length, which are 0 otherwise
    sends_payload: bool = False
    receives_payload: bool = False  # into a sink
    queries_contexts: bool = False
    flags: Mapping[int, TransmissionFlag] = msgspec.field(default_factory=dict)
    content: frozenset[int] = frozenset()
    missing: Callable[[Pending], str] = lambda _pending: ""

    @property
    def name(self) -> str:
        return command_name(self.command)


CommandTable = Mapping[int, CommandEntry]


def _uncovered(pending: Pending) -> str:
    if pending.covered == pending.length:
        return ""
    return f"success, but only {pending.covered} of {pending.length} bytes came"


def _no_extents(pending: Pending) -> str:
    if pending.extents is not None and pending.extents.extents:
        return ""
    return "success, but no extents of base:allocation came"


_T = TransmissionFlag
_F = CommandFlag

COMMANDS: Final[CommandTable] = MappingProxyType(
    {
        entry.command: entry
        for entry in (
            CommandEntry(
                Command.READ,
                receives_payload=True,
                flags={_F.DF: _T.SEND_DF},
                content=frozenset({ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE}),
                missing=_uncovered,
            ),
            CommandEntry(Command.WRITE, writes=True, sends_payload=True, flags={_F.FUA: _T.SEND_FUA}),
            CommandEntry(Command.FLUSH, needs=_T.SEND_FLUSH, ranged=False),
            CommandEntry(Command.TRIM, needs=_T.SEND_TRIM, writes=True, flags={_F.FUA: _T.SEND_FUA}),
            CommandEntry(Command.CACHE, needs=_T.SEND_CACHE),
            CommandEntry(
                Command.WRITE_ZEROES,
                needs=_T.SEND_WRITE_ZEROES,
                writes=True,
                flags={
                    _F.FUA: _T.SEND_FUA,
                    _F.NO_HOLE: _T.SEND_WRITE_ZEROES,
                    _F.FAST_ZERO: _T.SEND_FAST_ZERO,
                },
            ),
            CommandEntry(
                Command.BLOCK_STATUS,
                queries_contexts=True,
                flags={_F.REQ_ONE: _T.HAS_FLAGS},
                content=frozenset({ReplyType.BLOCK_STATUS, ReplyType.BLOCK_STATUS_EXT}),
                missing=_no_extents,
            ),
        )
    }
)
