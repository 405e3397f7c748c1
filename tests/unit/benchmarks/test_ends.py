"""What ends are filled with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ends import SEED_BYTES, fill
from benchmarks.row_run import data_bytes
from benchmarks.rows import FRAGMENT_BYTES, Content

BLOCK = 4096


def zero_blocks(path: Path) -> list[bool]:
    content = path.read_bytes()
    return [not any(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]


def test_random_data_has_no_block_of_zeroes(tmp_path: Path) -> None:
    fill(tmp_path / "disk", 3 << 20, Content.RANDOM)
    assert not any(zero_blocks(tmp_path / "disk"))
    assert (tmp_path / "disk").stat().st_size == 3 << 20


def test_fragments_are_data_and_hole_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    fill(path, 4 * FRAGMENT_BYTES, Content.FRAGMENTS)
    each = FRAGMENT_BYTES // BLOCK
    assert zero_blocks(path) == [False] * each + [True] * each + [False] * each + [True] * each


def test_no_two_fragments_are_alike_however_far_apart(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    size = SEED_BYTES + 4 * FRAGMENT_BYTES
    fill(path, size, Content.FRAGMENTS)
    with path.open("rb") as file:
        heads = set()
        for offset in range(0, size, 2 * FRAGMENT_BYTES):
            file.seek(offset)
            heads.add(file.read(64))
    assert len(heads) == size // (2 * FRAGMENT_BYTES)


@pytest.mark.parametrize("content", Content)
def test_an_odd_size_is_filled_exactly(tmp_path: Path, content: Content) -> None:
    fill(tmp_path / "disk", 1_000_001, content)
    assert (tmp_path / "disk").stat().st_size == 1_000_001


def test_filling_again_leaves_nothing_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    fill(path, 1 << 20, Content.RANDOM)
    fill(path, 1 << 20, Content.EMPTY)
    assert not any(path.read_bytes()) and path.stat().st_blocks == 0


def test_only_what_is_neither_hole_nor_zero_counts_as_data() -> None:
    told = '[{"size": 4096, "percent": 50.0, "type": 0, "description": "data"},\n'
    told += '{"size": 4096, "percent": 50.0, "type": 3, "description": "hole,zero"}]'
    assert data_bytes(told) == 4096
    assert data_bytes("[]") == 0
