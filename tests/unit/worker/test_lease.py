"""worker/lease.py against a reference that looks at every block of the alignment on its own."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.limits import SEGMENTS_LOW, SEGMENTS_MAX
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork, Segment

DATA = 0
HOLE_ONLY = STATE_HOLE  # not allocated, but nobody says that it reads as zeroes
ZERO = STATE_HOLE | STATE_ZERO
ZERO_ALLOCATED = STATE_ZERO

Extents = list[tuple[Range, int]]


def lease(start: int, end: int, alignment: int = 1, *, until_end: bool = False) -> LeaseWork:
    return LeaseWork(7, Range(start, end), expires=100.0, alignment=alignment, until_end=until_end)


def pieces(work: LeaseWork, unit: int) -> list[tuple[int, int, bool]]:
    """All that can be begun now."""
    taken = []
    while piece := work.next_piece(unit):
        taken.append((piece.where.start, piece.where.end, piece.zero))
    return taken


# -- stories ----------------------------------------------------------------------------------------------------------


def test_without_extents_all_is_data_cut_at_multiples_of_the_unit() -> None:
    work = lease(1000, 10000)
    work.learn_data()
    assert pieces(work, 4096) == [(1000, 4096, False), (4096, 8192, False), (8192, 10000, False)]
    assert work.exhausted


def test_zeroes_come_whole_and_data_in_units() -> None:
    work = lease(0, 1 << 20)
    work.learn([(Range(0, 6000), DATA), (Range(6000, 900_000), ZERO), (Range(900_000, 1 << 20), DATA)])
    assert pieces(work, 1 << 19) == [
        (0, 6000, False),
        (6000, 900_000, True),
        (900_000, 1 << 20, False),
    ]


def test_zeroes_are_cut_to_the_alignment_from_within() -> None:
    work = lease(0, 16384, alignment=4096)
    work.learn([(Range(0, 100), DATA), (Range(100, 12300), ZERO), (Range(12300, 16384), DATA)])
    assert pieces(work, 1 << 20) == [(0, 4096, False), (4096, 12288, True), (12288, 16384, False)]


def test_zeroes_too_short_for_the_alignment_are_data() -> None:
    work = lease(0, 16384, alignment=4096)
    work.learn([(Range(0, 100), DATA), (Range(100, 8000), ZERO), (Range(8000, 16384), DATA)])
    assert pieces(work, 1 << 20) == [(0, 16384, False)]


@pytest.mark.parametrize("flags", [DATA, HOLE_ONLY])
def test_a_hole_that_nobody_calls_zero_is_read(flags: int) -> None:
    work = lease(0, 8192)
    work.learn([(Range(0, 8192), flags)])
    assert pieces(work, 1 << 20) == [(0, 8192, False)]


@pytest.mark.parametrize("flags", [ZERO, ZERO_ALLOCATED])
def test_what_reads_as_zeroes_is_zero_allocated_or_not(flags: int) -> None:
    work = lease(0, 8192)
    work.learn([(Range(0, 8192), flags)])
    assert pieces(work, 1 << 20) == [(0, 8192, True)]


def test_a_short_answer_leaves_the_rest_to_be_asked_from_an_aligned_offset() -> None:
    work = lease(0, 16384, alignment=4096)
    work.learn([(Range(0, 9000), ZERO)])
    assert work.unknown == Range(8192, 16384)
    assert not work.exhausted
    work.learn([(Range(8192, 16384), ZERO)])
    assert pieces(work, 1 << 20) == [(0, 16384, True)]
    assert work.exhausted


def test_an_answer_too_short_to_help_makes_one_block_data() -> None:
    work = lease(0, 16384, alignment=4096)
    work.learn([(Range(0, 1), ZERO)])
    assert work.unknown == Range(4096, 16384)
    assert pieces(work, 1 << 20) == [(0, 4096, False)]


def test_an_answer_longer_than_the_lease_is_cut() -> None:
    work = lease(0, 8192)
    work.learn([(Range(0, 4096), DATA), (Range(4096, 1 << 40), ZERO), (Range(1 << 40, 1 << 41), DATA)])
    assert pieces(work, 1 << 20) == [(0, 4096, False), (4096, 8192, True)]
    assert work.unknown is None


def test_the_tail_of_an_odd_size_is_data() -> None:
    work = lease(8192, 20001, alignment=4096)
    work.learn([(Range(8192, 20001), ZERO)])
    assert pieces(work, 1 << 20) == [(8192, 16384, True), (16384, 20001, False)]


def test_a_lease_under_question_is_not_exhausted() -> None:
    work = lease(0, 4096)
    work.asking = True
    work.learn_data()
    pieces(work, 4096)
    assert not work.exhausted
    work.asking = False
    assert work.exhausted


def test_a_stream_wants_one_more_byte_once_all_it_may_hold_was_read() -> None:
    work = lease(0, 8192, until_end=True)
    work.learn_data()
    assert not work.wants_probe
    assert work.next_piece(4096) == Segment(Range(0, 4096), zero=False)
    assert work.next_piece(4096) == Segment(Range(4096, 8192), zero=False)
    work.reads = 1
    assert not work.wants_probe  # a read under way may still meet the end
    work.reads = 0
    assert work.wants_probe
    assert not work.exhausted
    work.end = 8192
    assert not work.wants_probe
    assert work.exhausted


# -- any answers at all -----------------------------------------------------------------------------------------------


@st.composite
def leases(draw: st.DrawFn) -> tuple[LeaseWork, list[Extents]]:
    """A lease that begins aligned and ends anywhere, and the answers to all its questions: short, long, odd."""
    alignment = draw(st.sampled_from([1, 8, 64]))
    start = alignment * draw(st.integers(0, 3))
    work = lease(start, start + draw(st.integers(1, 600)), alignment)
    probe = lease(start, work.where.end, alignment)  # goes the same way, to learn where the questions begin
    answers: list[Extents] = []
    while (unknown := probe.unknown) is not None:
        at, answer = unknown.start, []
        for _ in range(draw(st.integers(1, 6))):
            length = draw(st.one_of(st.integers(1, 20), st.integers(1, 300)))
            answer.append((Range.of(at, length), draw(st.sampled_from([DATA, HOLE_ONLY, ZERO, ZERO_ALLOCATED]))))
            at += length
        answers.append(answer)
        probe.learn(answer)
    return work, answers


def zero_blocks(work: LeaseWork, answers: list[Extents]) -> set[int]:
    """First bytes of the aligned blocks of the lease that one answer calls zero as a whole, in one extent."""
    known, found = work.where.start, set()
    for answer in answers:
        end = min(answer[-1][0].end, work.where.end)
        if end < work.where.end:
            end = max(end - end % work.alignment, known)
        for block in range(known, end - work.alignment + 1, work.alignment):
            whole = Range.of(block, work.alignment)
            if any(flags & STATE_ZERO and whole in extent for extent, flags in answer):
                found.add(block)
        known = end if end > known else min(known + work.alignment, work.where.end)
    return found


@given(leases(), st.sampled_from([1, 16, 64, 256]), st.randoms(use_true_random=False))
def test_every_byte_comes_once_in_order_and_zeroes_are_the_blocks_called_so(
    story: tuple[LeaseWork, list[Extents]], unit: int, order: st.DataObject
) -> None:
    work, answers = story
    taken: list[Segment] = []
    for answer in answers:
        assert work.unknown is not None
        assert work.unknown.start % work.alignment == 0
        work.learn(answer)
        while order.random() < 0.7 and (piece := work.next_piece(unit)):  # type: ignore[attr-defined]
            taken.append(piece)
    while piece := work.next_piece(unit):
        taken.append(piece)

    assert work.exhausted
    assert taken[0].where.start == work.where.start
    assert taken[-1].where.end == work.where.end
    assert all(one.where.end == next.where.start for one, next in itertools.pairwise(taken))
    found = {
        block for piece in taken if piece.zero for block in range(piece.where.start, piece.where.end, work.alignment)
    }
    assert found == zero_blocks(work, answers)
    for piece in taken:
        if piece.zero:
            assert piece.where.start % work.alignment == piece.where.end % work.alignment == 0
        else:
            assert piece.where.start // unit == (piece.where.end - 1) // unit  # never over a multiple of the unit


def test_a_fragmented_lease_knows_only_so_many_stretches_at_a_time() -> None:
    size, unit = 1 << 30, 4096
    work = lease(0, size, alignment=512)
    answer = [(Range.of(start, unit), ZERO if start // unit % 2 else DATA) for start in range(0, size // 4, unit)]
    work.learn(answer)
    assert len(work.segments) == SEGMENTS_MAX
    assert work.unknown == Range(SEGMENTS_MAX * unit, size)
    assert not work.wants_extents
    taken = 0
    while not work.wants_extents:
        piece = work.next_piece(1 << 20)
        assert piece is not None
        assert piece == Segment(Range.of(taken, unit), zero=taken // unit % 2 == 1)
        taken = piece.where.end
    assert len(work.segments) == SEGMENTS_LOW
    work.learn([(Range(SEGMENTS_MAX * unit, size), DATA)])
    left = pieces(work, size)
    assert (left[0][0], left[-1][1]) == (taken, size)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(left))
    assert work.exhausted
