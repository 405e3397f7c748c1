"""Journals that cannot be believed, processes that die, full disks: refused with one line, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import BugError, UserError
from nbdshard.common.ranges import Range
from nbdshard.coordinator import journal_schema as schema
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JournalState, encode_facts
from nbdshard.coordinator.journal_tally import Tallies, Tally
from support.journals import PROCESS_SECONDS, answer, facts, fill, mib, program, small_disk
from support.servers import private_folder
from support.unprivileged import as_lonely_user

KILLS = 8
FLIPS = 1500
ADVICE = "start the copy anew, with another journal"

RECORD = """
import sys
from nbdshard.common.ranges import Range
from nbdshard.coordinator.journal import Journal
journal = Journal.open(sys.argv[1])
first = int(sys.argv[2])
for n in range(first, 100_000):
    journal.record([Range.of(3 * n * 4096, 4096), Range.of((3 * n + 1) * 4096, 512)])
    if n % 2:
        journal.demote([Range.of((3 * n + 1) * 4096, 512)])
    print(n, flush=True)
"""

CREATE = """
import sys
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import decode_facts
facts = decode_facts(sys.argv[3])
for n in range(100_000):
    Journal.create(f"{sys.argv[1]}/{sys.argv[2]}-{n}.journal", facts).close()
    print("made", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "job.journal")


@pytest.fixture
def written(path: str) -> str:
    """A journal with a few ranges, of epoch 1."""
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 16), mib(256, 384), mib(512, 513)])
        journal.set_state(JournalState.PAUSED)
    return path


def both_refuse(path: str) -> str:
    """The one line with which both a run and a look are refused."""
    lines = []
    for look in (Journal.open, Journal.read):
        with pytest.raises(UserError) as caught:
            look(path)
        assert caught.value.where == path
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    return lines[0]


def refused(action: Callable[[], object]) -> str:
    """The line with which `action` is refused."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "it was not refused"


def edit(path: str, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


# -- what is no journal ------------------------------------------------------------------------------------------------


def test_a_missing_journal_is_told(path: str) -> None:
    assert both_refuse(path) == f"{path}: there is no such journal; `nbdshard jobs` lists those there are"
    assert not os.path.exists(path)


@pytest.mark.parametrize("content", [b"x", b"# Mapfile. Created by GNU ddrescue\n" * 100, bytes(8192)])
def test_another_file_is_refused_and_left_alone(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    assert both_refuse(path) == f"{path}: is not a journal of nbdshard"
    assert Path(path).read_bytes() == content


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_file_is_refused_without_waiting(path: str, make: Callable[[str], None]) -> None:
    make(path)
    assert both_refuse(path) == f"{path}: is not a journal of nbdshard"


def test_an_empty_file_is_what_a_command_leaves_that_died_at_once(path: str) -> None:
    Path(path).touch()
    assert both_refuse(path) == f"{path}: holds no job: the command that made it ended at once; remove it"


def test_another_programs_database_is_refused_and_left_alone(path: str, tmp_path: Path) -> None:
    edit(path, "PRAGMA journal_mode=WAL", "CREATE TABLE job (facts)", "PRAGMA application_id=1")
    before = Path(path).read_bytes()
    assert both_refuse(path) == f"{path}: is not a journal of nbdshard but another program's database"
    assert Path(path).read_bytes() == before
    assert list(tmp_path.iterdir()) == [Path(path)]


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5])
def test_another_format_is_refused_and_both_are_named(written: str, version: int) -> None:
    edit(written, f"PRAGMA user_version={version}")
    assert both_refuse(written) == (
        f"{written}: is a journal of format {version}, and this nbdshard knows format 4; "
        "use the version of nbdshard that made it"
    )


# -- what is damaged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", [
    "UPDATE job SET state = 'complete'",
    "UPDATE job SET epoch = 7",
    "UPDATE job SET changed_ns = changed_ns + 1",
    "UPDATE job SET tallies = '[[0,0,0],[0,0,0],[0,0,0]]'",
    "UPDATE job SET tallies = '[[0,0,0],[0,0,0]]'",
    "UPDATE job SET tallies = '['",
    "UPDATE job SET facts = replace(facts, 'source.example', 'sourse.example')",
    "DELETE FROM durable WHERE start_byte > 0",
    "INSERT INTO durable VALUES (900000000, 900000001)",
    "UPDATE durable SET end_byte = end_byte + 4096 WHERE start_byte = 0",
])  # fmt: skip
def test_whatever_was_changed_behind_our_back_breaks_the_seal(written: str, statement: str) -> None:
    edit(written, statement)
    assert both_refuse(written) == f"{written}: the journal is damaged: the seal does not match what it holds; {ADVICE}"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("DELETE FROM job", "it holds 0 jobs"),
        ("INSERT INTO job SELECT * FROM job", "it holds 2 jobs"),
        ("UPDATE job SET epoch = 'one'", "the job's row has values of wrong types"),
        ("UPDATE job SET facts = CAST(facts AS BLOB)", "the job's row has values of wrong types"),
        ("UPDATE job SET tallies = CAST(tallies AS BLOB)", "the job's row has values of wrong types"),
        ("INSERT INTO durable VALUES (10, 20)", "the range [10, 20) of durable is out of order"),
        ("INSERT INTO durable VALUES (9000000, 16777217)", "the range [9000000, 16777217) of durable is out of order"),
        ("INSERT INTO durable VALUES (-10, -5)", "the range [-10, -5) of durable is out of order"),
        ("INSERT INTO durable VALUES (9000001, 9000001)", "the range [9000001, 9000001) of durable is out of order"),
        ("INSERT INTO durable VALUES (900000001, 'end')", "the range [900000001, end) of durable is out of order"),
        ("INSERT INTO unreadable VALUES (7000, 7000)", "the range [7000, 7000) of unreadable is out of order"),
        ("INSERT INTO unreadable VALUES (4096, 8192)", "the seal does not match what it holds"),
        ("CREATE INDEX extra ON durable (end_byte)", "its tables are not those of a journal"),
        ("DROP TABLE durable", "its tables are not those of a journal"),
    ],
)  # fmt: skip
def test_what_no_journal_holds_is_told(written: str, statement: str, reason: str) -> None:
    edit(written, statement)
    assert both_refuse(written) == f"{written}: the journal is damaged: {reason}; {ADVICE}"


def sealed(path: str, statement: str) -> None:
    """Change a journal as another version of nbdshard might: with a seal that fits."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)
        row = schema.JobRow(*connection.execute("SELECT * FROM job").fetchone()[:-2])
        tallies = []
        for table in (schema.DURABLE, schema.UNREADABLE):
            tally = Tally()
            for start, end in connection.execute(f"SELECT * FROM {table}"):
                tally = tally.plus(start, end)
            tallies.append(tally)
        whole = Tallies(*tallies)
        connection.execute("UPDATE job SET tallies = ?, seal = ?", (whole.as_text(), schema.seal(row, whole)))


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("UPDATE job SET state = 'asleep'", "'asleep' is not a valid JournalState"),
        ("UPDATE job SET facts = replace(facts, 'uuid', 'guid')", "Object contains unknown field `guid`"),
        ("UPDATE job SET facts = '['", "Expecting value: line 1 column 2 (char 1)"),
    ],
)
def test_what_only_another_version_knows_is_refused_by_its_name(written: str, statement: str, line: str) -> None:
    sealed(written, statement)
    assert both_refuse(written) == f"{written}: the journal holds what this nbdshard does not know: {line}"


