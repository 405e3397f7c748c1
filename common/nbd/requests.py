"""Requests as the export allows them: what the client checks before it queues one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nbdshard.common.errors import BugError
from nbdshard.common.nbd import wire
from nbdshard.common.nbd.commands import CommandEntry, CommandTable
from nbdshard.common.nbd.constants import (
    BASE_ALLOCATION,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    CommandFlag,
    TransmissionFlag,
    command_name,
)
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.sinks import BufferSink, Sink
from nbdshard.common.ranges import Range

_COMPACT_LENGTH_MAX: Final = (1 << 32) - 1


def check_request(
    export: Export,
    commands: CommandTable,
    command: int,
    where: Range | None,
    flags: int,
    payload: Sequence[memoryview | bytes],
    sink: Sink | None,
) -> CommandEntry:
    """The table's entry for `command`. Raises BugError where the export does not allow the request."""
    entry = commands.get(command)
    if entry is None:
        raise BugError(f"{command_name(command)} is not in the table of commands")
    _check_flags(export, entry, flags)
    if entry.ranged != (where is not None):
        raise BugError(f"{entry.name} with {where}")
    if where is not None:
        _check_range(export, entry, where)
    length = where.length if where is not None else 0
    payload_length = sum(map(_byte_length, payload))
    if payload_length != (length if entry.sends_payload else 0):
        raise BugError(f"{entry.name} of {length} bytes with {payload_length} bytes of payload")
    if entry.receives_payload != (sink is not None):
        raise BugError(f"{entry.name} {'without' if sink is None else 'with'} a place for payload")
    if isinstance(sink, BufferSink) and len(sink) != length:
        raise BugError(f"{entry.name} of {length} bytes into a buffer of {len(sink)}")
    if entry.queries_contexts and BASE_ALLOCATION not in export.contexts:
        raise BugError(f"{entry.name} where {BASE_ALLOCATION} was not agreed on")
    return entry


def _check_flags(export: Export, entry: CommandEntry, flags: int) -> None:
    if entry.needs & export.flags != entry.needs:
        raise BugError(f"{entry.name} where the export's flags are {export.flags!r}")
    if entry.writes and export.flags & TransmissionFlag.READ_ONLY:
        raise BugError(f"{entry.name} on a read-only export")
    for flag, needed in entry.flags.items():
        if flags & flag:
            flags &= ~flag
            if needed & export.flags != needed:
                raise BugError(f"{entry.name} with {CommandFlag(flag)!r} where {needed!r} is not set")
    if flags:
        raise BugError(f"{entry.name} with flags {flags:#x}, which it does not have")


def _check_range(export: Export, entry: CommandEntry, where: Range) -> None:
    """ "The client MUST ensure that offset and length are integer multiples of any advertised minimum"."""
    if where.end > export.size:
        raise BugError(f"{entry.name} of {where} where the export ends at {export.size}")
    sizes = export.block_sizes
    if where.start % sizes.minimum or where.end % sizes.minimum:
        raise BugError(f"{entry.name} of {where} where the minimum block size is {sizes.minimum}")
    if (entry.sends_payload or entry.receives_payload) and where.length > sizes.maximum:
        raise BugError(f"{entry.name} of {where} where the maximum block size is {sizes.maximum}")
    if not export.extended and where.length > _COMPACT_LENGTH_MAX:
        raise BugError(f"{entry.name} of {where}, too long for a compact request")


def _byte_length(piece: memoryview | bytes) -> int:
    if isinstance(piece, bytes):
        return len(piece)
    if not piece.c_contiguous:
        raise BugError("payload that is not contiguous")
    return piece.nbytes


def request_header(export: Export, entry: CommandEntry, cookie: int, flags: int, offset: int, length: int) -> bytes:
    """The 28 or 32 bytes of the request's header."""
    if not export.extended:
        return wire.REQUEST.pack(REQUEST_MAGIC, flags, entry.command, cookie, offset, length)
    if entry.sends_payload:
        flags |= CommandFlag.PAYLOAD_LEN
    return wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, entry.command, cookie, offset, length)
