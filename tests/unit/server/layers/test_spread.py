"""One request over several chunks, carried out side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from nbdshard.common.limits import CHUNKS_WALKED_MAX, OBJECT_READS_AT_ONCE
from nbdshard.common.ranges import Range
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing
from nbdshard.server.layers.spread import Spread
from support.threads import no_threads

CHUNK = 4096
SIZE = 200 * CHUNK


class Meeting(Passing):
    """Reads wait for one another; writes to chunk 7 fail."""

    def __init__(self) -> None:
        super().__init__(MemoryBackend(SIZE))
        self.together = threading.Barrier(OBJECT_READS_AT_ONCE)
        self.written: list[Range] = []

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        self.together.wait(30)
        return super().read(where)

    def write(self, where: Range, data: memoryview) -> None:
        if where.start // CHUNK == 7:
            raise OSError(5, "the seventh")
        super().write(where, data)
        self.written.append(where)


@pytest.fixture
def below() -> Meeting:
    return Meeting()


@pytest.fixture
def spread(below: Meeting) -> Iterator[Spread]:
    found = Spread(below, CHUNK)
    yield found
    found.close()


def test_parts_are_cut_at_chunks_and_come_in_order(spread: Spread, below: Meeting) -> None:
    data = bytes(range(256)) * 64
    spread.write(Range.of(CHUNK - 100, len(data)), memoryview(data))
    assert sorted(where.length for where in below.written) == [100, 4096 - 100, 4096, 4096, 4096]
    below.together = threading.Barrier(1)
    found = spread.read(Range.of(CHUNK - 100, len(data)))
    assert b"".join(bytes(part) for part in found if not isinstance(part, Hole)) == data


def test_so_many_reads_are_under_way_at_once(spread: Spread) -> None:
    assert len(spread.read(Range(0, OBJECT_READS_AT_ONCE * CHUNK))) >= 1  # or they would wait for ever


def test_what_fails_for_one_has_failed_when_the_others_are_over(spread: Spread, below: Meeting) -> None:
    with pytest.raises(OSError, match="the seventh"):
        spread.write(Range(0, SIZE), memoryview(bytes(SIZE)))
    assert len(below.written) == CHUNKS_WALKED_MAX - 1  # those behind were not begun


def test_without_threads_each_part_is_carried_out_once_and_none_later(spread: Spread, below: Meeting) -> None:
    """What the pool has queued and found no thread for must not come behind a later write to the same place."""
    five = Range(0, 5 * CHUNK)
    with no_threads():
        spread.write(five, memoryview(b"1" * five.length))
        assert len(below.written) == 5
        with pytest.raises(OSError, match="the seventh"):
            spread.write(Range(5 * CHUNK, 9 * CHUNK), memoryview(b"1" * (4 * CHUNK)))
        assert len(below.written) == 8
    spread.write(five, memoryview(b"2" * five.length))  # threads again, which find the others in the queue
    assert len(below.written) == 13
    below.together = threading.Barrier(1)
    found = spread.read(Range.of(0, CHUNK))
    assert b"".join(bytes(part) for part in found if not isinstance(part, Hole)) == b"2" * CHUNK


def test_it_says_what_a_whole_chunk_is(spread: Spread) -> None:
    assert spread.block_size == CHUNK
    assert spread.extents(Range(0, SIZE))[-1][0].end == CHUNKS_WALKED_MAX * CHUNK