@pytest.mark.parametrize("table", ["durable", "unreadable"])
def test_a_range_beyond_the_end_of_the_job_is_never_believed(written: str, table: str) -> None:
    sealed(written, f"INSERT INTO {table} VALUES (1048575999, 1048576001)")
    assert both_refuse(written) == (
        f"{written}: the journal is damaged: a range ends at 1048576001, the job at 1048576000; {ADVICE}"
    )


def test_a_truncated_journal_is_refused_wherever_it_was_cut(written: str) -> None:
    whole = Path(written).read_bytes()
    for length in range(1, len(whole), 509):
        Path(written).write_bytes(whole[:length])
        for look in (Journal.open, Journal.read):  # a run looks for more, and may find more
            line = refused(lambda look=look: look(written))
            assert "is not a journal of nbdshard" in line if length < 100 else "the journal is damaged: " in line, line


def flipped(whole: bytes, place: int, generator: random.Random) -> bytes:
    """`whole` with one bit of the byte at `place` the other way."""
    return whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :]


def believed(path: str) -> object:
    """What a run takes from the journal."""
    with Journal.open(path) as journal:
        return (journal.facts, journal.epoch, journal.state, journal.durable)


def test_a_flipped_bit_is_refused_or_changes_nothing(written: str, seed: int) -> None:
    """Anywhere in the file: what is not refused is free space, or what SQLite does not look at."""
    generator = random.Random(seed)
    whole = Path(written).read_bytes()
    truth = Journal.read(written)
    used = [place for place, byte in enumerate(whole) if byte]
    count = 0
    for place in [*generator.sample(used, min(FLIPS, len(used))), *generator.sample(range(len(whole)), 100)]:
        Path(written).write_bytes(flipped(whole, place, generator))
        found: list[object] = []
        line = refused(lambda found=found: found.append(believed(written)))
        if found:
            assert found == [(truth.facts, truth.epoch + 1, truth.state, truth.durable)], f"byte {place}"
        else:
            assert line.startswith(f"{written}: ")
            assert line.isprintable()
            count += 1
    assert count > len(used) // 2


