"""worker/leaves.py: the same digests in whatever pieces and order the lease is read."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common.blkhash import Root
from nbdshard.common.errors import BugError
from nbdshard.common.limits import GIB, LEAF_BYTES, MESSAGE_BYTES_MAX, MIB
from nbdshard.common.messages import LeafRun, encode
from nbdshard.common.ranges import Range
from nbdshard.worker.leaves import LeafDigests
from support.blkhash import blkhash

JOB = "6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e11"
KIB = 1024


def runs_of(digests: LeafDigests) -> list[LeafRun]:
    return [run for message in digests.messages(JOB, 1, 7) for run in message.runs]


def root_of(runs: list[LeafRun], where: Range) -> str:
    """The digest of an image that is the lease alone."""
    root, at = Root(), where.start
    for run in runs:
        assert run.start >= at
        root.zeroes((run.start - at) // LEAF_BYTES)
        root.data(run.digests)
        at = run.end
    root.zeroes(max(0, where.end - at) // LEAF_BYTES)
    return root.finish(where.length)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6 * LEAF_BYTES),
    start=st.sampled_from([0, LEAF_BYTES, 1000 * LEAF_BYTES]),
    unit=st.sampled_from([512, 4 * KIB, LEAF_BYTES, 1]),
    seed=st.integers(0, 1 << 32),
)
def test_any_pieces_in_any_order_make_the_same_digest(size: int, start: int, unit: int, seed: int) -> None:
    chance = random.Random(seed)
    where, content = Range.of(start, size), bytearray(size)
    borders = {0, size, *(min(size, chance.randrange(size + 1) // unit * unit) for _ in range(chance.randrange(12)))}
    if chance.random() < 0.5:
        borders |= set(range(0, size, LEAF_BYTES))
    pieces = list(zip(sorted(borders), sorted(borders)[1:], strict=False))
    known_zero = set()
    for piece in pieces:
        if chance.random() < 0.5:
            content[slice(*piece)] = chance.choice((chance.randbytes, bytes))(piece[1] - piece[0])
        else:
            known_zero.add(piece)
    chance.shuffle(pieces)
    digests = LeafDigests(where)
    for begin, end in pieces:
        assert not digests.is_whole
        if (begin, end) in known_zero:
            digests.add_zeroes(Range(start + begin, start + end))
        else:  # a buffer is longer than what was read, and holds old bytes behind it
            digests.add_data(start + begin, content[begin:end] + b"old", end - begin)
    assert digests.is_whole
    assert root_of(runs_of(digests), where) == blkhash(bytes(content))


def test_whole_leaves_of_zeroes_are_not_told_whether_they_were_known_or_found() -> None:
    digests = LeafDigests(Range(0, 4 * LEAF_BYTES))
    digests.add_zeroes(Range(0, 2 * LEAF_BYTES))
    digests.add_data(2 * LEAF_BYTES, bytearray(2 * LEAF_BYTES), 2 * LEAF_BYTES)
    assert digests.is_whole
    assert runs_of(digests) == []


def test_a_leaf_of_zeroes_in_pieces_is_one_of_zeroes() -> None:
    digests = LeafDigests(Range(0, LEAF_BYTES))
    digests.add_data(512, bytearray(LEAF_BYTES - 512), LEAF_BYTES - 512)
    digests.add_zeroes(Range(0, 512))
    assert runs_of(digests) == []


def test_a_short_last_leaf_of_zeroes_is_told() -> None:
    digests = LeafDigests(Range(0, LEAF_BYTES + 5))
    digests.add_zeroes(Range(0, LEAF_BYTES + 5))
    (run,) = runs_of(digests)
    assert (run.start, run.count) == (LEAF_BYTES, 1)
    assert root_of([run], Range(0, LEAF_BYTES + 5)) == blkhash(bytes(LEAF_BYTES + 5))


def test_every_message_is_short_enough_for_the_channel() -> None:
    many = 2049
    dense, dotted = LeafDigests(Range(0, many * LEAF_BYTES)), LeafDigests(Range(GIB, GIB + many * LEAF_BYTES))
    buffer = bytearray(b"\1" * LEAF_BYTES)
    for leaf in range(many):
        dense.add_data(leaf * LEAF_BYTES, buffer, LEAF_BYTES)
        start = GIB + leaf * LEAF_BYTES
        if leaf % 2:
            dotted.add_zeroes(Range.of(start, LEAF_BYTES))
        else:
            dotted.add_data(start, buffer, LEAF_BYTES)
    for digests, told in ((dense, many), (dotted, many // 2 + 1)):
        messages = list(digests.messages(JOB, 1, 7))
        assert sum(run.count for message in messages for run in message.runs) == told
        assert len(messages) > 1
        assert max(len(encode(message)) for message in messages) <= MESSAGE_BYTES_MAX // 2 + 200


@pytest.mark.parametrize("again", [Range(0, LEAF_BYTES), Range(0, 2 * LEAF_BYTES), Range(0, 512)], ids=str)
@pytest.mark.parametrize("is_data", [False, True], ids=["zeroes", "data"])
def test_a_byte_that_comes_twice_is_a_bug(again: Range, is_data: bool) -> None:
    digests = LeafDigests(Range(0, 2 * LEAF_BYTES))
    digests.add_data(0, bytearray(b"\1" * LEAF_BYTES), LEAF_BYTES)
    with pytest.raises(BugError, match="a second time"):
        digests.add_data(again.start, bytearray(again.length), again.length) if is_data else digests.add_zeroes(again)


def test_what_is_outside_the_lease_is_a_bug() -> None:
    with pytest.raises(BugError, match="not of the lease"):
        LeafDigests(Range(0, MIB)).add_zeroes(Range(MIB - 512, MIB + 512))
