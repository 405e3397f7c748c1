"""The journal of a job: what it remembers, who may have it, and that an error changes nothing."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdshard.common.errors import BugError, UserError
from nbdshard.common.limits import MIB
from nbdshard.common.messages import JobOptions
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JournalState, ResultOptions, decode_facts, encode_facts
from support import seccomp
from support.journals import HOLD, LOOK, PROCESS_SECONDS, answer, facts, held_by_others, mib, program

OPEN = """
import sys
from nbdshard.common.errors import UserError
from nbdshard.coordinator.journal import Journal
try:
    Journal.open(sys.argv[1])
except UserError as error:
    print(error, flush=True)
"""
CREATE = """
import sys
from nbdshard.common.errors import UserError
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import decode_facts
try:
    Journal.create(sys.argv[1], decode_facts(sys.argv[2])).close()
    print("made")
except UserError as error:
    print(error)
"""
DIE_WHEN_MADE = """
import os, sys
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import decode_facts
seen = []
def look(event, arguments):
    if event == "os.link":
        seen.append(event)
    elif seen:
        os._exit(1)
sys.addaudithook(look)
Journal.create(sys.argv[1], decode_facts(sys.argv[2]))
"""
RECORD_AND_DIE = """
import os, sys
from nbdshard.common.ranges import Range
from nbdshard.coordinator.journal import Journal
Journal.open(sys.argv[1]).record([Range(0, 1 << 20)])
os._exit(1)
"""
SQLITE = """
import sqlite3, sys
try:
    print(sqlite3.connect(sys.argv[1], timeout=0).execute("SELECT count(*) FROM durable").fetchall(), flush=True)
except sqlite3.OperationalError as error:
    print(error, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "job.journal")


class Clock:
    """Nanoseconds that go by one at each look."""

    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        self.now += 1
        return self.now


# -- what it remembers -------------------------------------------------------------------------------------------------


def test_a_new_journal_is_of_epoch_1_and_running(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        assert (journal.epoch, journal.state, journal.durable) == (1, JournalState.RUNNING, [])
        assert journal.facts == facts()


def test_everything_is_there_again_and_each_run_has_a_higher_epoch(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 128), mib(256, 384)])
        journal.set_state(JournalState.PAUSED)
    for epoch in (2, 3):
        with Journal.open(path) as journal:
            assert journal.epoch == epoch
            assert journal.state is JournalState.PAUSED
            assert journal.facts == facts()
            assert journal.durable == [mib(0, 128), mib(256, 384)]
            assert journal.durable_bytes == 256 << 20


def test_the_times_of_making_opening_and_changing_are_kept(path: str) -> None:
    with Journal.create(path, facts(), clock=Clock(100)) as journal:
        journal.record([mib(0, 1)])
    first = Journal.read(path)
    assert (first.created_ns, first.opened_ns, first.changed_ns) == (101, 101, 102)
    with Journal.open(path, clock=Clock(200)):
        pass
    second = Journal.read(path)
    assert (second.created_ns, second.opened_ns, second.changed_ns) == (101, 201, 202)


def test_ranges_that_touch_or_overlap_become_one(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 10), mib(20, 30)])
        journal.record([mib(10, 20)])
        assert journal.durable == [mib(0, 30)]
        journal.record([mib(40, 50), mib(60, 70), mib(25, 65)])
        assert journal.durable == [mib(0, 70)]


def test_a_hundred_thousand_ranges_next_to_one_another_are_one_row(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record(Range.of(n * 4096, 4096) for n in range(100_000))
        assert journal.durable == [Range(0, 100_000 * 4096)]
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM durable").fetchall() == [(1,)]
    other.close()


def test_recording_what_is_durable_already_writes_nothing(path: str) -> None:
    with Journal.create(path, facts(), clock=Clock(0)) as journal:
        journal.record([mib(0, 10)])
        before = Path(path + "-wal").stat().st_size
        journal.record([mib(0, 10), mib(2, 3)])
        journal.record([])
        assert journal.durable == [mib(0, 10)]
        assert Path(path + "-wal").stat().st_size == before


def test_what_is_demoted_is_durable_no_longer(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 100), mib(200, 300)])
        journal.demote([mib(10, 20), mib(90, 210), mib(500, 600)])
        left = [mib(0, 10), mib(20, 90), mib(210, 300)]
        assert journal.durable == left
        journal.demote([mib(10, 20)])
        assert journal.durable == left
    with Journal.open(path) as journal:
        assert journal.durable == left


