"""worker/compare_lease.py: two sides' block status laid over one another."""

from __future__ import annotations

import random

import pytest

from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range
from nbdshard.worker.compare_lease import CompareWork, Piece

KIB = 1024
ZERO = STATE_HOLE | STATE_ZERO
UNIT = 64 * KIB


def work(where: Range, *sizes: int, alignment: int = 512) -> CompareWork:
    return CompareWork(1, where, sizes, alignment=alignment, hole_min=1)


def learn(side: int, into: CompareWork, *extents: tuple[int, int]) -> None:
    """Tell the whole block status of a side, as (length, flags)."""
    known = into.maps[side]
    assert known is not None
    start, told = known.where.start, []
    for length, flags in extents:
        told.append((Range.of(start, length), flags))
        start += length
    known.learn(told)


def pieces(of: CompareWork, unit: int = UNIT) -> list[Piece]:
    found = []
    while (piece := of.next_piece(unit, lambda: True)) is not None:
        found.append(piece)
    return found


def test_nothing_is_begun_before_both_sides_have_told() -> None:
    lease = work(Range(0, UNIT), UNIT, UNIT)
    assert lease.next_piece(UNIT, lambda: True) is None
    learn(0, lease, (UNIT, 0))
    assert lease.next_piece(UNIT, lambda: True) is None
    learn(1, lease, (UNIT, 0))
    assert pieces(lease) == [Piece(Range(0, UNIT), (False, False))]
    assert lease.exhausted


def test_zeroes_on_both_sides_are_one_piece_and_others_say_who_is_read() -> None:
    size = 8 * UNIT
    lease = work(Range(0, size), size, size)
    learn(0, lease, (UNIT, 0), (5 * UNIT, ZERO), (2 * UNIT, 0))
    learn(1, lease, (2 * UNIT, 0), (5 * UNIT, ZERO), (UNIT, 0))
    assert pieces(lease) == [
        Piece(Range(0, UNIT), (False, False)),
        Piece(Range(UNIT, 2 * UNIT), (True, False)),
        Piece(Range(2 * UNIT, 6 * UNIT), (True, True)),
        Piece(Range(6 * UNIT, 7 * UNIT), (False, True)),
        Piece(Range(7 * UNIT, 8 * UNIT), (False, False)),
    ]


def test_data_is_cut_at_multiples_of_the_request_size() -> None:
    lease = work(Range(3 * UNIT // 2, 4 * UNIT), 4 * UNIT, 4 * UNIT)
    for side in (0, 1):
        learn(side, lease, (5 * UNIT // 2, 0))
    assert [piece.where for piece in pieces(lease)] == [
        Range(3 * UNIT // 2, 2 * UNIT),
        Range(2 * UNIT, 3 * UNIT),
        Range(3 * UNIT, 4 * UNIT),
    ]


def test_a_side_that_ends_before_the_lease_begins_is_zeroes_and_is_not_asked() -> None:
    lease = work(Range(UNIT, 3 * UNIT), UNIT, 3 * UNIT)
    assert lease.maps[0] is None
    learn(1, lease, (UNIT, ZERO), (UNIT, 0))
    assert pieces(lease) == [
        Piece(Range(UNIT, 2 * UNIT), (True, True)),
        Piece(Range(2 * UNIT, 3 * UNIT), (True, False)),
    ]


def test_a_side_that_ends_inside_a_block_has_the_whole_block_and_then_zeroes() -> None:
    lease = work(Range(0, UNIT), 5000, UNIT, alignment=4096)
    learn(0, lease, (5000, 0))
    learn(1, lease, (UNIT, 0))
    assert pieces(lease) == [
        Piece(Range(0, 8192), (False, False)),
        Piece(Range(8192, UNIT), (True, False)),
    ]


@pytest.mark.parametrize("seed", range(50))
def test_whatever_is_told_every_byte_is_in_one_piece_and_no_data_is_taken_for_zeroes(seed: int) -> None:
    source = random.Random(seed)
    alignment = source.choice((512, 4096))
    length = source.randrange(1, 400) * 4096
    sizes = [length, length - source.randrange(1, length + 1)] if source.random() < 0.5 else [length, length]
    source.shuffle(sizes)
    lease = work(Range(0, length), *sizes, alignment=alignment)
    truth = []
    for side, size in enumerate(sizes):
        extents, left = [], size
        while left:
            extent = min(left, source.randrange(1, 100_000))
            extents.append((extent, source.choice((0, ZERO))))
            left -= extent
        truth.append([flags == ZERO for extent, flags in extents for _ in range(extent)] + [True] * (length - size))
        known = lease.maps[side]
        while known is not None and (unknown := known.unknown) is not None:
            at, told = 0, []
            for extent, flags in extents:  # what lies behind `unknown.start`
                start, end = max(at, unknown.start), at + extent
                if start < end:
                    told.append((Range(start, end), flags))
                at += extent
            known.learn(told)
    position = 0
    for piece in pieces(lease):
        assert piece.where.start == position, f"seed {seed}"
        position = piece.where.end
        assert position % alignment == 0 or position == length
        for side in (0, 1):
            if piece.zero[side]:
                assert all(truth[side][piece.where.start : piece.where.end]), f"seed {seed}: side {side}, {piece}"
    assert position == length
