"""server/backends/aligned.py"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.aligned import Aligned
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.device import Hole
from support.backends import content_of

BLOCK = 512
SIZE = 16 * BLOCK
ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda at: Range(at[0], min(sum(at), SIZE)))


class Blocks(MemoryBackend):
    """Takes whole blocks only."""

    @staticmethod
    def whole(where: Range) -> Range:
        assert where.start % BLOCK == where.end % BLOCK == 0, where
        return where

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        return super().read(self.whole(where))

    def write(self, where: Range, data: memoryview) -> None:
        super().write(self.whole(where), data)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        super().zero(self.whole(where), may_punch=may_punch, fast=fast)

    def trim(self, where: Range) -> None:
        super().trim(self.whole(where))

    def cache(self, where: Range) -> None:
        super().cache(self.whole(where))

    def extents(self, where: Range) -> Extents:
        return super().extents(self.whole(where))


@given(st.lists(st.tuples(st.sampled_from(["write", "zero", "trim"]), ranges, st.integers(1, 255)), max_size=8), ranges)
def test_any_bytes_can_be_changed_and_asked_for(changes: list[tuple[str, Range, int]], asked: Range) -> None:
    backend, expected = Aligned(Blocks(SIZE), BLOCK), bytearray(SIZE)
    for kind, where, fill in changes:
        there = slice(where.start, where.end)
        if kind == "write":
            expected[there] = bytes([fill]) * where.length
            backend.write(where, memoryview(expected)[there])
        elif kind == "zero":
            expected[there] = bytes(where.length)
            backend.zero(where, may_punch=True, fast=False)
        else:
            backend.trim(where)
            expected[there] = content_of(backend, where)
    assert content_of(backend, Range(0, SIZE)) == expected
    assert content_of(backend, asked) == expected[asked.start : asked.end]
    backend.cache(asked)
    extents = backend.extents(asked)
    assert extents[0][0].start == asked.start and all(piece in asked for piece, _ in extents)


def test_a_part_of_a_block_is_not_zeroed_fast() -> None:
    with pytest.raises(OSError) as caught:
        Aligned(Blocks(SIZE), BLOCK).zero(Range(1, BLOCK), may_punch=True, fast=True)
    assert caught.value.errno == errno.ENOTSUP


def test_a_block_that_is_written_meanwhile_is_not_taken_back() -> None:
    class Slow(Blocks):
        begun, may_go = threading.Event(), threading.Event()

        def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
            found = super().read(where)
            self.begun.set()
            assert self.may_go.wait(30)
            return found

    below = Slow(SIZE)
    backend = Aligned(below, BLOCK)
    with ThreadPoolExecutor(2) as pool:
        part = pool.submit(backend.write, Range(0, 1), memoryview(b"p"))
        assert below.begun.wait(30)
        whole = pool.submit(backend.write, Range(0, BLOCK), memoryview(b"w" * BLOCK))
        below.may_go.set()
        part.result(30)
        whole.result(30)
    assert content_of(backend, Range(1, BLOCK)) == b"w" * (BLOCK - 1)
