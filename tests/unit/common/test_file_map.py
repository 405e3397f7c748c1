"""Data and holes of real files, and how often the kernel is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.file_calls import zero_file
from nbdshard.common.file_map import FileMap
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range
from support.images import KIB

HOLE = STATE_HOLE | STATE_ZERO
BLOCK = 64 * KIB


@pytest.fixture
def number(tmp_path: Path) -> Iterator[int]:
    """A file of eight blocks: two of data, two of hole, and so on."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(8 * BLOCK)
        for start in (0, 4 * BLOCK):
            file.seek(start)
            file.write(b"x" * 2 * BLOCK)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def seeks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where lseek(2) was asked to look from."""
    asked: list[int] = []
    real = os.lseek

    def lseek(number: int, at: int, how: int) -> int:
        asked.append(at)
        return real(number, at, how)

    monkeypatch.setattr(os, "lseek", lseek)
    return asked


def test_data_and_holes_are_found_in_turn(number: int) -> None:
    assert FileMap(number).find(Range(BLOCK, 8 * BLOCK)) == [
        (Range(BLOCK, 2 * BLOCK), 0),
        (Range(2 * BLOCK, 4 * BLOCK), HOLE),
        (Range(4 * BLOCK, 6 * BLOCK), 0),
        (Range(6 * BLOCK, 8 * BLOCK), HOLE),
    ]


def test_within_data_that_was_found_nobody_is_asked_again(number: int, seeks: list[int]) -> None:
    found = FileMap(number)
    assert found.find(Range(0, BLOCK)) == [(Range(0, BLOCK), 0)]
    assert seeks == [0, 0]
    assert found.find(Range(BLOCK, 3 * BLOCK)) == [(Range(BLOCK, 2 * BLOCK), 0), (Range(2 * BLOCK, 3 * BLOCK), HOLE)]
    assert seeks == [0, 0, 2 * BLOCK]


def test_what_was_a_hole_is_asked_about_again(number: int) -> None:
    found = FileMap(number)
    assert found.find(Range(2 * BLOCK, 4 * BLOCK)) == [(Range(2 * BLOCK, 4 * BLOCK), HOLE)]
    os.pwrite(number, b"y" * BLOCK, 2 * BLOCK)
    assert found.find(Range(2 * BLOCK, 4 * BLOCK)) == [
        (Range(2 * BLOCK, 3 * BLOCK), 0),
        (Range(3 * BLOCK, 4 * BLOCK), HOLE),
    ]


def test_data_that_became_a_hole_is_read_as_data(number: int) -> None:
    found = FileMap(number)
    found.find(Range(0, BLOCK))
    zero_file(number, Range(0, 2 * BLOCK), allocated=False)
    assert found.find(Range(0, 2 * BLOCK)) == [(Range(0, 2 * BLOCK), 0)]


def test_past_the_end_of_a_file_that_became_shorter_all_is_data(number: int) -> None:
    found = FileMap(number)
    found.find(Range(4 * BLOCK, 6 * BLOCK))
    os.ftruncate(number, 5 * BLOCK)
    assert found.find(Range(4 * BLOCK, 8 * BLOCK)) == [
        (Range(4 * BLOCK, 5 * BLOCK), 0),
        (Range(5 * BLOCK, 8 * BLOCK), 0),
    ]
    assert found.find(Range(6 * BLOCK, 8 * BLOCK)) == [(Range(6 * BLOCK, 8 * BLOCK), 0)]
