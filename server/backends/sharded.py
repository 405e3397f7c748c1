"""An image cut into chunks, an object each. A chunk that is not there reads as zeroes, and takes no room.

Writes to one chunk wait for one another: a store may have to write an object whole. Others do not.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from nbdshard.common.limits import CHUNKS_WALKED_MAX, EXTENTS_TOLD_MAX
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import READS, WRITES
from nbdshard.server.backends.chunk_map import ChunkMap
from nbdshard.server.device import Hole
from nbdshard.server.locks import Locks
from nbdshard.server.stores.base import Store
from nbdshard.server.volumes import Volume

_EMPTY: Final = STATE_HOLE | STATE_ZERO
_SAMPLED_BYTES: Final = 4093  # a prime: what is at the same place of every block may well be zero


class ShardedBackend:
    """`volume` in `store`, which nobody else writes to."""

    def __init__(self, store: Store, volume: Volume, *, read_only: bool = False) -> None:
        self.size = volume.size
        self.flags = READS | (TransmissionFlag.READ_ONLY if read_only else WRITES)
        self.block_size = 4096
        self._store = store
        self._key_of = volume.key_of
        self._chunk_bytes = volume.chunk_bytes
        self._locks = Locks()
        self._zeroes = memoryview(bytes(volume.chunk_bytes))
        self._known = _KnownChunks(store, volume)

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
        """In chunks, and what fails for one of them has failed for all."""
        at = 0
        for chunk, part in self._chunks(where):
            piece = data[at : at + part.length]
            at += part.length
            is_zero = self._is_zero(piece)
            with self._locks.of(chunk):
                if is_zero:
                    self._clear(chunk, part, fast=False)
                    continue
                self._known.came(chunk)
                self._store.write(self._key_of(chunk), part, piece)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        """A chunk of nothing but zeroes is deleted, unless its room is to be kept: then they are written."""
        if may_punch:
            for some in parts_first(where, self._chunk_bytes) if fast else (where,):
                for chunk, part in self._present(some):
                    with self._locks.of(chunk):
                        self._clear(chunk, part, fast=fast)
            return
        if fast:
            raise OSError(errno.ENOTSUP, "zeroes that take room are written here")
        for chunk, part in self._chunks(where):
            with self._locks.of(chunk):
                self._known.came(chunk)
                self._store.write(self._key_of(chunk), part, self._zeroes[: part.length])

    def _clear(self, chunk: int, part: Range, *, fast: bool) -> None:
        """Nobody else changes the chunk meanwhile."""
        key = self._key_of(chunk)
        is_whole = part.start == 0 and part.end == self._length(chunk)
        if is_whole or not self._store.zero(key, part, fast=fast):
            self._store.delete(key)
            self._known.went(chunk)

    def trim(self, where: Range) -> None:
        self.zero(where, may_punch=True, fast=False)

    def cache(self, where: Range) -> None:
        return None

    def flush(self) -> None:
        self._store.sync()

    def extents(self, where: Range) -> Extents:
        """As far as EXTENTS_TOLD_MAX go, or so many chunks."""
        found: Extents = []
        at = where.start
        for looked_at, (chunk, part) in enumerate(self._present(where)):
            if max(looked_at, len(found)) >= EXTENTS_TOLD_MAX:
                return found
            base = chunk * self._chunk_bytes
            if at < base + part.start:
                _append(found, Range(at, base + part.start), _EMPTY)
            at = base + part.start
            for piece, flags in self._store.extents(self._key_of(chunk), part) or ():
                at = base + piece.end
                _append(found, Range(base + piece.start, at), flags)
            if at < base + part.end:
                _append(found, Range(at, base + part.end), _EMPTY)
                at = base + part.end
        if at < where.end:
            _append(found, Range(at, where.end), _EMPTY)
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

    def _present(self, where: Range) -> Iterator[tuple[int, Range]]:
        """Those of `_chunks` that may be there: few chunks are looked for, of many there is a list."""
        size = self._chunk_bytes
        first, end = where.start // size, -(-where.end // size)
        if end - first <= CHUNKS_WALKED_MAX or not self._store.can_list:
            yield from self._chunks(where)
            return
        for chunk in self._known.within(first, end):
            base = chunk * size
            yield chunk, Range(max(where.start - base, 0), min(where.end - base, size))

    def _is_zero(self, data: memoryview) -> bool:
        """Whether there are only zeroes; what has others somewhere is nearly always found out by a few bytes."""
        if data[0] or data[-1] or any(data[::_SAMPLED_BYTES]):
            return False
        return bytes(data) == bytes(len(data))  # a memcmp, which comparing memoryviews is not


def parts_first(where: Range, chunk_bytes: int) -> list[Range]:
    """The parts of chunks, of which a store may refuse to make zeroes fast, and then the whole ones, which it deletes:
    a request that is refused has changed nothing.
    """
    return sorted(where.parts(chunk_bytes), key=lambda some: some.length >= chunk_bytes)


def _append(found: Extents, where: Range, flags: int) -> None:
    if found and found[-1][1] == flags and found[-1][0].end == where.start:
        found[-1] = (Range(found[-1][0].start, where.end), flags)
    else:
        found.append((where, flags))


class _KnownChunks:
    """Which chunks are there, listed when that is first asked, and kept up to date from then on."""

    def __init__(self, store: Store, volume: Volume) -> None:
        self._store = store
        self._number_of = volume.number_of
        self._listing = threading.Lock()
        self._lock = threading.Lock()
        self._map: ChunkMap | None = None
        self._changed: dict[int, bool] | None = None  # while they are listed: what came and went meanwhile

    def came(self, chunk: int) -> None:
        """To be called before it is written, or while nobody else changes it."""
        self._note(chunk, True)

    def went(self, chunk: int) -> None:
        self._note(chunk, False)

    def within(self, first: int, end: int) -> Iterator[int]:
        """Those from `first` on and below `end`, in order. Raises OSError."""
        self._list()
        while True:
            with self._lock:
                assert self._map is not None
                found = self._map.next(first, end)
            if found is None:
                return
            yield found
            first = found + 1

    def _note(self, chunk: int, is_there: bool) -> None:
        with self._lock:
            if self._changed is not None:
                self._changed[chunk] = is_there
            elif self._map is not None:
                _set(self._map, chunk, is_there)

    def _list(self) -> None:
        with self._listing:
            if self._map is not None:
                return
            with self._lock:
                self._changed = {}
            found = ChunkMap()
            try:
                for key in self._store.keys():  # noqa: SIM118  (no mapping)
                    if (number := self._number_of(key)) is not None:
                        found.add(number)
            except BaseException:
                with self._lock:
                    self._changed = None
                raise
            with self._lock:
                for chunk, is_there in self._changed.items():
                    _set(found, chunk, is_there)
                self._map, self._changed = found, None


def _set(chunks: ChunkMap, number: int, is_there: bool) -> None:
    (chunks.add if is_there else chunks.discard)(number)
