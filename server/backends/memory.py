"""An export in memory that takes no more of it than is written: for tests, demonstrations and scratch space."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final

from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import READS, WRITES
from nbdshard.server.device import Hole

_PAGE_BYTES: Final = 1 << 16


class MemoryBackend:
    """`size` bytes, all zeroes at first. Nothing is kept when the server ends, so a flush has nothing to do."""

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        self.size = size
        self.flags = READS | WRITES | (TransmissionFlag.READ_ONLY if read_only else TransmissionFlag(0))
        self.block_size = 4096
        self._pages: dict[int, bytearray] = {}
        self._lock = threading.Lock()

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
                content[start:end] = data[at : at + end - start]
                at += end - start

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        with self._lock:
            for page, start, end in _pages(where):
                if end - start == _PAGE_BYTES and may_punch:
                    self._pages.pop(page, None)
                elif page in self._pages:
                    self._pages[page][start:end] = bytes(end - start)
                elif not may_punch:
                    self._pages[page] = bytearray(_PAGE_BYTES)

    def trim(self, where: Range) -> None:
        self.zero(where, may_punch=True, fast=True)

    def cache(self, where: Range) -> None:
        return None

    def flush(self) -> None:
        return None

    def extents(self, where: Range) -> Extents:
        found: Extents = []
        with self._lock:
            for page, start, end in _pages(where):
                flags = 0 if page in self._pages else STATE_HOLE | STATE_ZERO
                at = page * _PAGE_BYTES
                if found and found[-1][1] == flags:
                    found[-1] = (Range(found[-1][0].start, at + end), flags)
                else:
                    found.append((Range(at + start, at + end), flags))
        return found

    def close(self) -> None:
        self._pages.clear()


def _pages(where: Range) -> Iterator[tuple[int, int, int]]:
    """(number of a page, first byte within it, the byte after the last) for each page that `where` touches."""
    for page in range(where.start // _PAGE_BYTES, -(-where.end // _PAGE_BYTES)):
        first = page * _PAGE_BYTES
        yield page, max(where.start - first, 0), min(where.end - first, _PAGE_BYTES)
