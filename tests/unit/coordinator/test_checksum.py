"""coordinator/checksum.py: digests of ranges in any order, and what an earlier run had, become one checksum."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common.errors import BugError
from nbdshard.common.limits import DIGEST_RUN_BYTES, EARLIER_STEP_BYTES, LEAF_BYTES
from nbdshard.common.messages import LeafRun
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.checksum import ImageChecksum
from support.blkhash import blkhash

DIGEST = b"\7" * 32


def runs_of(content: bytes, where: Range) -> list[LeafRun]:
    """The digests of one range, each in a run of its own; leaves of zeroes are left out."""
    leaves = [(at, content[at : at + LEAF_BYTES]) for at in range(where.start, where.end, LEAF_BYTES)]
    return [LeafRun(at, sha256(leaf).digest()) for at, leaf in leaves if leaf != bytes(LEAF_BYTES)]


class Earlier:
    """A journal: it is asked for pieces that are not too large, each once."""

    def __init__(self, content: bytes, durable: RangeSet) -> None:
        self.content = content
        self.left = durable

    def leaves(self, where: Range) -> Sequence[LeafRun]:
        assert where in self.left
        self.left.remove(where)
        return runs_of(self.content, where)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 12 * LEAF_BYTES), seed=st.integers(0, 1 << 32))
def test_ranges_in_any_order_make_the_checksum_of_the_image(size: int, seed: int) -> None:
    chance = random.Random(seed)
    content = b"".join(
        chance.choice((bytes, chance.randbytes))(min(LEAF_BYTES, size - at)) for at in range(0, size, LEAF_BYTES)
    )
    cuts = [at for at in range(LEAF_BYTES, size, LEAF_BYTES) if chance.random() < 0.5]
    ranges = [Range(*pair) for pair in zip([0, *cuts], [*cuts, size], strict=True)] if size else []
    durable = RangeSet(where for where in ranges if chance.random() < 0.3)
    todo = [where for where in ranges if where not in durable]
    chance.shuffle(todo)
    checksum = ImageChecksum(Earlier(content, RangeSet(durable)), durable)
    for where in todo:
        checksum.add(where, runs_of(content, where))
        if chance.random() < 0.5:
            checksum.step()
    assert checksum.finish(size) == blkhash(content)
    assert checksum.held_bytes == 0


def test_only_what_waits_for_its_turn_is_held() -> None:
    checksum = ImageChecksum()
    late, after = Range(0, LEAF_BYTES), Range(LEAF_BYTES, 2 * LEAF_BYTES)
    checksum.add(after, [LeafRun(after.start, DIGEST)])
    assert checksum.held_bytes >= 32
    checksum.add(late, [LeafRun(0, DIGEST)])
    assert checksum.held_bytes == 0


def test_zeroes_that_wait_take_as_much_as_their_ranges_are() -> None:
    checksum = ImageChecksum()
    checksum.add(Range(1 << 40, 1 << 44), [])
    assert checksum.held_bytes == DIGEST_RUN_BYTES


def test_what_is_held_is_what_it_takes() -> None:
    """Not exactly: the bound on it is a bound on memory only if it is not far off."""
    checksum, count = ImageChecksum(), 2000
    tracemalloc.start()
    try:
        for at in range(count):  # each a leaf apart from the next, so that none is in its turn
            start = (2 * at + 1) * LEAF_BYTES
            checksum.add(Range.of(start, LEAF_BYTES), (LeafRun(start, bytes(bytearray(32))),) if at % 2 else ())
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 2 < checksum.held_bytes < taken * 2


def test_what_an_earlier_run_did_is_taken_a_step_at_a_time() -> None:
    size = 3 * EARLIER_STEP_BYTES
    asked: list[Range] = []

    class Zeroes:
        def leaves(self, where: Range) -> Sequence[LeafRun]:
            asked.append(where)
            return ()

    checksum = ImageChecksum(Zeroes(), [Range(0, size)])
    checksum.step()
    assert asked == [Range(0, EARLIER_STEP_BYTES)]
    whole = ImageChecksum()
    whole.add(Range(0, size), [])
    assert checksum.finish(size) == whole.finish(size)
    assert [piece.length for piece in asked] == [EARLIER_STEP_BYTES] * 3


def test_a_checksum_of_half_an_image_is_never_given() -> None:
    checksum = ImageChecksum()
    checksum.add(Range(0, LEAF_BYTES), [])
    with pytest.raises(BugError, match="only of the first 65536"):
        checksum.finish(2 * LEAF_BYTES)


@pytest.mark.parametrize(
    "runs",
    [
        [LeafRun(1, DIGEST)],
        [LeafRun(0, DIGEST)],
        [LeafRun(LEAF_BYTES, DIGEST + b"x")],
        [LeafRun(4 * LEAF_BYTES, DIGEST)],
        [LeafRun(3 * LEAF_BYTES, DIGEST * 2)],
        [LeafRun(LEAF_BYTES, DIGEST * 2), LeafRun(2 * LEAF_BYTES, DIGEST)],
    ],
    ids=["off the leaves", "before", "a byte too many", "behind", "too long", "overlapping"],
)
def test_digests_that_do_not_fit_their_range_are_at_fault(runs: list[LeafRun]) -> None:
    assert "do not fit into [65536, 262144)" in ImageChecksum.fault_of(runs, Range(LEAF_BYTES, 4 * LEAF_BYTES))


def test_a_short_last_leaf_must_be_told() -> None:
    where = Range(0, LEAF_BYTES + 1)
    assert "short leaf" in ImageChecksum.fault_of([], where)
    assert ImageChecksum.fault_of([LeafRun(LEAF_BYTES, DIGEST)], where) == ""
    assert ImageChecksum.fault_of([], Range(0, LEAF_BYTES)) == ""
