"""Sets of ranges: what two have in common, and fewer ranges around them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.ranges import Range, RangeSet

pieces = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 10)).map(lambda t: Range.of(*t)), max_size=12)


def covered(ranges: RangeSet) -> set[int]:
    return {byte for piece in ranges for byte in range(piece.start, piece.end)}


@given(pieces, pieces)
def test_clipping_leaves_what_is_in_both(one: list[Range], other: list[Range]) -> None:
    left, right = RangeSet(one), RangeSet(other)
    assert covered(left.clip(right)) == covered(left) & covered(right)
    assert covered(left) == covered(RangeSet(one))  # it is a new set


def test_the_smallest_gaps_are_closed_first() -> None:
    spread = RangeSet([Range(0, 10), Range(11, 20), Range(40, 50), Range(52, 60)])
    assert spread.coarse(4) == (Range(0, 10), Range(11, 20), Range(40, 50), Range(52, 60))
    assert spread.coarse(3) == (Range(0, 20), Range(40, 50), Range(52, 60))
    assert spread.coarse(2) == (Range(0, 20), Range(40, 60))
    assert spread.coarse(1) == (Range(0, 60),)


@given(pieces, st.integers(1, 5))
def test_fewer_ranges_hold_all_of_the_set(ranges: list[Range], most: int) -> None:
    whole = RangeSet(ranges)
    coarse = whole.coarse(most)
    assert len(coarse) <= most
    assert list(coarse) == list(RangeSet(coarse))
    assert covered(whole) <= covered(RangeSet(coarse))


@given(st.integers(0, 90), st.integers(1, 40), st.integers(1, 20))
def test_parts_of_units_and_whole_ones_are_told_apart(start: int, length: int, unit: int) -> None:
    whole = Range.of(start, length)
    parts = list(whole.parts(unit))
    assert [part.start for part in parts] == [start, *(part.end for part in parts[:-1])]
    assert parts[-1].end == whole.end
    for part in parts:
        is_units = part.start % unit == part.end % unit == 0
        assert is_units or part.start // unit == (part.end - 1) // unit
    assert sum(part.start % unit == part.end % unit == 0 for part in parts) <= 1