def test_a_damaged_log_means_more_to_copy_and_never_less(path: str, seed: int) -> None:
    """SQLite takes what follows a broken record of its log for never written. So a demotion does not stay in there."""
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 100)])
        journal.demote([mib(10, 20)])
        for n in range(200, 220, 2):
            journal.record([mib(n, n + 1), mib(n + 500, n + 501)])
        truth = journal.durable
        whole, log = Path(path).read_bytes(), Path(path + "-wal").read_bytes()
    generator = random.Random(seed)
    counts = set()
    for place in generator.sample(range(len(log)), 200):
        Path(path).write_bytes(whole)
        Path(path + "-wal").write_bytes(flipped(log, place, generator))
        with Journal.open(path) as journal:
            assert journal.epoch == 2
            assert all(any(piece in one for one in truth) for piece in journal.durable)
            assert mib(20, 100) in journal.durable
            counts.add(len(journal.durable))
    assert len(counts) > 5


def test_a_log_that_was_cut_short_means_more_to_copy_and_never_less(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 100)])
        for n in range(200, 220, 2):
            journal.record([mib(n, n + 1), mib(n + 500, n + 501)])
        truth = journal.durable
        whole, log = Path(path).read_bytes(), Path(path + "-wal").read_bytes()
    counts = []
    for length in range(0, len(log) + 1, 1021):
        Path(path).write_bytes(whole)
        Path(path + "-wal").write_bytes(log[:length])
        with Journal.open(path) as journal:
            assert journal.epoch == 2
            assert all(any(piece in one for one in truth) for piece in journal.durable)
            counts.append(journal.durable_bytes)
    assert counts == sorted(counts)
    assert len(set(counts)) > 5


# -- processes that die ------------------------------------------------------------------------------------------------


def ranges_of(n: int, demoted: bool) -> Range:
    """What RECORD leaves of its step `n`, as one range."""
    return Range.of(3 * n * 4096, 4096 if demoted else 4096 + 512)


def test_what_was_committed_survives_a_kill_at_any_moment(path: str, seed: int) -> None:
    generator = random.Random(seed)
    with Journal.create(path, facts(1 << 40)):
        pass
    done = 0
    for life in range(KILLS):
        with program(RECORD, path, str(done)) as process:
            for _ in range(generator.randrange(1, 120)):
                done = int(answer(process)) + 1
            process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            for line in process.stdout.read().decode().splitlines(keepends=True):
                done = int(line) + 1 if line.endswith("\n") else done
            process.wait(PROCESS_SECONDS)
        acknowledged = [ranges_of(n, demoted=n % 2 == 1) for n in range(done)]
        begun = [ranges_of(done, demoted=False)], [ranges_of(done, demoted=True)]
        found = Journal.read(path)
        assert found.holder is None
        assert found.epoch == life + 2
        assert found.durable in (acknowledged, *(acknowledged + one for one in begun))
    with Journal.open(path) as journal:
        assert journal.durable == found.durable


def test_a_kill_leaves_no_journal_half_made(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    for life in range(KILLS):
        with program(CREATE, tmp_path, str(life), encode_facts(facts())) as process:
            assert answer(process) == "made"
            for _ in range(generator.randrange(20)):
                answer(process)
            process.kill()
            process.wait(PROCESS_SECONDS)
    made = list(tmp_path.glob("*.journal"))
    assert len(made) >= KILLS
    for path in made:
        with Journal.open(str(path)) as journal:
            assert (journal.epoch, journal.durable) == (2, [])


def test_a_run_looked_at_all_the_time_is_never_seen_in_pieces(path: str) -> None:
    """It folds its log in far more often than a copy does, so that many looks are taken in the middle of that."""
    with Journal.create(path, facts(1 << 40)):
        pass
    with program(RECORD.replace("print(", "n % 8 or journal.fold(); print("), path, "0") as process:
        least = 0
        for _ in range(40):
            done = int(answer(process))
            least = done + 1 if done % 8 == 0 else least
            found = Journal.read(path)
            assert found.holder == process.pid
            assert len(found.durable) >= least
            assert found.durable == [ranges_of(n, demoted=n % 2 == 1) for n in range(len(found.durable))]


# -- no room, no right -------------------------------------------------------------------------------------------------


def test_a_full_disk_changes_nothing_and_after_room_was_made_the_journal_goes_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as folder:
        path = str(folder / "job.journal")
        line = f"{path}: there is no room left for the journal; make room on its file system"
        with Journal.create(path, facts()) as journal:
            journal.record([mib(0, 1)])
            fill(folder / "filler")
            for _ in range(2):
                with pytest.raises(UserError) as caught:
                    journal.record(mib(2 * n, 2 * n + 1) for n in range(400))
                assert str(caught.value) == line
                assert journal.durable == [mib(0, 1)]
            (folder / "filler").unlink()
            journal.record([mib(1, 2)])
            assert journal.durable == [mib(0, 2)]
        assert Journal.read(path).durable == [mib(0, 2)]


def test_no_journal_is_left_where_there_is_no_room_for_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as folder:
        fill(folder / "filler")
        path = str(folder / "job.journal")
        with pytest.raises(UserError, match="there is no room left for the journal"):
            Journal.create(path, facts())
        assert list(folder.iterdir()) == [folder / "filler"]


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail: Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_after_a_write_that_failed_for_another_reason_the_journal_takes_nothing_more(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 1)])
        line = f"{path}: the journal cannot be written: disk I/O error (SQLITE_IOERR_WRITE)"
        with files_end_at(20_000), pytest.raises(UserError) as caught:
            journal.record(mib(2 * n, 2 * n + 1) for n in range(400))
        assert str(caught.value) == line
        changes: list[Callable[[], None]] = [
            lambda: journal.record([mib(0, 1)]),
            lambda: journal.demote([mib(0, 1)]),
            lambda: journal.set_state(JournalState.FAILED),
        ]
        for change in changes:
            with pytest.raises(UserError) as caught:
                change()
            assert str(caught.value) == line
        assert journal.durable == [mib(0, 1)]
    assert Journal.read(path).durable == [mib(0, 1)]


