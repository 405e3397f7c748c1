"""A map of chunks is a set of numbers that can be walked in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.limits import CHUNKS_PAGE
from nbdshard.server.backends.chunk_map import ChunkMap

NUMBERS = st.one_of(st.integers(0, 40), st.integers(CHUNKS_PAGE - 3, CHUNKS_PAGE + 3), st.integers(0, 1 << 47))


def members(chunks: ChunkMap, first: int = 0, end: int = 1 << 60) -> list[int]:
    found = []
    while (number := chunks.next(first, end)) is not None:
        found.append(number)
        first = number + 1
    return found


@given(st.lists(st.tuples(st.booleans(), NUMBERS)), NUMBERS, NUMBERS)
def test_it_holds_what_a_set_holds(changes: list[tuple[bool, int]], first: int, end: int) -> None:
    chunks, reference = ChunkMap(), set[int]()
    for is_added, number in changes:
        (chunks.add if is_added else chunks.discard)(number)
        (reference.add if is_added else reference.discard)(number)
        assert (number in chunks) is is_added
    assert members(chunks) == sorted(reference)
    assert members(chunks, first, end) == sorted(number for number in reference if first <= number < end)
