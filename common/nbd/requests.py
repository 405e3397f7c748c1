"""Requests as one export allows them: what the client checks before it queues one, and the header it sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

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
from nbdshard.common.nbd.payload import Elsewhere
from nbdshard.common.nbd.sinks import BufferSink, Sink
from nbdshard.common.ranges import Range

_COMPACT_LENGTH_MAX: Final = (1 << 32) - 1
_PAYLOAD_LEN: Final = CommandFlag.PAYLOAD_LEN.value


class Rule(msgspec.Struct, frozen=True):
    """What one export makes of one command: why it is not to be sent ("" if it may be), and its flags."""

    entry: CommandEntry
    refusal: str
    flags: int  # those that may be set


class RequestRules:
    """The table of commands as `export` allows them, worked out once: enums are slow to calculate with."""

    def __init__(self, export: Export, commands: CommandTable) -> None:
        self._export = export
        self._rules: Mapping[int, Rule] = MappingProxyType(
            {number: _rule(export, entry) for number, entry in commands.items()}
        )
        self.header_bytes = (wire.EXTENDED_REQUEST if export.extended else wire.REQUEST).size

    def check(
        self,
        command: int,
        where: Range | None,
        flags: int,
        payload: Sequence[memoryview | Elsewhere],
        sink: Sink | None,
    ) -> CommandEntry:
        """The table's entry for `command`. Raises BugError where the export does not allow the request."""
        rule = self._rule_for(command)
        entry = rule.entry
        if rule.refusal:
            raise BugError(f"{entry.name} {rule.refusal}")
        if flags & ~rule.flags:
            raise BugError(f"{entry.name} with {CommandFlag(flags & ~rule.flags)!r}, which is not exposed")
        if entry.ranged != (where is not None):
            raise BugError(f"{entry.name} with the range {where}")
        length = 0
        if where is not None:
            length = where.end - where.start
            self._check_range(entry, where)
        payload_length = sum(map(len, payload))
        if payload_length != (length if entry.sends_payload else 0):
            raise BugError(f"{entry.name} of {length} bytes with {payload_length} bytes of payload")
        if entry.receives_payload != (sink is not None):
            raise BugError(f"{entry.name} {'without' if sink is None else 'with'} a place for payload")
        if isinstance(sink, BufferSink) and len(sink) != length:
            raise BugError(f"{entry.name} of {length} bytes into a buffer of {len(sink)}")
        return entry

    def entry(self, command: int) -> CommandEntry:
        """The table's entry for `command`, allowed or not. Raises BugError where there is none."""
        return self._rule_for(command).entry

    def _rule_for(self, command: int) -> Rule:
        rule = self._rules.get(command)
        if rule is None:
            raise BugError(f"{command_name(command)} is not in the table of commands")
        return rule

    def _check_range(self, entry: CommandEntry, where: Range) -> None:
        """ "The client MUST ensure that offset and length are integer multiples of any advertised minimum"."""
        if where.end > self._export.size:
            raise BugError(f"{entry.name} of {where} where the export ends at {self._export.size}")
        sizes = self._export.block_sizes
        if where.start % sizes.minimum or where.end % sizes.minimum:
            raise BugError(f"{entry.name} of {where} where the minimum block size is {sizes.minimum}")
        length = where.end - where.start
        if length > sizes.maximum and (entry.sends_payload or entry.receives_payload):
            raise BugError(f"{entry.name} of {where} where the maximum block size is {sizes.maximum}")
        if length > _COMPACT_LENGTH_MAX and not self._export.extended:
            raise BugError(f"{entry.name} of {where}, too long for a compact request")

    def header(self, entry: CommandEntry, cookie: int, flags: int, offset: int, length: int) -> bytes:
        """The 28 or 32 bytes of the request's header."""
        if not self._export.extended:
            return wire.REQUEST.pack(REQUEST_MAGIC, flags, entry.command, cookie, offset, length)
        if entry.sends_payload:
            flags |= _PAYLOAD_LEN
        return wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, entry.command, cookie, offset, length)


def _rule(export: Export, entry: CommandEntry) -> Rule:
    flags = 0
    for flag, needed in entry.flags.items():
        if needed & export.flags == needed:
            flags |= int(flag)
    return Rule(entry, _refusal(export, entry), flags)


def _refusal(export: Export, entry: CommandEntry) -> str:
    if entry.needs & export.flags != entry.needs:
        return f"where the export does not set NBD_FLAG_{entry.needs.name}"
    if entry.writes and export.flags & TransmissionFlag.READ_ONLY:
        return "on a read-only export"
    if entry.queries_contexts and BASE_ALLOCATION not in export.contexts:
        return f"where {BASE_ALLOCATION} was not agreed on"
    return ""
