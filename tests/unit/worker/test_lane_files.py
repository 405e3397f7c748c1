"""A lane between local files, and between a file and a connection: what is copied, and what ends a loan there."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from errno import ENOSPC
from pathlib import Path

import pytest

from nbdshard.worker.lane_ends import FileSource, FileTarget
from nbdshard.worker.stretch import Outcome
from support.images import KIB, MIB, empty_image, random_bytes
from support.journals import small_disk
from support.lane_bench import EXPIRES, UNIT, lane_bench, ranges

SECTOR = 4 * KIB
CONTENT = random_bytes(3 * UNIT) + bytes(2 * SECTOR) + random_bytes(4 * UNIT - 2 * SECTOR) + random_bytes(777)
SIZE = len(CONTENT)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    number = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)


@pytest.fixture
def source_number(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    with opened(path, os.O_RDONLY) as number:
        yield number


@pytest.mark.parametrize("sparse_unit", [0, SECTOR])
@pytest.mark.parametrize("start", [0, SECTOR, 5000])
def test_a_file_is_copied_to_a_file(tmp_path: Path, source_number: int, sparse_unit: int, start: int) -> None:
    copied = tmp_path / "copy"
    empty_image(copied, SIZE)
    with lane_bench(sparse_unit=sparse_unit) as bench, opened(copied, os.O_RDWR) as number:
        bench.begin((start, 4 * UNIT), (4 * UNIT, SIZE), source=FileSource(source_number), target=FileTarget(number))
        assert bench.end() == Outcome()
        assert [stretch.left for stretch in bench.stretches] == [0, 0]
        zeroes = [each for stretch in bench.stretches for each in stretch.zeroes]
        assert zeroes == ([(3 * UNIT, 3 * UNIT + 2 * SECTOR)] if sparse_unit else [])
    assert copied.read_bytes() == bytes(start) + CONTENT[start:]


def test_a_file_is_copied_to_a_connection(source_number: int) -> None:
    with lane_bench() as bench:
        bench.serve_writes()
        bench.begin((0, SIZE), source=FileSource(source_number))
        assert bench.end() == Outcome()
        assert bench.store(SIZE) == CONTENT


def test_a_connection_is_copied_to_a_file(tmp_path: Path) -> None:
    copied = empty_image(tmp_path / "copy", SIZE)
    with lane_bench() as bench, opened(copied, os.O_RDWR) as number:
        bench.serve_reads(CONTENT)
        bench.begin((0, SIZE), target=FileTarget(number))
        assert bench.end() == Outcome()
    assert copied.read_bytes() == CONTENT


@pytest.mark.parametrize("sparse_unit", [0, SECTOR])
@pytest.mark.parametrize("length", [2 * UNIT, 2 * UNIT + 100])
def test_a_file_that_became_shorter_is_handed_back_from_the_request_that_saw_it(
    tmp_path: Path, source_number: int, sparse_unit: int, length: int
) -> None:
    copied = empty_image(tmp_path / "copy", SIZE)
    os.truncate(tmp_path / "source", length)
    with lane_bench(sparse_unit=sparse_unit) as bench, opened(copied, os.O_RDWR) as number:
        bench.begin((0, SIZE), source=FileSource(source_number), target=FileTarget(number))
        outcome = bench.end()
        assert (outcome.lost, outcome.error, outcome.failed_write) == ("source", 0, None)
        assert ranges(outcome.reads)[0] == (2 * UNIT, 3 * UNIT)
        assert sum(each.where.length for each in outcome.writes) + bench.stretches[0].copied == 2 * UNIT
    assert copied.read_bytes()[: 2 * UNIT] == CONTENT[: 2 * UNIT]
    assert copied.read_bytes()[2 * UNIT :] == bytes(SIZE - 2 * UNIT)


def test_a_write_that_finds_no_space_is_named_with_its_error(tmp_path: Path, source_number: int) -> None:
    with lane_bench() as bench, small_disk(tmp_path / "small") as folder:  # of 256 KiB
        with opened(empty_image(folder / "copy", SIZE), os.O_RDWR) as number:
            bench.begin((0, SIZE), source=FileSource(source_number), target=FileTarget(number))
            outcome = bench.end()
            assert (outcome.lost, outcome.error) == ("destination", ENOSPC)
            failed = [each for each in outcome.writes if each.cookie == outcome.failed_write]
            assert len(failed) == 1
            assert outcome.unwritten == []
            end = failed[0].where.start
            assert end >= UNIT
        assert (folder / "copy").read_bytes()[:end] == CONTENT[:end]


def test_a_write_from_memory_that_finds_no_space_is_named_with_its_error() -> None:
    content = b"a" * SECTOR + bytes(SECTOR) + b"b" * (MIB - 2 * SECTOR)
    with lane_bench(unit=MIB, sparse_unit=SECTOR) as bench, opened(Path("/dev/full"), os.O_RDWR) as number:
        bench.serve_reads(content)
        bench.begin((0, MIB), target=FileTarget(number))
        outcome = bench.end()
        assert (outcome.lost, outcome.error) == ("destination", ENOSPC)
        assert ranges(outcome.writes) == [(0, SECTOR)]
        assert [(where.start, where.end) for _, where in outcome.unwritten] == [(SECTOR, MIB)]


def test_a_file_is_not_written_under_a_lease_that_is_over(tmp_path: Path, source_number: int) -> None:
    copied = empty_image(tmp_path / "copy", SIZE)
    with lane_bench() as bench, opened(copied, os.O_RDWR) as number:
        bench.now = EXPIRES
        bench.begin((0, SIZE), source=FileSource(source_number), target=FileTarget(number))
        outcome = bench.end()
        assert [(where.start, where.end) for _, where in outcome.unwritten] == [(0, UNIT)]
        assert not outcome.is_late
        assert outcome.writes == []
    assert copied.read_bytes() == bytes(SIZE)


class Broken(FileSource):
    """A source with a fault of its own."""

    def fill(self, pipe: object, start: int, count: int) -> int:
        raise ZeroDivisionError("a fault")


def test_a_bug_in_the_thread_is_handed_over_to_who_can_tell_of_it(tmp_path: Path, source_number: int) -> None:
    copied = empty_image(tmp_path / "copy", SIZE)
    with lane_bench() as bench, opened(copied, os.O_RDWR) as number:
        bench.begin((0, SIZE), source=Broken(source_number), target=FileTarget(number))
        with pytest.raises(ZeroDivisionError, match="a fault"):
            bench.end()
        assert bench.wakes >= 1


def test_a_write_can_be_seen_before_the_clock_is_looked_at_for_it(tmp_path: Path, source_number: int) -> None:
    """Whoever ends its lease in between closes the connection, or else the write would go by an old look."""
    copied = empty_image(tmp_path / "copy", SIZE)
    with lane_bench() as bench, opened(copied, os.O_RDWR) as number:
        bench.begin((0, UNIT), source=FileSource(source_number), target=FileTarget(number))
        assert bench.end() == Outcome()
        asking, answered, writing, *_ = bench.looks
    assert (asking, answered, writing) == (0, 0, 1)


class Clinging(FileTarget):
    """A target that cannot be let go of."""

    def close(self) -> None:
        raise ZeroDivisionError("another fault")


def test_a_loan_ends_even_if_its_ends_cannot_be_let_go_of(tmp_path: Path, source_number: int) -> None:
    copied = empty_image(tmp_path / "copy", SIZE)
    with lane_bench() as bench, opened(copied, os.O_RDWR) as number:
        bench.begin((0, SIZE), source=FileSource(source_number), target=Clinging(number))
        with pytest.raises(ZeroDivisionError, match="another fault"):
            bench.end()


def test_writes_do_not_look_unanswered_while_nothing_but_zeroes_comes(tmp_path: Path) -> None:
    content = random_bytes(2 * UNIT) + bytes(20 * UNIT)
    (tmp_path / "source").write_bytes(content)
    copied = empty_image(tmp_path / "copy", len(content))
    seen: list[float] = []

    class Watched(FileSource):
        """Tells, before each reply, when the oldest write without an answer was sent."""

        def reply(self, starts: Sequence[int], lengths: Sequence[int]) -> int:
            seen.append(bench.lane.oldest_write()[0])
            bench.now += 1.0
            return super().reply(starts, lengths)

    with (
        lane_bench(sparse_unit=SECTOR) as bench,
        opened(tmp_path / "source", os.O_RDONLY) as one,
        opened(copied, os.O_RDWR) as other,
    ):
        bench.begin((0, len(content)), source=Watched(one), target=FileTarget(other))
        assert bench.end() == Outcome()
    assert len(seen) == 22
    assert set(seen[4:]) == {math.inf}