def test_what_could_not_be_read_is_kept_until_it_is_read_or_demoted(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 4)], [Range(0, 512), mib(1, 2), mib(3, 4)])
        journal.record([], [mib(900, 901)])
        journal.record([mib(1, 2)])
        journal.demote([mib(3, 4)])
    with Journal.open(path) as journal:
        assert journal.durable == [mib(0, 3)]
        assert journal.unreadable == [Range(0, 512), mib(900, 901)]
        journal.record([mib(3, 5)], [Range(3 * MIB, 3 * MIB + 512)])
    found = Journal.read(path)
    assert found.unreadable == [Range(0, 512), Range(3 * MIB, 3 * MIB + 512), mib(900, 901)]
    assert (found.durable, found.unreadable_bytes) == ([mib(0, 5)], MIB + 1024)


def test_an_unreadable_place_beyond_the_end_is_a_fault_of_ours(path: str) -> None:
    with Journal.create(path, facts()) as journal, pytest.raises(BugError):
        journal.record([mib(0, 1)], [mib(1000, 1001)])


def test_the_last_byte_may_be_durable_and_none_after_it(path: str) -> None:
    with Journal.create(path, facts(size=1000)) as journal:
        journal.record([Range(999, 1000)])
        with pytest.raises(BugError, match=r"\[999, 1001\) is not within the job's 1000 bytes"):
            journal.record([Range(0, 1), Range(999, 1001)])
        assert journal.durable == [Range(999, 1000)]


def test_a_job_of_no_bytes_and_one_of_the_most_have_journals(tmp_path: Path) -> None:
    for size in (0, (1 << 63) - 1):
        path = str(tmp_path / str(size))
        with Journal.create(path, facts(size)) as journal:
            journal.record([Range(size - 5, size)] if size else [])
        assert Journal.read(path).durable_bytes == min(size, 5)


pieces = st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda t: Range.of(*t))
steps = st.lists(st.tuples(st.sampled_from(["record", "demote", "reopen", "look"]), st.lists(pieces, max_size=4)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_any_sequence_of_changes_leaves_what_a_set_of_ranges_would_hold(tmp_path: Path, steps: list) -> None:  # type: ignore[type-arg]
    path = str(tmp_path / os.urandom(8).hex())
    journal = Journal.create(path, facts(size=72))
    expected = RangeSet()
    try:
        for what, ranges in steps:
            match what:
                case "record":
                    journal.record(ranges)
                    for piece in ranges:
                        expected.add(piece)
                case "demote":
                    journal.demote(ranges)
                    for piece in ranges:
                        expected.remove(piece)
                case "reopen":
                    journal.close()
                    journal = Journal.open(path)
            assert journal.durable == list(expected)
            assert journal.durable_bytes == expected.total
    finally:
        journal.close()
    assert Journal.read(path).durable == list(expected)


# -- facts -------------------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_utf_8_comes_back_as_it_was(path: str) -> None:
    odd = msgspec.structs.replace(facts().source, named=os.fsdecode(b"/srv/\xff\xfe disk"))
    whole = msgspec.structs.replace(facts(), source=odd)
    assert decode_facts(encode_facts(whole)) == whole
    with Journal.create(path, whole):
        pass
    assert Journal.read(path).facts == whole


def test_the_options_that_change_the_result_are_taken_from_those_of_the_job() -> None:
    options = JobOptions(
        1 << 20, 64, 16 << 20, 65536, allocated=True, destination_is_zero=True, extents=False, flush=False
    )
    assert ResultOptions.of(options) == ResultOptions(65536, True, True, False, False)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('"uuid":', '"guid":', "Object contains unknown field `guid`"),
        ('"allocated":true', '"allocated":1', "Expected `bool`, got `int` - at `$.options.allocated`"),
        ('"named":"disk.img",', "", "Object missing required field `named` - at `$.destinations[0]`"),
        ('"inode":77', '"inode":-7', "Expected `int` >= 0 - at `$.destinations[0].local.inode`"),
    ],
)
def test_facts_that_are_not_understood_are_refused_by_their_path(old: str, new: str, line: str) -> None:
    text = encode_facts(facts())
    assert text.count(old) == 1
    with pytest.raises(ValueError) as caught:
        decode_facts(text.replace(old, new))
    assert str(caught.value) == line


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_is_for_its_user_alone_and_so_are_the_folders_that_were_missing(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "state" / "nbdshard" / "job.journal"
    before = os.umask(0)
    try:
        with Journal.create(str(path), facts()) as journal:
            journal.record([mib(0, 1)])
            files = [path, path.with_name("job.journal-wal")]
            assert sorted(path.parent.iterdir()) == files
            assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
            folders = [path.parent, path.parent.parent, tmp_path]
            assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700, 0o700, 0o755]
    finally:
        os.umask(before)
    assert list(path.parent.iterdir()) == [path]


