"""What an export makes of each request that comes: taken, or refused with an error. Pure.

The table of commands is the client's (`common/nbd/commands.py`): needs, flags and payload are the same on both sides.
"""

from __future__ import annotations

from typing import Final

import msgspec

from nbdshard.common.limits import BLOCK_BYTES_MAX_DEFAULT
from nbdshard.common.nbd.commands import CommandEntry, CommandTable
from nbdshard.common.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_BYTES_UNLIMITED,
    Command,
    CommandFlag,
    Errno,
    TransmissionFlag,
    as_errno,
    command_name,
)
from nbdshard.common.nbd.export import Export

_PAYLOAD_LEN: Final = CommandFlag.PAYLOAD_LEN.value
_FUA: Final = CommandFlag.FUA.value
_FAST_ZERO: Final = CommandFlag.FAST_ZERO.value


class Request:
    """One request from its header to its answer. `payload`: of a WRITE, or what sends one, once all of it is there."""

    __slots__ = ("answered", "command", "cookie", "flags", "held", "length", "load", "offset", "payload")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload = bytearray()
        self.load = 0  # bytes of its payload, or of its answer's
        self.held = 0  # bytes of memory that the shell took for it: `Device.sent` tells when they are free again
        self.answered = False

    @property
    def fua(self) -> bool:
        """It is to be durable when it is answered."""
        return bool(self.flags & _FUA)

    def __repr__(self) -> str:
        return f"{command_name(self.command)} of {self.length} bytes at {self.offset}, cookie {self.cookie:#x}"


class Refused(msgspec.Struct, frozen=True):
    """The error that answers a request, and a sentence for the client's user."""

    errno: Errno
    sentence: str


class _Rule(msgspec.Struct, frozen=True):
    """What one export makes of one command."""

    entry: CommandEntry
    refusal: Refused | None
    flags: int  # those that may be set


class ServingRules:
    """The table of commands as `export` serves them, worked out once: enums are slow to calculate with."""

    def __init__(self, export: Export, commands: CommandTable) -> None:
        self._size, self._extended = export.size, export.extended
        self._minimum = export.block_sizes.minimum
        self._rules = {number: _rule(export, entry) for number, entry in commands.items()}
        maximum = export.block_sizes.maximum
        self.payload_max = BLOCK_BYTES_MAX_DEFAULT if maximum == BLOCK_BYTES_UNLIMITED else maximum

    def payload_bytes(self, request: Request) -> int:
        """How much payload follows the header of `request`, wanted or not."""
        if self._extended:
            return request.length if request.flags & _PAYLOAD_LEN else 0
        rule = self._rules.get(request.command)
        return request.length if rule is not None and rule.entry.sends_payload else 0

    def answer_bytes(self, request: Request) -> int:
        """How much payload the answer to `request` has, if it is no error."""
        rule = self._rules.get(request.command)
        return request.length if rule is not None and rule.entry.receives_payload else 0

    def error(self, request: Request, errno: int) -> Errno:
        """What is told where `request` has failed with `errno`: a value of the spec that its command may have."""
        error = as_errno(errno)
        if error is Errno.ENOTSUP and not request.flags & _FAST_ZERO:
            return Errno.EINVAL  # "SHOULD NOT return ENOTSUP" but where a WRITE_ZEROES was to be fast, or not at all
        return error

    def refusal(self, request: Request) -> Refused | None:
        """Why `request` is not taken, or None."""
        rule = self._rules.get(request.command)
        if rule is None:
            return Refused(Errno.EINVAL, f"{command_name(request.command)} is not known here")
        if rule.refusal is not None:
            return rule.refusal
        flags, entry = request.flags, rule.entry
        if self._extended:
            if entry.sends_payload != bool(flags & _PAYLOAD_LEN):
                return Refused(Errno.EINVAL, f"{entry.name} and NBD_CMD_FLAG_PAYLOAD_LEN do not fit together")
            flags &= ~_PAYLOAD_LEN
        if flags & ~rule.flags:
            return Refused(Errno.EINVAL, f"{entry.name} with flags {flags & ~rule.flags:#x}")
        return self._misplaced(entry, request) if entry.ranged else _not_zero(entry, request)

    def _misplaced(self, entry: CommandEntry, request: Request) -> Refused | None:
        length, end = request.length, request.offset + request.length
        if length == 0:
            return Refused(Errno.EINVAL, f"{entry.name} of 0 bytes")
        if end > self._size:
            # "SHOULD return ENOSPC if it receives a write request including ... sectors beyond the size of the device"
            outside = Errno.ENOSPC if entry.writes and entry.command != Command.TRIM else Errno.EINVAL
            return Refused(outside, f"{entry.name} up to {end}, and the export ends at {self._size}")
        minimum = self._minimum
        if request.offset % minimum or (length % minimum and end != self._size):
            return Refused(Errno.EINVAL, f"{entry.name} that does not fit blocks of {minimum} bytes")
        if length > self.payload_max and (entry.sends_payload or entry.receives_payload):
            return Refused(Errno.EINVAL, f"{entry.name} of {length} bytes, at most {self.payload_max} are served")
        return None


def _not_zero(entry: CommandEntry, request: Request) -> Refused | None:
    if request.offset or request.length:
        return Refused(Errno.EINVAL, f"{entry.name} with an offset or a length")
    return None


def _rule(export: Export, entry: CommandEntry) -> _Rule:
    flags = 0
    # "the server MUST accept all commands with this bit set", whether or not they write
    if export.flags & TransmissionFlag.SEND_FUA:
        flags |= _FUA
    for flag, needed in entry.flags.items():
        if needed & export.flags == needed:
            flags |= int(flag)
    return _Rule(entry, _refusal(export, entry), flags)


def _refusal(export: Export, entry: CommandEntry) -> Refused | None:
    if entry.writes and export.flags & TransmissionFlag.READ_ONLY:
        return Refused(Errno.EPERM, "the export is read-only")
    if entry.needs & export.flags != entry.needs:
        return Refused(Errno.EINVAL, f"{entry.name}, which this export does not offer")
    if entry.queries_contexts and BASE_ALLOCATION not in export.contexts:
        return Refused(Errno.EINVAL, f"{entry.name}, and no metadata context was agreed on")
    return None
