"""worker/zeroes.py against a reference that looks at every block on its own."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdshard.common.limits import MIB
from nbdshard.worker.zeroes import Run, find_runs, is_zero

UNITS = (512, 1024, 4096)


def runs_block_by_block(buffer: bytes, unit: int, phase: int) -> list[Run]:
    """The same answer, slowly: cut where the device offset is a multiple of `unit`, judge each block, join equals."""
    cuts = [0, *(at for at in range(1, len(buffer)) if (at + phase) % unit == 0), len(buffer)]
    blocks = [(start, end, not any(buffer[start:end])) for start, end in pairwise(cuts)]
    joined = []
    for zero, group in groupby(blocks, key=lambda block: block[2]):
        members = list(group)
        joined.append((members[0][0], members[-1][1], zero))
    return joined


@st.composite
def payloads(draw: st.DrawFn) -> tuple[bytes, int, int]:
    """A buffer of zeroes with a few stretches of data in it, down to single bytes; a unit; a phase."""
    unit = draw(st.sampled_from(UNITS))
    length = draw(st.integers(1, 8 * unit))
    buffer = bytearray(length)
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, length - 1))
        stretch = draw(st.sampled_from([1, 2, unit - 1, unit, 3 * unit]))
        for at in range(start, min(start + stretch, length)):
            buffer[at] = draw(st.sampled_from([1, 255])) if stretch < 3 else 0xAA
    return bytes(buffer), unit, draw(st.one_of(st.just(0), st.integers(0, unit - 1)))


@given(payloads())
@example((bytes(1), 512, 0))
@example((b"\1", 512, 511))
@example((bytes(1023) + b"\1", 512, 0))
def test_runs_are_those_found_block_by_block(payload: tuple[bytes, int, int]) -> None:
    buffer, unit, phase = payload
    assert find_runs(bytearray(buffer), len(buffer), unit, phase) == runs_block_by_block(buffer, unit, phase)


@given(payloads(), st.integers(1, 3000))
def test_what_a_buffer_holds_behind_the_payload_does_not_count(payload: tuple[bytes, int, int], spare: int) -> None:
    buffer, unit, phase = payload
    expected = find_runs(bytearray(buffer), len(buffer), unit, phase)
    for rest in (bytes(spare), b"\xff" * spare):
        assert find_runs(bytearray(buffer + rest), len(buffer), unit, phase) == expected


def test_one_byte_makes_a_block_data_wherever_it_is() -> None:
    for position in range(512):
        buffer = bytearray(1536)
        buffer[512 + position] = 1
        assert find_runs(buffer, 1536, 512) == [(0, 512, True), (512, 1024, False), (1024, 1536, True)], position


def test_data_with_a_zero_where_the_sample_is_taken_is_still_data() -> None:
    buffer = bytearray(b"\xff" * 4096)
    for block in range(8):
        buffer[block * 512 + 0x15B] = 0
    assert find_runs(buffer, 4096, 512) == [(0, 4096, False)]


@pytest.mark.parametrize("nonzero", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB - 1])
def test_long_stretches_are_compared_to_the_last_byte(nonzero: int) -> None:
    buffer = bytearray(3 * MIB)
    assert is_zero(buffer, 0, 3 * MIB)
    buffer[nonzero] = 1
    assert not is_zero(buffer, 0, 3 * MIB)
    assert is_zero(buffer, 0, nonzero)
    assert is_zero(buffer, nonzero + 1, 3 * MIB)
