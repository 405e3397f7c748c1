"""An image cut into chunks, an object each. A chunk that is not there reads as zeroes, and takes no room.

Writes to one chunk wait for one another: a store may have to write an object whole. Others do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.device import Hole
from nbdshard.server.locks import Locks
from nbdshard.server.stores.base import Store

_WRITES: Final = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)
_READS: Final = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN  # one store is behind every connection
)
_EMPTY: Final = STATE_HOLE | STATE_ZERO


class ShardedBackend:
    """`size` bytes in chunks of `chunk_bytes`, whose keys `key_of` gives by their numbers."""

    def __init__(
        self, store: Store, key_of: Callable[[int], str], size: int, chunk_bytes: int, *, read_only: bool = False
    ) -> None:
        self.size = size
        self.flags = _READS | (TransmissionFlag.READ_ONLY if read_only else _WRITES)
        self.block_size = 4096
        self._store = store
        self._key_of = key_of
        self._chunk_bytes = chunk_bytes
        self._locks = Locks()
        self._dirty: set[str] = set()  # what the next flush is to cover
        self._dirty_lock = threading.Lock()
        self._flushing = threading.Lock()

    @property
    def losses(self) -> int:
        return self._store.losses

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        parts: list[memoryview | bytes | Hole] = []
        for chunk, part in self._chunks(where):
            found = self._store.read(self._key_of(chunk), part) or b""
            if found:
                parts.append(found)
            if len(found) < part.length:
                parts.append(Hole(part.length - len(found)))
        return parts

    def write(self, where: Range, data: memoryview) -> None:
        at = 0
        for chunk, part in self._chunks(where):
            with self._changing(chunk) as key:
                self._store.write(key, part, data[at : at + part.length])
            at += part.length

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        """Zeroes are always what is not there: an image in chunks has no room that could be kept for it."""
        for chunk, part in self._chunks(where):
            with self._changing(chunk) as key:
                if part.length == self._length(chunk) or not self._store.zero(key, part):
                    self._store.delete(key)

    def trim(self, where: Range) -> None:
        self.zero(where, may_punch=True, fast=False)

    def cache(self, where: Range) -> None:
        return None

    def flush(self) -> None:
        """What fails is tried again by the next one: a store remembers what is lost for good."""
        with self._flushing:
            with self._dirty_lock:
                covered, self._dirty = self._dirty, set()
            try:
                if covered:
                    self._store.sync(covered)
            except BaseException:
                with self._dirty_lock:
                    self._dirty |= covered
                raise

    def extents(self, where: Range) -> Extents:
        found: Extents = []
        for chunk, part in self._chunks(where):
            base = chunk * self._chunk_bytes
            at = part.start
            for piece, flags in self._store.extents(self._key_of(chunk), part) or ():
                _append(found, Range(base + piece.start, base + piece.end), flags)
                at = piece.end
            if at < part.end:
                _append(found, Range(base + at, base + part.end), _EMPTY)
        return found

    def close(self) -> None:
        self._store.close()

    def _length(self, chunk: int) -> int:
        return min(self._chunk_bytes, self.size - chunk * self._chunk_bytes)

    def _chunks(self, where: Range) -> Iterator[tuple[int, Range]]:
        """(number, range within it) of each chunk that `where` touches."""
        size = self._chunk_bytes
        for chunk in range(where.start // size, -(-where.end // size)):
            base = chunk * size
            yield chunk, Range(max(where.start - base, 0), min(where.end - base, size))

    @contextmanager
    def _changing(self, chunk: int) -> Iterator[str]:
        """The chunk's key, nobody else changing it meanwhile. It is dirty from before the change on."""
        key = self._key_of(chunk)
        with self._locks.of(chunk):
            try:
                yield key
            finally:  # also what failed may have changed something
                with self._dirty_lock:
                    self._dirty.add(key)


def _append(found: Extents, where: Range, flags: int) -> None:
    if found and found[-1][1] == flags and found[-1][0].end == where.start:
        found[-1] = (Range(found[-1][0].start, where.end), flags)
    else:
        found.append((where, flags))
