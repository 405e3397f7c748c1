"""The journal of one run: made late, not at all for a copy that is complete, and no reason to end one in the middle."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.limits import JOURNAL_DELAY_SECONDS, MIB
from nbdshard.common.messages import Counters, EndpointDescription, LeafRun
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Journal as Change
from nbdshard.coordinator.job import Outcome, Verdict
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JournalState
from nbdshard.coordinator.keeping import Keeper
from support.journals import SIZE, answer, facts, fill, mib, program, small_disk

ENDS = (EndpointDescription("nbd://source.example/disk", SIZE), EndpointDescription("/srv/images/disk.img", SIZE))
FIRST, SECOND, THIRD = (Change(durable=(mib(n, n + 1),)) for n in range(0, 6, 2))

LOOK = """
import sys
from nbdshard.coordinator.journal import Journal
print(Journal.read(sys.argv[1]).durable_bytes >> 20, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "folder" / "job.journal")


def keeper_at(path: str, *, keeps: bool = False, is_wanted: bool = False, has_leaves: bool = False) -> Keeper:
    return Keeper(lambda: path, lambda *_: facts(), keeps=keeps, is_wanted=is_wanted, has_leaves=has_leaves)


def outcome(verdict: Verdict) -> Outcome:
    return Outcome(verdict, "", Counters(), SIZE, True, True, 1, 1, 1, frozenset(), (), "source", "destination")


def test_a_copy_that_is_complete_with_its_first_flush_makes_no_journal(path: str) -> None:
    keeper = keeper_at(path)
    keeper.note(FIRST, ENDS, SIZE, is_last=True)
    keeper.end(outcome(Verdict.COMPLETE))
    assert not os.path.exists(os.path.dirname(path))


def test_but_one_that_is_to_be_kept(path: str) -> None:
    keeper = keeper_at(path, keeps=True)
    keeper.note(FIRST, ENDS, SIZE, is_last=True)
    keeper.end(outcome(Verdict.COMPLETE))
    assert Journal.read(path).durable == [mib(0, 1)]


def test_but_one_that_lists_what_could_not_be_read(path: str) -> None:
    keeper = keeper_at(path)
    change = Change(durable=(mib(0, 1),), unreadable=(Range(512, 1024),))
    keeper.note(change, ENDS, SIZE, is_last=True)
    keeper.end(outcome(Verdict.COMPLETE))
    found = Journal.read(path)
    assert (found.durable, found.unreadable) == ([mib(0, 1)], [Range(512, 1024)])
    with Journal.open(path) as journal:
        again = Keeper(lambda: path, lambda *_: facts(), journal=journal)
        again.note(SECOND, ENDS, SIZE, is_last=True)
        again.end(outcome(Verdict.COMPLETE))
    assert Journal.read(path).unreadable == [Range(512, 1024)]


@pytest.mark.parametrize("verdict", [Verdict.PAUSED, Verdict.STOPPED, Verdict.FAILED, Verdict.UNFENCED])
def test_one_that_was_asked_for_is_there_however_the_copy_ends_but_well(path: str, verdict: Verdict) -> None:
    keeper = keeper_at(path, is_wanted=True)
    keeper.begin(ENDS, SIZE, 0.0)
    keeper.end(outcome(verdict))
    assert keeper.path == path
    assert Journal.read(path).durable == []
    with Journal.open(path) as journal:
        assert journal.epoch == 2


def test_a_pause_leaves_one_that_nobody_asked_for_too(path: str) -> None:
    keeper = keeper_at(path)
    keeper.begin(ENDS, SIZE, 0.0)
    keeper.end(outcome(Verdict.PAUSED))
    assert Journal.read(path).state is JournalState.PAUSED


@pytest.mark.parametrize("verdict", [Verdict.STOPPED, Verdict.FAILED, Verdict.COMPLETE])
def test_no_other_end_leaves_one_in_which_nothing_is_durable(path: str, verdict: Verdict) -> None:
    keeper = keeper_at(path)
    keeper.begin(ENDS, SIZE, 0.0)
    keeper.look(1e9)
    keeper.end(outcome(verdict))
    assert not os.path.exists(os.path.dirname(path))


@pytest.mark.parametrize("verdict", [Verdict.PAUSED, Verdict.FAILED])
def test_a_copy_that_never_began_leaves_none(path: str, verdict: Verdict) -> None:
    keeper = keeper_at(path, is_wanted=True)
    keeper.look(1e9)
    keeper.end(outcome(verdict))
    assert not os.path.exists(os.path.dirname(path))


def test_one_that_was_asked_for_is_made_while_the_copy_goes_on_but_not_at_once(path: str) -> None:
    keeper = keeper_at(path, is_wanted=True)
    keeper.begin(ENDS, SIZE, 100.0)
    keeper.look(100.0 + JOURNAL_DELAY_SECONDS / 2)
    assert not os.path.exists(path)
    keeper.look(100.0 + JOURNAL_DELAY_SECONDS)
    assert os.path.exists(path)
    keeper.end(outcome(Verdict.COMPLETE))
    assert not os.path.exists(path)


def test_one_that_was_asked_for_and_cannot_be_made_ends_the_copy_then() -> None:
    keeper = keeper_at("/dev/null/job.journal", is_wanted=True)
    keeper.begin(ENDS, SIZE, 0.0)
    with pytest.raises(UserError, match="the journal cannot be made"):
        keeper.look(1.0)
    keeper.look(2.0)  # once is enough
    keeper.end(outcome(Verdict.FAILED))
    assert keeper.path == ""


