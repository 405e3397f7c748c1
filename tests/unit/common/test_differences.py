"""common/differences.py: the first ranges that differ, whatever the order in which they come."""

from __future__ import annotations

import random

import pytest

from nbdshard.common.differences import Differences
from nbdshard.common.limits import DIFFERENCES_MAX
from nbdshard.common.ranges import Range, RangeSet


def test_neighbours_are_one_range_in_whatever_order_they_come() -> None:
    found = Differences([Range(1024, 1536), Range(0, 512), Range(512, 1024)])
    assert found.ranges == (Range(0, 1536),)
    assert found.total_bytes == 1536
    assert not found.is_cut


@pytest.mark.parametrize("seed", range(20))
def test_the_first_ones_are_kept_and_all_are_counted(seed: int) -> None:
    order = random.Random(seed)
    pieces = [Range.of(number * 1024, 512) for number in range(5 * DIFFERENCES_MAX)]
    shuffled = order.sample(pieces, len(pieces))
    found = Differences(shuffled)
    assert found.ranges == tuple(pieces[:DIFFERENCES_MAX]), f"seed {seed}"
    assert found.is_cut
    assert found.total_bytes == len(pieces) * 512


def test_nothing_is_listed_behind_a_range_that_was_left_out() -> None:
    found = Differences(Range.of(number * 1024, 512) for number in range(DIFFERENCES_MAX + 1))
    found.add(Range(512, 1024))  # joins two of those kept, and so makes room
    found.add(Range.of((DIFFERENCES_MAX + 7) * 1024, 512))
    assert len(found.ranges) == DIFFERENCES_MAX - 1
    assert found.ranges[-1] == Range.of((DIFFERENCES_MAX - 1) * 1024, 512)


@pytest.mark.parametrize("seed", range(20))
def test_what_leases_found_is_put_together_as_if_one_had_looked(seed: int) -> None:
    order = random.Random(seed)
    lease_bytes, sectors = 64 * 1024, 128
    whole = Differences()
    parts = []
    for lease in range(8):
        part = Differences()
        density = order.choice((0.0, 0.01, 0.3, 0.9))
        for sector in range(sectors):
            if order.random() < density:
                piece = Range.of(lease * lease_bytes + sector * 512, 512)
                part.add(piece)
                whole.add(piece)
        parts.append(part)
    order.shuffle(parts)
    merged = Differences()
    for part in parts:
        merged.merge(part.ranges, part.total_bytes)
    assert merged.total_bytes == whole.total_bytes
    # A list that is cut may end sooner, never elsewhere.
    assert merged.ranges[:-1] == whole.ranges[: len(merged.ranges) - 1], f"seed {seed}"
    if not merged.is_cut:
        assert merged.ranges == whole.ranges
        assert RangeSet(merged.ranges).total == merged.total_bytes
