"""Block status: from the descriptors of one reply to extents of base:allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from nbdshard.common.nbd.constants import BASE_ALLOCATION, STATE_HOLE, STATE_ZERO
from nbdshard.common.nbd.wire import (
    CONTEXT_ID,
    CONTEXT_ID_EXT,
    DESCRIPTOR,
    DESCRIPTOR_EXT,
    Malformed,
    unpack_block_status,
)
from nbdshard.common.ranges import Range

Extents = list[tuple[Range, int]]  # ranges in order without gaps, each with its state flags

_KNOWN_FLAGS: Final = STATE_HOLE | STATE_ZERO  # "clients MUST ignore unknown flags"


class ExtentCollector:
    """Collects the extents of one BLOCK_STATUS request over the bytes from `start` to `end`."""

    __slots__ = ("_contexts", "_seen", "end", "extents", "start")

    def __init__(self, start: int, end: int, contexts: Mapping[str, int]) -> None:
        self.start = start
        self.end = end
        self.extents: list[tuple[Range, int]] | None = None  # None until base:allocation has been told
        self._contexts = contexts
        self._seen: set[int] = set()

    def add(self, payload: memoryview, *, wide: bool, length: int) -> None:
        """One chunk. `length` is the chunk's own; `payload` may be shorter by whole descriptors.

        Raises Malformed on a context that was not negotiated or comes twice, and on a length of 0.
        """
        context, count, descriptors = unpack_block_status(payload, wide=wide)
        if wide and count not in (0, (length - CONTEXT_ID_EXT.size) // DESCRIPTOR_EXT.size):
            raise Malformed(f"{count} descriptors announced in a chunk of {length} bytes")
        if context not in self._contexts.values():
            raise Malformed(f"block status of metadata context id {context}, which was not negotiated")
        if context in self._seen:
            raise Malformed(f"block status of metadata context id {context} twice")
        self._seen.add(context)
        if self._contexts.get(BASE_ALLOCATION) == context:
            self.extents = merged(self.start, self.end, descriptors)


def merged(start: int, end: int, descriptors: Iterator[tuple[int, int]]) -> list[tuple[Range, int]]:
    """Extents from `start` on, clipped at `end`, neighbours of the same flags as one.

    The last descriptor may reach beyond the request (spec, BLOCK_STATUS). Whole descriptors beyond it are
    left unread: nbdkit adds one when an extent ends exactly where the request does.
    """
    extents: list[tuple[Range, int]] = []
    at = first = start
    flags = -1
    for length, status in descriptors:
        if length == 0:
            raise Malformed("an extent of no length")
        status &= _KNOWN_FLAGS
        if status != flags:
            if at > first:
                extents.append((Range(first, at), flags))
            first, flags = at, status
        at = min(at + length, end)
        if at == end:
            break
    if at > first:
        extents.append((Range(first, at), flags))
    return extents


def narrow_length(descriptors: int) -> int:
    """Payload bytes of a BLOCK_STATUS with so many descriptors."""
    return CONTEXT_ID.size + descriptors * DESCRIPTOR.size


def wide_length(descriptors: int) -> int:
    """Payload bytes of a BLOCK_STATUS_EXT with so many descriptors."""
    return CONTEXT_ID_EXT.size + descriptors * DESCRIPTOR_EXT.size
