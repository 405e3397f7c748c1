"""An export in memory that takes no more of it than is written: for tests, demonstrations and scratch space."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final

from nbdshard.common.limits import EXTENTS_TOLD_MAX
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import READS, WRITES
from nbdshard.server.backends.chunk_map import ChunkMap
from nbdshard.server.device import Hole

_PAGE_BYTES: Final = 1 << 16
_BATCH_PAGES: Final = 4096  # looked at before others have their turn


class MemoryBackend:
    """`size` bytes, all zeroes at first. Nothing is kept when the server ends, so a flush has nothing to do."""

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        self.size = size
        self.flags = READS | WRITES | (TransmissionFlag.READ_ONLY if read_only else TransmissionFlag(0))
        self.block_size = 4096
        self._pages: dict[int, bytearray] = {}
        self._known = ChunkMap()  # the numbers of those pages, in order
        self._lock = threading.Lock()  # for as long as a request takes, or _BATCH_PAGES

    @property
    def losses(self) -> int:
        return 0

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        parts: list[memoryview | bytes | Hole] = []
        with self._lock:
            for page, start, end in _pages(where):
                content = self._pages.get(page)
                parts.append(Hole(end - start) if content is None else bytes(memoryview(content)[start:end]))
        return parts

    def write(self, where: Range, data: memoryview) -> None:
        at = 0
        with self._lock:
            for page, start, end in _pages(where):
                content = self._pages.get(page)
                if content is None:
                    content = self._pages[page] = bytearray(_PAGE_BYTES)
                    self._known.add(page)
                content[start:end] = data[at : at + end - start]
                at += end - start

    def read_now(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        return self.read(where)

    def write_now(self, where: Range, data: memoryview) -> bool:
        self.write(where, data)
        return True

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        """What is not there is zeroes, and has no room to keep: memory is taken by what is written alone."""
        at = where.start
        while at < where.end:
            with self._lock:
                at = self._zero_some(Range(at, where.end), may_punch=may_punch)

    def _zero_some(self, where: Range, *, may_punch: bool) -> int:
        """As many pages as may be dealt with at once: up to where."""
        at, last = where.start, -(-where.end // _PAGE_BYTES)
        for _ in range(_BATCH_PAGES):
            page = self._known.next(at // _PAGE_BYTES, last)
            if page is None:
                return where.end
            start, end = _within(page, where)
            if may_punch and end - start == _PAGE_BYTES:
                del self._pages[page]
                self._known.discard(page)
            else:
                self._pages[page][start:end] = bytes(end - start)
            at = (page + 1) * _PAGE_BYTES
        return at

    def trim(self, where: Range) -> None:
        self.zero(where, may_punch=True, fast=True)

    def cache(self, where: Range) -> None:
        return None

    def flush(self) -> None:
        return None

    def extents(self, where: Range) -> Extents:
        """As far as EXTENTS_TOLD_MAX go, or BATCH_PAGES of data."""
        found: Extents = []
        at, last = where.start, -(-where.end // _PAGE_BYTES)
        with self._lock:
            for _ in range(_BATCH_PAGES):
                is_over = at >= where.end or len(found) >= EXTENTS_TOLD_MAX
                page = None if is_over else self._known.next(at // _PAGE_BYTES, last)
                if page is None:
                    break
                start, end = _within(page, where)
                base = page * _PAGE_BYTES
                if at < base + start:
                    found.append((Range(at, base + start), STATE_HOLE | STATE_ZERO))
                at = base + end
                if found and not found[-1][1] and found[-1][0].end == base + start:
                    found[-1] = (Range(found[-1][0].start, at), 0)
                else:
                    found.append((Range(base + start, at), 0))
            else:
                return found
        if at < where.end and len(found) < EXTENTS_TOLD_MAX:
            found.append((Range(at, where.end), STATE_HOLE | STATE_ZERO))
        return found

    def close(self) -> None:
        self._pages.clear()


def _pages(where: Range) -> Iterator[tuple[int, int, int]]:
    """(number of a page, first byte within it, the byte after the last) for each page that `where` touches."""
    for page in range(where.start // _PAGE_BYTES, -(-where.end // _PAGE_BYTES)):
        yield (page, *_within(page, where))


def _within(page: int, where: Range) -> tuple[int, int]:
    """Which bytes of `page` belong to `where`."""
    first = page * _PAGE_BYTES
    return max(where.start - first, 0), min(where.end - first, _PAGE_BYTES)
