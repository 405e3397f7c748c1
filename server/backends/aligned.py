"""A backend that takes nothing but whole blocks, as one that takes any bytes: the rest of a block is written too.

For what another server asks for. While a part of a block is changed nobody else changes it, or it would be taken back:
changes of one region wait for one another.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from nbdshard.common.limits import ALIGNED_REGION_BYTES
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing
from nbdshard.server.locks import Locks


class Aligned(Passing):
    """`below` in blocks of `minimum` bytes, of which its size is a multiple."""

    def __init__(self, below: Backend, minimum: int) -> None:
        super().__init__(below)
        self._minimum = minimum
        self._locks = Locks()
        self._region = max(minimum, ALIGNED_REGION_BYTES)

    @property
    def block_size(self) -> int:
        return max(self.below.block_size, self._minimum)

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        around = self._around(where)
        parts = self.below.read(around)
        if around == where:
            return parts
        return (_joined(parts, around.length)[where.start - around.start :][: where.length],)

    def write(self, where: Range, data: memoryview) -> None:
        with self._changing(where):
            for part in where.parts(self._minimum):
                content = data[part.start - where.start : part.end - where.start]
                if self._around(part) == part:
                    self.below.write(part, content)
                else:
                    self._write_part(part, content)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        if fast and self._around(where) != where:
            raise OSError(errno.ENOTSUP, "a part of a block would be written")
        with self._changing(where):
            for part in where.parts(self._minimum):
                if self._around(part) == part:
                    self.below.zero(part, may_punch=may_punch, fast=fast)
                else:
                    self._write_part(part, bytes(part.length))

    def trim(self, where: Range) -> None:
        """Whole blocks of it."""
        start, end = where.start + -where.start % self._minimum, where.end - where.end % self._minimum
        if start < end:
            with self._changing(Range(start, end)):
                self.below.trim(Range(start, end))

    def cache(self, where: Range) -> None:
        self.below.cache(self._around(where))

    def extents(self, where: Range) -> Extents:
        found = ((piece.intersection(where), flags) for piece, flags in self.below.extents(self._around(where)))
        return [(piece, flags) for piece, flags in found if piece is not None]

    def _around(self, where: Range) -> Range:
        return Range(where.start - where.start % self._minimum, where.end + -where.end % self._minimum)

    def _write_part(self, part: Range, content: memoryview | bytes) -> None:
        around = self._around(part)
        whole = _joined(self.below.read(around), around.length)
        whole[part.start - around.start : part.end - around.start] = content
        self.below.write(around, whole)

    @contextmanager
    def _changing(self, where: Range) -> Iterator[None]:
        """Alone in all regions of `where`; everybody takes them in the same order."""
        with ExitStack() as stack:
            for region in range(where.start // self._region, (where.end - 1) // self._region + 1):
                stack.enter_context(self._locks.of(region))
            yield


def _joined(parts: Sequence[memoryview | bytes | Hole], length: int) -> memoryview:
    found = memoryview(bytearray(length))
    at = 0
    for part in parts:
        if isinstance(part, Hole):
            at += part.length
        else:
            found[at : at + len(part)] = part
            at += len(part)
    return found
