"""Images that are the same every time, and comparison that finds the one byte that differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images


def test_the_pattern_is_the_offset_of_every_eight_bytes() -> None:
    assert images.pattern(0, 16) == bytes(8) + b"\0\0\0\0\0\0\0\x08"
    assert images.pattern(13, 6) == b"\0\0\x08\0\0\0"


@pytest.mark.parametrize("size", images.ODD_SIZES)
def test_a_sparse_image_has_its_size_and_ends_in_data(tmp_path: Path, size: int) -> None:
    image = images.sparse_image(tmp_path / "a", size)
    content = image.read_bytes()
    assert len(content) == size
    assert content[-1] == 0xA5
    assert content == images.sparse_image(tmp_path / "b", size).read_bytes()


def test_a_sparse_image_holds_data_holes_and_zeroes(tmp_path: Path) -> None:
    image = images.sparse_image(tmp_path / "a", 8 * images.MIB)
    zero_blocks = sum(not any(image.read_bytes()[start : start + 4096]) for start in range(0, 8 * images.MIB, 4096))
    assert 0 < images.allocated_bytes(image) < 8 * images.MIB
    assert zero_blocks * 4096 > 8 * images.MIB - images.allocated_bytes(image)


def test_the_first_byte_that_differs_is_found(tmp_path: Path) -> None:
    left = images.random_image(tmp_path / "left", 3 * images.MIB)
    right = tmp_path / "right"
    content = bytearray(left.read_bytes())
    content[2_500_000] ^= 1
    right.write_bytes(content)
    assert images.difference(left, left) is None
    assert images.difference(left, right) == 2_500_000
    assert images.difference(left, right, 2_500_000) is None


def test_a_shorter_file_differs_where_it_ends(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    left.write_bytes(b"abc")
    right.write_bytes(b"ab")
    assert images.difference(left, right) == 2


def test_a_changed_byte_behind_the_end_is_noticed(tmp_path: Path) -> None:
    larger, smaller = images.filled_image(tmp_path / "larger", 100), tmp_path / "smaller"
    smaller.write_bytes(b"\xee" * 10)
    images.assert_begins_with(larger, smaller, rest=0xEE)
    with larger.open("r+b") as file:
        file.seek(99)
        file.write(b"!")
    with pytest.raises(AssertionError, match="behind 10"):
        images.assert_begins_with(larger, smaller, rest=0xEE)
