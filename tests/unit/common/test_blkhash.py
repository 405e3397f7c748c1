"""common/blkhash.py: the construction is nbdcopy's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.blkhash import ZERO_LEAF, Root, leaf_digest, leaves_in
from nbdshard.common.limits import LEAF_BYTES, MIB, RANGE_BYTES_MIN
from support.blkhash import blkhash


def digest_of(content: bytes, *, knows_zeroes: bool = True) -> str:
    """Leaf by leaf; whole leaves of zeroes are told as such."""
    root = Root()
    for start in range(0, len(content), LEAF_BYTES):
        leaf = content[start : start + LEAF_BYTES]
        if knows_zeroes and leaf == bytes(LEAF_BYTES):
            root.zeroes(1)
        else:
            root.data(leaf_digest(leaf))
    assert root.count == leaves_in(len(content))
    return root.finish(len(content))


# From libnbd's own test of nbdcopy --blkhash=sha256, copy/copy-blkhash-known.sh, which compares with blksum's results.
@pytest.mark.parametrize(
    ("content", "digest"),
    [
        (b"", "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"),
        (b"hello", "337355feb53a5309d5aba92796223c2c84ffab930e706c01fef573a2722545e6"),
        (b"hello".ljust(MIB, b"\0") + b"goodbye", "61b8f3a8cea76e16eeff7ce27f1b7711c1f1e437f5038cec17773772a4bded28"),
        (b"12345678" * 512 * 256, "cbb388edd25e567b85f504c7b345497f9fb4f6bbf4e39768809184b9f9e678f8"),
    ],
    ids=["empty", "hello", "hello and goodbye", "pattern"],
)
def test_the_digests_are_those_of_nbdcopy(content: bytes, digest: str) -> None:
    assert digest_of(content) == digest
    assert blkhash(content) == digest  # so the other tests compare with the right thing


@given(st.integers(0, 5), st.integers(0, LEAF_BYTES), st.binary(min_size=1, max_size=5))
def test_zeroes_that_are_told_and_zeroes_that_are_hashed_are_the_same(leaves: int, tail: int, data: bytes) -> None:
    content = bytes(leaves * LEAF_BYTES) + data + bytes(tail)
    assert digest_of(content) == digest_of(content, knows_zeroes=False) == blkhash(content)


def test_many_zeroes_cost_no_memory_and_are_counted_one_by_one() -> None:
    root, plain = Root(), Root()
    root.zeroes(5000)
    for _ in range(5000):
        plain.data(ZERO_LEAF)
    assert root.finish(5000 * LEAF_BYTES) == plain.finish(5000 * LEAF_BYTES)


def test_zeroes_of_different_sizes_have_different_digests() -> None:
    sizes = [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 2 * LEAF_BYTES]
    assert len({digest_of(bytes(size)) for size in sizes}) == len(sizes)


def test_no_range_is_cut_inside_a_leaf() -> None:
    assert RANGE_BYTES_MIN % LEAF_BYTES == 0