def test_every_commit_is_synchronous_and_logged_ahead(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        connection = journal._connection
        full = 2
        assert connection.execute("PRAGMA synchronous").fetchone() == (full,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_name_means_nothing_to_sqlite(tmp_path: Path) -> None:
    for name in ("a?mode=memory", "b#c", "%41", "d e", os.fsdecode(b"\xff")):
        path = str(tmp_path / name)
        with Journal.create(path, facts()) as journal:
            journal.record([mib(0, 1)])
        assert Journal.read(path).durable == [mib(0, 1)]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_relative_path_and_a_link_mean_the_same_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other/job.journal")
    with Journal.create("other/job.journal", facts()) as journal:
        journal.record([mib(0, 1)])
        journal.fold()
        assert held_by_others(LOOK, "link") == f"running 1 1 {os.getpid()}"
    with Journal.open("link") as journal:
        assert journal.durable == [mib(0, 1)]


def test_a_new_journal_takes_the_place_of_no_file(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(UserError) as caught:
        Journal.create(path, facts())
    assert str(caught.value) == (
        f"{path}: there is a file already; go on with that job by --resume, or name another journal"
    )
    assert Path(path).read_text() == "mine"


def test_without_hard_links_a_journal_is_made_too(path: str) -> None:
    """As on a FAT; and it takes the place of no file there either."""
    encoded = encode_facts(facts())
    for said in ("made", "there is a file already"):
        assert said in seccomp.without(CREATE, path, encoded, refused=("link", "linkat"))
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    assert Journal.read(path).facts == facts()


def test_a_log_left_by_another_journal_of_that_name_is_none_of_the_new_one(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 1)])
        log = Path(path + "-wal").read_bytes()
    Path(path).unlink()
    Path(path + "-wal").write_bytes(log)
    with Journal.create(path, facts()):
        pass
    assert Journal.read(path).durable == []


def test_a_journal_that_is_done_with_leaves_nothing(path: str, tmp_path: Path) -> None:
    journal = Journal.create(path, facts())
    journal.record([mib(0, 1)])
    journal.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError) as caught:
        journal.remove()
    assert str(caught.value) == f"{path}: the journal cannot be removed: No such file or directory"


def test_closing_twice_lets_go_of_nothing_else(path: str) -> None:
    first = Journal.create(path, facts())
    first.close()
    with Journal.open(path):
        first.close()
        with pytest.raises(UserError, match="in use"):
            Journal.open(path)


# -- one run at a time -------------------------------------------------------------------------------------------------


def in_use(path: str, pid: int) -> str:
    return f"{path}: the journal is in use by a running copy (process {pid}); stop that one first, or let it finish"


def test_a_second_coordinator_is_refused_and_told_who_has_the_journal(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        assert held_by_others(OPEN, path) == in_use(path, os.getpid())
        journal.record([mib(0, 1)])
        assert held_by_others(OPEN, path) == in_use(path, os.getpid())
    with program(HOLD, path) as process:
        assert answer(process) == "open"
        with pytest.raises(UserError) as caught:
            Journal.open(path)
        assert str(caught.value) == in_use(path, process.pid)
    with Journal.open(path) as journal:  # it was killed
        assert journal.epoch == 3


def test_other_programs_are_kept_out_of_a_journal_in_use(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 1)])
        assert held_by_others(SQLITE, path) == "database is locked"
    assert held_by_others(SQLITE, path) == "[(1,)]"


def test_a_second_run_in_the_same_process_is_refused_and_the_first_keeps_its_lock(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        for again in (Journal.open, Journal.read):
            with pytest.raises(UserError) as caught:
                again(path)
            assert str(caught.value) == in_use(path, os.getpid())
        assert held_by_others(OPEN, path) == in_use(path, os.getpid())
        journal.record([mib(0, 1)])


def test_the_log_of_a_journal_that_was_removed_is_never_taken_for_that_of_the_next(path: str) -> None:
    Journal.create(path, facts()).close()
    with program(RECORD_AND_DIE, path) as process:
        process.wait(PROCESS_SECONDS)
    assert os.path.getsize(path + "-wal")
    os.unlink(path)  # by hand, and the log stays
    with program(DIE_WHEN_MADE, path, encode_facts(facts())) as process:
        process.wait(PROCESS_SECONDS)
    assert Journal.read(path).durable == []
