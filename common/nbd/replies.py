"""The kinds of reply chunks as a table: chunk type -> how long it may be, and what it does to the request.

OFFSET_DATA is not here: its payload goes to a sink as it arrives (client.py). The others are read into a small
buffer of the machine's own, and handled when they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import (
    ERROR_CHUNK_BYTES_MAX,
    ERROR_MESSAGE_BYTES_MAX,
    EXTENTS_ON_WIRE_MAX,
    EXTENTS_PER_REPLY_MAX,
)
from nbdshard.common.nbd.commands import Pending
from nbdshard.common.nbd.constants import ReplyType, errno_name, is_error_chunk, reply_type_name
from nbdshard.common.nbd.extents import narrow_length, wide_length
from nbdshard.common.nbd.wire import (
    DESCRIPTOR,
    DESCRIPTOR_EXT,
    ERROR,
    OFFSET_HOLE,
    Malformed,
    unpack_error,
    unpack_hole,
)
from nbdshard.common.nbd.wire_options import printable

Complete = Callable[[Pending, memoryview, int, int], None]  # request, payload as kept, chunk type, length


class ChunkKind(msgspec.Struct, frozen=True):
    """One entry of the table: a payload of `length_min` plus a multiple of `step` bytes, up to `length_max`.

    What is longer than `kept_max` is dropped from there on as it arrives.
    """

    type: int
    complete: Complete
    length_min: int
    length_max: int
    step: int = 1
    kept_max: int = ERROR_CHUNK_BYTES_MAX
    content: bool = False  # only for commands whose table entry names it; other kinds may answer anything
    extended_only: bool = False

    def check_length(self, length: int) -> None:
        """Raises Malformed where no such chunk may have that length."""
        if not self.length_min <= length <= self.length_max or (length - self.length_min) % self.step:
            raise Malformed(f"{reply_type_name(self.type)} of {length} bytes")


def _none(pending: Pending, payload: memoryview, kind: int, length: int) -> None:
    """Nothing but the end of a reply."""
    del pending, payload, kind, length


def _hole(pending: Pending, payload: memoryview, kind: int, length: int) -> None:
    del kind, length
    offset, size = unpack_hole(payload)
    at = pending.cover(offset, size)
    assert pending.sink is not None  # content chunks are allowed for commands with a sink only
    pending.sink.zeroes(at, size)


def _block_status(pending: Pending, payload: memoryview, kind: int, length: int) -> None:
    assert pending.extents is not None  # the command table allows these chunks for BLOCK_STATUS only
    pending.extents.add(payload, wide=kind == ReplyType.BLOCK_STATUS_EXT, length=length)


def _error(pending: Pending, payload: memoryview, kind: int, length: int) -> None:
    """The request fails, when its reply is over: data and further errors may follow."""
    del length
    error = unpack_error(payload, kind)
    if len(error.message) > ERROR_MESSAGE_BYTES_MAX:
        raise Malformed(f"an error message of {len(error.message)} bytes")
    end = pending.start + pending.length
    if error.offset is not None and pending.entry.ranged and not pending.start <= error.offset < end:
        raise Malformed(f"an error at offset {error.offset}, outside of the request [{pending.start}, {end})")
    pending.fail(RequestError(errno_name(error.error), error.error, printable(error.message)))


ANY_ERROR: Final = ChunkKind(ReplyType.ERROR, _error, ERROR.size, ERROR_CHUNK_BYTES_MAX)

CHUNKS: Final[Mapping[int, ChunkKind]] = MappingProxyType(
    {
        kind.type: kind
        for kind in (
            ChunkKind(ReplyType.NONE, _none, 0, 0),
            ChunkKind(ReplyType.OFFSET_HOLE, _hole, OFFSET_HOLE.size, OFFSET_HOLE.size, content=True),
            ChunkKind(
                ReplyType.BLOCK_STATUS,
                _block_status,
                narrow_length(1),
                narrow_length(EXTENTS_ON_WIRE_MAX),
                step=DESCRIPTOR.size,
                kept_max=narrow_length(EXTENTS_PER_REPLY_MAX),
                content=True,
            ),
            ChunkKind(
                ReplyType.BLOCK_STATUS_EXT,
                _block_status,
                wide_length(1),
                wide_length(EXTENTS_ON_WIRE_MAX),
                step=DESCRIPTOR_EXT.size,
                kept_max=wide_length(EXTENTS_PER_REPLY_MAX),
                content=True,
                extended_only=True,
            ),
            ANY_ERROR,
            ChunkKind(ReplyType.ERROR_OFFSET, _error, ERROR.size + 8, ERROR_CHUNK_BYTES_MAX),
        )
    }
)


def chunk_kind(chunks: Mapping[int, ChunkKind], reply_type: int) -> ChunkKind:
    """The entry for `reply_type`; "an unknown type with bit 15 set" is an error like any other (spec)."""
    kind = chunks.get(reply_type)
    if kind is not None:
        return kind
    if is_error_chunk(reply_type):
        return ANY_ERROR
    raise Malformed(f"a chunk of unknown type {reply_type}")
