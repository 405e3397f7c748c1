"""From descriptors to extents."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.nbd.extents import merged
from nbdshard.common.ranges import Range

DESCRIPTORS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=12)


@given(st.integers(0, 20), st.integers(1, 60), DESCRIPTORS)
def test_extents_say_of_each_byte_what_the_descriptors_say(
    start: int, length: int, descriptors: list[tuple[int, int]]
) -> None:
    end = start + length
    by_byte = [flags & 3 for size, flags in descriptors for _ in range(size)][:length]
    extents = merged(start, end, iter(descriptors))
    assert [flags for where, flags in extents for _ in range(where.length)] == by_byte
    assert extents[0][0].start == start
    assert all(one[0].end == two[0].start and one[1] != two[1] for one, two in pairwise(extents))


def test_flags_the_program_does_not_know_make_no_difference() -> None:
    assert merged(0, 100, iter([(10, 4 | 3), (10, 8 | 3), (10, 0)])) == [(Range(0, 20), 3), (Range(20, 30), 0)]


def test_descriptors_behind_the_end_are_not_even_looked_at() -> None:
    assert merged(0, 10, iter([(10, 0), (0, 0)])) == [(Range(0, 10), 0)]
