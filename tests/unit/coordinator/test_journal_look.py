"""Looks at journals: they take no lock and no copy, are in no run's way, and never believe half of one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.limits import MIB
from nbdshard.common.messages import LeafRun
from nbdshard.coordinator import journal_schema
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JournalState
from nbdshard.coordinator.journal_schema import DamagedJournal
from support.journals import HOLD, LOOK, answer, facts, fill, held_by_others, mib, program, small_disk
from support.servers import private_folder
from support.unprivileged import as_lonely_user

LOOK_WITHOUT_ROOM = f"""
import resource
import nbdshard.coordinator.journal
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
{LOOK}"""
RECORD_AND_STAY = """
import os, sys
from nbdshard.common.ranges import Range
from nbdshard.coordinator.journal import Journal
journal = Journal.open(sys.argv[1])
journal.record([Range(0, 1 << 20)])
print("recorded", flush=True)
sys.stdin.read(1)
os._exit(1)
"""
LOCK = """
import os, sys
from nbdshard.coordinator import journal_schema
connection = journal_schema.connect(sys.argv[1])
print("locked", flush=True)
sys.stdin.read(1)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "job.journal")


def test_what_could_not_be_folded_in_is_folded_in_the_next_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_connection: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 9)])
        with monkeypatch.context() as patch:
            patch.setattr(journal_schema, "fold_or_raise", fail)
            journal.fold()
        assert held_by_others(LOOK, path) == f"running 1 0 {os.getpid()}"
        journal.fold()
        assert held_by_others(LOOK, path) == f"running 1 9 {os.getpid()}"


def test_a_look_at_a_journal_in_use_sees_what_was_folded_in(path: str) -> None:
    with Journal.create(path, facts()) as journal:
        assert held_by_others(LOOK, path) == f"running 1 0 {os.getpid()}"
        journal.record([mib(0, 9)])
        assert held_by_others(LOOK, path) == f"running 1 0 {os.getpid()}"
        journal.fold()
        assert held_by_others(LOOK, path) == f"running 1 9 {os.getpid()}"
        journal.record([mib(9, 10)])
        journal.set_state(JournalState.PAUSED)
        assert held_by_others(LOOK, path) == f"paused 1 10 {os.getpid()}"
        journal.demote([mib(0, 3)])
        assert held_by_others(LOOK, path) == f"paused 1 7 {os.getpid()}"
    assert held_by_others(LOOK, path) == "paused 1 7 None"


def test_a_look_changes_nothing_and_leaves_nothing(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(private))
    with Journal.create(path, facts()) as journal:
        journal.record([mib(0, 1)])
    with program(HOLD, path) as process:
        assert answer(process) == "open"
    Path(path + "-wal").write_bytes(b"")  # as a run that was killed leaves it
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.glob("job*")}
    assert set(before) == {"job.journal", "job.journal-wal"}
    found = Journal.read(path)
    assert (found.epoch, found.durable, found.holder) == (2, [mib(0, 1)], None)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.glob("job*")} == before
    assert list(private.iterdir()) == []


def test_what_a_run_that_died_left_in_its_log_is_folded_in_by_a_look(path: str) -> None:
    with Journal.create(path, facts()):
        pass
    with program(RECORD_AND_STAY, path) as process:
        assert answer(process) == "recorded"
    log = Path(path + "-wal")
    assert log.stat().st_size > 0
    found = Journal.read(path)
    assert (found.state, found.durable, found.holder) == (JournalState.RUNNING, [mib(0, 1)], None)
    assert not log.exists()


def left_with_a_log(path: str) -> None:
    """A journal whose run died with what it had recorded in the log."""
    with Journal.create(path, facts()):
        pass
    with program(RECORD_AND_STAY, path) as process:
        assert answer(process) == "recorded"


def test_a_log_is_left_to_a_run_that_has_just_begun(path: str) -> None:
    left_with_a_log(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert Journal.read(path).durable == []
    assert Journal.read(path).durable == [mib(0, 1)]


def test_a_log_that_cannot_be_folded_in_is_told() -> None:
    with private_folder() as folder:
        path = f"{folder}/job.journal"
        left_with_a_log(path)
        folder.chmod(0o755)
        os.chmod(path, 0o644)
        with as_lonely_user(lambda: line_of(lambda: Journal.read(path))) as line:
            assert line == (
                f"{path}: a run that died left a part of it in a log, which only who may write to it can fold in; "
                "look at it as its user"
            )
        assert Journal.read(path).durable == [mib(0, 1)]


def test_without_room_a_log_is_left_for_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as folder:
        path = str(folder / "job.journal")
        with Journal.create(path, facts()):
            pass
        with program(
            RECORD_AND_STAY.replace("(0, 1 << 20)]", "(n << 20, n + 1 << 20) for n in range(0, 999, 2)]"), path
        ) as process:
            assert answer(process) == "recorded"
        fill(folder / "filler")
        assert line_of(lambda: Journal.read(path)) == (
            f"{path}: there is no room left for the journal; make room on its file system"
        )
        (folder / "filler").unlink()
        assert len(Journal.read(path).durable) == 500


def line_of(action: Callable[[], object]) -> str:
    """The line with which `action` is refused."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "it was not refused"


def test_a_look_takes_no_copy_neither_on_the_disk_nor_in_memory(path: str) -> None:
    with Journal.create(path, facts(1 << 40)) as journal:
        for n in range(16):
            journal.record([mib(32768 * n, 32768 * n + 32767)], leaves=[LeafRun(32768 * n * MIB, b"\1" * MIB)])
        journal.fold()
        assert os.path.getsize(path) > 16 * MIB
        assert held_by_others(LOOK_WITHOUT_ROOM, path) == f"running 1 {16 * 32767} {os.getpid()}"


def test_a_look_in_the_middle_of_a_fold_holds_nobody_up_for_long(path: str) -> None:
    """Who begins a run while somebody folds in the log of one that died waits for that."""
    with Journal.create(path, facts()):
        pass
    with program(LOCK, path) as process:
        assert answer(process) == "locked"
        ended = threading.Timer(0.1, process.kill)
        ended.start()
        with Journal.open(path) as journal:
            assert journal.epoch == 2
        ended.join()


def test_a_damaged_journal_is_refused_although_a_run_has_it_open(path: str) -> None:
    with Journal.create(path, facts()):
        pass
    with program(HOLD, path) as process:
        assert answer(process) == "open"
        whole = Path(path).read_bytes()
        place = whole.index(b"source.example")
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"S")
        with pytest.raises(DamagedJournal, match="the seal does not match"):
            Journal.read(path)
