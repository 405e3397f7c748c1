"""The digests in a journal: those of what is durable, and no others; zeroes take no room; damage is found."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdshard.common.errors import UserError
from nbdshard.common.limits import LEAF_BYTES, MIB
from nbdshard.common.messages import LeafRun
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_schema import DamagedJournal
from support.journals import facts, mib

LEAVES = 40
SIZE = LEAVES * LEAF_BYTES - 7  # the last leaf is short
STEPS = st.tuples(st.booleans(), st.integers(0, LEAVES - 1), st.integers(1, 12), st.integers(0, 1 << 40))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "job.journal")


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def by_leaf(runs: list[LeafRun]) -> dict[int, bytes]:
    """Each leaf's digest, by its number. No leaf may be there twice."""
    found = {}
    for run in runs:
        for at in range(run.count):
            leaf = run.start // LEAF_BYTES + at
            assert leaf not in found
            found[leaf] = run.digests[at * 32 : at * 32 + 32]
    return found


def runs_of(digests: dict[int, bytes]) -> list[LeafRun]:
    """As few runs as there can be."""
    runs: list[LeafRun] = []
    for leaf, content in sorted(digests.items()):
        if runs and runs[-1].end == leaf * LEAF_BYTES:
            runs[-1] = LeafRun(runs[-1].start, runs[-1].digests + content)
        else:
            runs.append(LeafRun(leaf * LEAF_BYTES, content))
    return runs


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=12), ask=st.tuples(st.integers(0, LEAVES - 1), st.integers(1, LEAVES)))
def test_any_sequence_of_changes_leaves_the_digests_of_what_is_durable(
    tmp_path: Path, steps: list[tuple[bool, int, int, int]], ask: tuple[int, int]
) -> None:
    path = tmp_path / "job.journal"
    path.unlink(missing_ok=True)
    expected: dict[int, bytes] = {}
    durable = RangeSet()
    with Journal.create(str(path), facts(SIZE)) as journal:
        for is_durable, first, count, salt in steps:
            leaves = range(first, min(first + count, LEAVES))
            piece = Range(first * LEAF_BYTES, min(leaves.stop * LEAF_BYTES, SIZE))
            for leaf in leaves:
                expected.pop(leaf, None)
            if is_durable:
                durable.add(piece)
                new = {leaf: digest(salt + leaf) for leaf in leaves if (salt >> leaf % 40) & 1 or leaf == LEAVES - 1}
                expected |= new
                journal.record([piece], leaves=runs_of(new))
            else:
                durable.remove(piece)
                journal.demote([piece])
    with Journal.open(str(path)) as journal:
        assert journal.durable == list(durable)
        assert by_leaf(journal.leaves(Range(0, SIZE))) == expected
        first, count = ask
        where = Range(first * LEAF_BYTES, min((first + count) * LEAF_BYTES, SIZE))
        found = journal.leaves(where)
        assert by_leaf(found) == {leaf: it for leaf, it in expected.items() if first <= leaf < first + count}
        assert found == sorted(found, key=lambda run: run.start)


def test_zeroes_take_no_room(tmp_path: Path) -> None:
    size = 1 << 44
    sizes = []
    for name, durable in (("little", Range(0, LEAF_BYTES)), ("much", Range(0, size))):
        with Journal.create(str(tmp_path / name), facts(size)) as journal:
            journal.record([durable])
            assert journal.leaves(Range(0, size)) == []
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] == sizes[1]


def changed(path: str, statement: str) -> str:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)
    with pytest.raises(DamagedJournal) as caught:
        Journal.open(path)
    assert Journal.read(path).durable == [mib(0, 1)]  # a look has no use for the digests, and does not look at them
    return str(caught.value)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE leaves SET digests = zeroblob(64)", "the seal does not match what it holds"),
        ("DELETE FROM leaves", "the seal does not match what it holds"),
        ("INSERT INTO leaves VALUES (4194304, zeroblob(32))", "the seal does not match what it holds"),
        ("INSERT INTO leaves VALUES (65536, zeroblob(32))", "the digests from 65536 on are out of order"),
        ("INSERT INTO leaves VALUES (4194305, zeroblob(32))", "the digests from 4194305 on are out of order"),
        ("INSERT INTO leaves VALUES (4194304, zeroblob(33))", "the digests from 4194304 on are out of order"),
        ("INSERT INTO leaves VALUES (4194304, x'')", "the digests from 4194304 on are out of order"),
        ("INSERT INTO leaves VALUES (4194304, 'text')", "the digests from 4194304 on are out of order"),
        ("INSERT INTO leaves VALUES (-65536, zeroblob(32))", "the digests from -65536 on are out of order"),
    ],
)
def test_whatever_was_changed_behind_our_back_is_found(path: str, statement: str, reason: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 1)], leaves=[LeafRun(0, digest(1) + digest(2))])
    assert f"the journal is damaged: {reason}" in changed(path, statement)


def test_a_digest_beyond_the_end_of_the_job_is_none_of_it(path: str) -> None:
    with Journal.create(path, facts(MIB)) as journal:
        journal.record([Range(0, MIB)], leaves=[LeafRun(MIB, digest(1))])
    with pytest.raises(UserError, match="a range ends at"):
        Journal.open(path)