def test_an_iterator_that_fails_leaves_the_journal_as_it_was(written: str) -> None:
    def ranges() -> Iterator[Range]:
        yield mib(800, 900)
        raise KeyboardInterrupt

    with Journal.open(written) as journal:
        before = journal.durable
        with pytest.raises(KeyboardInterrupt):
            journal.record(ranges())
        assert journal.durable == before
        journal.record([mib(900, 901)])
    assert Journal.read(written).durable == [*before, mib(900, 901)]


def test_a_journal_that_was_changed_while_it_is_held_is_sealed_no_more(written: str) -> None:
    with Journal.open(written) as journal:
        journal._connection.execute("UPDATE job SET seal = x'00'")
        with pytest.raises(BugError) as caught:
            journal.record([mib(800, 900)])
        assert str(caught.value) == f"{written}: the journal is not as it was left"
        with pytest.raises(UserError) as refusal:
            journal.record([mib(800, 900)])
        assert str(refusal.value) == f"{written}: the journal cannot be written: interrupted by BugError"
    assert "the seal does not match" in both_refuse(written)


def test_a_journal_that_another_program_is_looking_into_is_in_use(written: str) -> None:
    with contextlib.closing(sqlite3.connect(written, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        line = refused(lambda: Journal.open(written))
    assert line == f"{written}: the journal is in use by a running copy; stop that one first, or let it finish"


def test_a_lack_of_memory_is_not_taken_for_damage(written: str) -> None:
    error = sqlite3.OperationalError("out of memory")
    error.sqlite_errorcode = sqlite3.SQLITE_NOMEM
    assert str(schema.explain(error, written, "opened")) == f"{written}: the journal cannot be opened: out of memory"


def test_a_folder_one_may_not_write_to_is_told() -> None:
    with private_folder() as folder:
        folder.chmod(0o755)
        for path in (f"{folder}/job.journal", f"{folder}/state/job.journal"):
            with as_lonely_user(lambda path=path: refused(lambda: Journal.create(path, facts()))) as line:
                assert line == f"{path}: the journal cannot be made: Permission denied"
        assert list(folder.iterdir()) == []


def test_a_journal_one_may_look_at_but_not_write_is_told() -> None:
    with private_folder() as folder:
        path = f"{folder}/job.journal"
        with Journal.create(path, facts()) as journal:
            journal.record([mib(0, 1)])
        folder.chmod(0o755)
        os.chmod(path, 0o644)
        with as_lonely_user(lambda: refused(lambda: Journal.open(path))) as line:
            assert line == f"{path}: the journal cannot be opened: Permission denied"
        os.chmod(path, 0o666)
        with as_lonely_user(lambda: refused(lambda: Journal.open(path))) as line:
            assert line == f"{path}: the journal cannot be opened: its folder or file system cannot be written"
        os.chmod(path, 0o600)
        with as_lonely_user(lambda: refused(lambda: Journal.read(path))) as line:
            assert line == f"{path}: the journal cannot be read: Permission denied"


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    path = f"{tmp_path}/state/job.journal"
    with pytest.raises(UserError) as caught:
        Journal.create(path, facts())
    assert str(caught.value) == f"{path}: the journal cannot be made: Not a directory"
