"""worker/differing.py: which blocks of two payloads differ."""

from __future__ import annotations

import pytest

from nbdshard.worker.differing import find_differing
from support.images import random_bytes

MIB = 1 << 20


def changed(data: bytes, *offsets: int) -> bytearray:
    other = bytearray(data)
    for offset in offsets:
        other[offset] ^= 0xFF
    return other


def test_equal_payloads_have_no_differences() -> None:
    data = random_bytes(MIB)
    assert find_differing((bytearray(data), MIB), (bytearray(data), MIB)) == []


@pytest.mark.parametrize(
    ("offset", "block"),
    [
        (0, (0, 512)),
        (511, (0, 512)),
        (512, (512, 1024)),
        (32_767, (32_256, 32_768)),
        (32_768, (32_768, 33_280)),
        (MIB - 1, (MIB - 512, MIB)),
    ],
)
def test_one_byte_makes_its_block_differ(offset: int, block: tuple[int, int]) -> None:
    data = random_bytes(MIB)
    assert find_differing((bytearray(data), MIB), (changed(data, offset), MIB)) == [block]
    assert find_differing((changed(data, offset), MIB), (bytearray(data), MIB)) == [block]


def test_blocks_side_by_side_are_one_run_also_across_what_is_searched_at_once() -> None:
    data = random_bytes(MIB)
    other = changed(data, 32_000, 32_300, 32_800, 40_000)
    assert find_differing((bytearray(data), MIB), (other, MIB)) == [(31_744, 33_280), (39_936, 40_448)]


def test_what_is_behind_the_bytes_read_is_not_looked_at() -> None:
    data = random_bytes(MIB)
    assert find_differing((bytearray(data), 1000), (changed(data, 1000), 1000)) == []


def test_an_odd_tail_ends_the_last_run() -> None:
    data = random_bytes(10_001)
    other = changed(data, 10_000)
    assert find_differing((bytearray(data), 10_001), (other, 10_001)) == [(9728, 10_001)]


def test_a_side_of_zeroes_needs_no_buffer() -> None:
    assert find_differing((bytearray(), 0), (bytearray(MIB), MIB)) == []
    assert find_differing((bytearray(), 0), (changed(bytes(MIB), 700), MIB)) == [(512, 1024)]
    assert find_differing((changed(bytes(MIB), 700), MIB), (bytearray(), 0)) == [(512, 1024)]


def test_behind_its_end_a_side_counts_as_zeroes_whatever_its_buffer_holds() -> None:
    data = random_bytes(1000)
    first = bytearray(data + b"\xaa" * 3096)
    assert find_differing((first, 1000), (bytearray(data + bytes(3096)), 4096)) == []
    assert find_differing((first, 1000), (first, 4096)) == [(512, 4096)]
    second = bytearray(data + bytes(3096))
    second[1023] = 1
    assert find_differing((first, 1000), (second, 4096)) == [(512, 1024)]
    second[1023], second[1024] = 0, 1
    assert find_differing((first, 1000), (second, 4096)) == [(1024, 1536)]