def test_one_that_cannot_be_made_at_the_end_is_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    keeper = keeper_at("/dev/null/job.journal")
    keeper.begin(ENDS, SIZE, 0.0)
    keeper.end(outcome(Verdict.PAUSED))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("the copy cannot be resumed")
    assert keeper.path == ""


def test_what_is_written_down_is_seen_by_others_soon_after(path: str) -> None:
    keeper = keeper_at(path)
    keeper.begin(ENDS, SIZE, 0.0)
    keeper.note(FIRST, ENDS, SIZE)
    keeper.look(1.0)
    with program(LOOK, path) as process:
        assert answer(process) == "1"
    keeper.note(SECOND, ENDS, SIZE)
    keeper.look(1.0)  # not again at once
    with program(LOOK, path) as process:
        assert answer(process) == "1"
    keeper.look(1e9)
    with program(LOOK, path) as process:
        assert answer(process) == "2"
    keeper.end(outcome(Verdict.COMPLETE))


def test_who_resumes_lets_go_of_what_was_held_when_the_copy_begins(path: str) -> None:
    let_go: list[str] = []
    with Journal.create(path, facts()) as journal:
        keeper = Keeper(lambda: path, lambda *_: facts(), journal=journal, let_go=lambda: let_go.append("let go"))
        assert (let_go, keeper.has_begun) == ([], False)
        keeper.begin(ENDS, SIZE, 0.0)
        assert (let_go, keeper.has_begun) == (["let go"], True)


def test_what_is_demoted_is_not_listed_any_more(path: str) -> None:
    keeper = keeper_at(path, is_wanted=True)
    keeper.note(Change(durable=(mib(0, 2),), unreadable=(Range(512, 1024), mib(1, 2))), ENDS, SIZE)
    keeper.note(Change(demoted=(mib(0, 1),)), ENDS, SIZE)
    keeper.end(outcome(Verdict.STOPPED))
    assert Journal.read(path).unreadable == [mib(1, 2)]


def test_without_a_place_for_it_the_copy_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    keeper = keeper_at("/dev/null/job.journal")
    for change in (FIRST, SECOND):
        keeper.note(change, ENDS, SIZE)
    (line,) = capfd.readouterr().err.splitlines()
    assert "the journal cannot be made" in line
    assert line.endswith("the copy goes on, but cannot be resumed")
    assert keeper.path == ""


def test_a_journal_that_was_asked_for_and_cannot_be_made_ends_the_copy() -> None:
    with pytest.raises(UserError, match="the journal cannot be made"):
        keeper_at("/dev/null/job.journal", is_wanted=True).note(FIRST, ENDS, SIZE)


def test_a_journal_that_cannot_be_written_does_not_end_the_copy(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    keeper = keeper_at(path, is_wanted=True)
    keeper.note(FIRST, ENDS, SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        keeper.note(SECOND, ENDS, SIZE)
        keeper.note(THIRD, ENDS, SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capfd.readouterr().err.splitlines()
    assert "the journal cannot be written" in line
    keeper.end(outcome(Verdict.STOPPED))
    assert Journal.read(path).durable == [mib(0, 1)]


def test_what_was_durable_while_there_was_no_room_is_written_when_there_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "small") as folder:
        path = str(folder / "job.journal")
        keeper = keeper_at(path)
        keeper.note(FIRST, ENDS, SIZE)
        many = Change(durable=tuple(mib(n, n + 1) for n in range(100, 900, 2)))
        filler = folder / "filler"
        fill(filler)
        keeper.note(many, ENDS, SIZE)
        keeper.note(SECOND, ENDS, SIZE)
        filler.unlink()
        keeper.note(THIRD, ENDS, SIZE)
        full, again = capfd.readouterr().err.splitlines()
        assert "there is no room left for the journal" in full
        assert again.endswith("the journal could be written again")
        keeper.end(outcome(Verdict.PAUSED))
        assert Journal.read(path).durable_bytes == 403 * MIB


def with_leaves(start: int) -> Change:
    """The MiB at `start` is durable, and this is the digest of its first leaf."""
    return Change(durable=(mib(start, start + 1),), leaves=(LeafRun(start * MIB, b"\1" * 32),))


def test_without_room_nothing_is_written_later_that_has_lost_its_digests(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "small") as folder:
        path = str(folder / "job.journal")
        keeper = keeper_at(path, has_leaves=True)
        keeper.note(with_leaves(0), ENDS, SIZE)
        filler = folder / "filler"
        fill(filler)
        for start in range(2, 102, 2):
            keeper.note(with_leaves(start), ENDS, SIZE)
        filler.unlink()
        keeper.note(with_leaves(200), ENDS, SIZE)
        full, again = capfd.readouterr().err.splitlines()
        assert "there is no room left for the journal" in full
        assert again.endswith("the journal could be written again")
        keeper.end(outcome(Verdict.PAUSED))
        with Journal.open(path) as journal:
            written = journal.durable
            starts = [run.start for run in journal.leaves(Range(0, SIZE))]
        assert mib(200, 201) in written
        assert len(written) < 52
        assert starts == [piece.start for piece in written]


def test_a_journal_that_claims_too_much_and_has_digests_ends_the_copy(path: str) -> None:
    keeper = keeper_at(path, has_leaves=True)
    keeper.note(with_leaves(0), ENDS, SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="it is removed, and the digests in it"):
            keeper.note(Change(demoted=(mib(0, 1),)), ENDS, SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.path.exists(path)
