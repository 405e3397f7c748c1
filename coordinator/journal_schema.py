"""The journal's format: an SQLite database of four tables, and what is checked before a word of it is believed.

::

    job         one row: the facts, the epoch, the state, the times, and the seal
    durable     a row for each durable range [start_byte, end_byte), ordered, disjoint, never adjacent
    unreadable  the same for the ranges that the source could not read: the destination has zeroes there
    leaves      digests of what is durable, in a job with a checksum: coordinator/journal_leaves.py

SQLite finds a broken structure, but keeps no checksums of the pages: a flipped bit in a number goes unseen. So the
job's row carries tallies, for each other table how much it holds and a mark of all its rows, and a seal, a digest over
the whole row. The mark is the XOR of one digest a range, so that a commit costs what it changes and not what there is.
Whoever needs some of the tables only compares those with their tallies: a look leaves the digests out, which may be
gigabytes.

The write-ahead log has checksums, but SQLite takes what is behind a broken one for never written. A lost `record` only
means more to copy; a lost demotion would mean data that nobody copies. So what takes something back is folded into the
database file at once (`fold`), where the seal covers it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.logs import printable
from nbdshard.common.ranges import Range
from nbdshard.coordinator import journal_leaves
from nbdshard.coordinator.journal_facts import JobFacts, JournalState, decode_facts
from nbdshard.coordinator.journal_tally import Tallies, Tally

APPLICATION_ID: Final = 0x6E626473  # "nbds": file(1) and other programs tell it apart by this
FORMAT_VERSION: Final = 4
LOG_SUFFIX: Final = "-wal"
DURABLE: Final = "durable"  # the tables of ranges
UNREADABLE: Final = "unreadable"

_TABLES: Final = (
    "CREATE TABLE job (facts TEXT NOT NULL, epoch INTEGER NOT NULL, state TEXT NOT NULL, created_ns INTEGER NOT NULL, "
    "opened_ns INTEGER NOT NULL, changed_ns INTEGER NOT NULL, tallies TEXT NOT NULL, seal BLOB NOT NULL)",
    "CREATE TABLE leaves (start_byte INTEGER PRIMARY KEY, digests BLOB NOT NULL)",
    *(
        f"CREATE TABLE {table} (start_byte INTEGER PRIMARY KEY, end_byte INTEGER NOT NULL)"
        for table in (UNREADABLE, DURABLE)  # what matters more is last: a page that was cut off shows
    ),
)
_MAGIC: Final = b"SQLite format 3\0"  # https://sqlite.org/fileformat2.html, section 1.3: the header of 100 bytes
_HEADER: Final = struct.Struct(">16s44xI4xI28x")  # magic, user_version at 60, application_id at 68
# Section 1.4, "The Lock-Byte Page": every lock of SQLite is within these bytes.
_LOCK_START: Final = 0x40000000
_LOCK_LENGTH: Final = 512
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_BROKEN_SEAL: Final = "the seal does not match what it holds"
_ANEW: Final = "start the copy anew, with another journal"


class DamagedJournal(UserError):
    """The journal cannot be believed. `reason` goes into the line; it may be in SQLite's words, with damage in them."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the journal is damaged: {printable(reason)}", path, _ANEW)


class JournalInUse(UserError):
    """Somebody else has the journal locked: process `pid`, if that is known."""

    def __init__(self, path: str, pid: int | None = None) -> None:
        who = f" (process {pid})" if pid else ""
        what = f"the journal is in use by a running copy{who}"
        super().__init__(what, path, "stop that one first, or let it finish")
        self.pid = pid


class JobRow(msgspec.Struct, frozen=True):
    """The job's row without its tallies and its seal. Times in nanoseconds since 1970."""

    facts_text: str
    epoch: int
    state: str
    created_ns: int
    opened_ns: int
    changed_ns: int


class Contents(msgspec.Struct, frozen=True):
    """A journal that passed every check."""

    row: JobRow
    facts: JobFacts
    state: JournalState
    tallies: Tallies


def seal(row: JobRow, tallies: Tallies) -> bytes:
    """A digest over the job's row, and by its tallies over everything the journal holds."""
    words = (row.facts_text, row.epoch, row.state, row.created_ns, row.opened_ns, row.changed_ns)
    whole = repr((FORMAT_VERSION, *words, tallies.as_text()))
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=32).digest()


# -- the file, before SQLite sees it -----------------------------------------------------------------------------------


def check_header(path: str, header: bytes) -> None:
    """Refuse what is not a journal of ours by its first 100 bytes, before anything changes it. Raises UserError."""
    if not header:
        raise UserError("holds no job: the command that made it ended at once", path, "remove it")
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError("is not a journal of nbdshard", path)
    _, version, application = _HEADER.unpack(header[: _HEADER.size])
    if application != APPLICATION_ID:
        raise UserError("is not a journal of nbdshard but another program's database", path)
    _check_version(path, version)


def _check_version(path: str, version: int) -> None:
    if version != FORMAT_VERSION:
        what = f"is a journal of format {version}, and this nbdshard knows format {FORMAT_VERSION}"
        raise UserError(what, path, "use the version of nbdshard that made it")


def read_header(descriptor: int) -> bytes:
    """The bytes `check_header` looks at. Raises OSError."""
    return os.pread(descriptor, _HEADER.size, 0)


def holder(descriptor: int) -> int | None:
    """The pid of a process that has the database locked; 0 if it is not to be seen from here; None if there is none.

    Of another process: a lock of our own is not told (fcntl(2), F_GETLK).
    """
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK_START, _LOCK_LENGTH, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else max(pid, 0)


# -- errors ------------------------------------------------------------------------------------------------------------


def cannot(path: str, doing: str, reason: str | None) -> UserError:
    return UserError(f"the journal cannot be {doing}: {reason}", path)


@contextlib.contextmanager
def told(path: str, doing: str) -> Iterator[None]:
    """SQLite's and the system's errors inside leave as one UserError each; `doing` is "opened", "written" ..."""
    try:
        yield
    except sqlite3.Error as error:
        raise explain(error, path, doing) from error
    except UnicodeDecodeError as error:  # Python's, about a line of SQLite's that quotes what is damaged
        raise DamagedJournal(path, "SQLite cannot read its tables") from error
    except OSError as error:
        raise cannot(path, doing, error.strerror) from error


def explain(error: sqlite3.Error, path: str, doing: str) -> UserError:
    """The line for the user that SQLite's `error` means."""
    match primary_code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return JournalInUse(path)
        case sqlite3.SQLITE_FULL:
            return UserError("there is no room left for the journal", path, "make room on its file system")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:  # the file itself was looked at
            return cannot(path, doing, "its folder or file system cannot be written")
        case sqlite3.SQLITE_NOMEM:
            return cannot(path, doing, str(error))
        case sqlite3.SQLITE_IOERR:
            return cannot(path, doing, f"{error} ({error.sqlite_errorname})")
        case _:
            return DamagedJournal(path, str(error))


def primary_code(error: sqlite3.Error) -> int:
    """Without what extends it (https://sqlite.org/rescode.html); 0 for an error of Python's own about a value."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


# -- the database ------------------------------------------------------------------------------------------------------


def connect(real_path: str) -> sqlite3.Connection:
    """A connection to an existing file, locked for nobody else from its first use to its end. Raises sqlite3.Error.

    EXCLUSIVE before the first look also means that no shared memory is needed: no file besides the log
    (https://sqlite.org/wal.html, section 8). Nothing is waited for.
    """
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(real_path))}?mode=rw", timeout=0, isolation_level=None, uri=True
    )
    try:
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "cell_size_check=ON"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def look_into(real_path: str) -> sqlite3.Connection:
    """A connection that reads the database file as it is: no lock, no log, not a byte written. Raises sqlite3.Error.

    "immutable" promises SQLite that nobody writes to the file meanwhile (https://sqlite.org/uri.html). Somebody may:
    what is read then may not hold together, which the seal and the tallies tell.
    """
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(real_path))}?mode=ro&immutable=1", isolation_level=None, uri=True
    )
    try:
        connection.execute("PRAGMA cell_size_check=ON").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def write_first(connection: sqlite3.Connection, row: JobRow) -> None:
    """Make an empty database a journal, in one transaction. Raises sqlite3.Error."""
    connection.execute("BEGIN EXCLUSIVE")
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")
    for table in _TABLES:
        connection.execute(table)
    values = (row.facts_text, row.epoch, row.state, row.created_ns, row.opened_ns, row.changed_ns)
    none = Tallies()
    connection.execute("INSERT INTO job VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, none.as_text(), seal(row, none)))
    connection.execute("COMMIT")


def fold(connection: sqlite3.Connection) -> bool:
    """Move what the log holds into the database file; whether that worked. Never raises: the log is as durable."""
    with contextlib.suppress(sqlite3.Error):
        fold_or_raise(connection)
        return True
    return False


def fold_or_raise(connection: sqlite3.Connection) -> None:
    """As `fold`, which this is without its mercy. Raises sqlite3.Error."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def load(connection: sqlite3.Connection, path: str, *, digests: bool = True) -> Contents:
    """What the journal holds, checked; not `digests`: but for those of the leaves, which are not looked at.

    Raises UserError, DamagedJournal among them, and sqlite3.Error.
    """
    _check_structure(connection, path, whole=digests)
    row, tallies = _load_job(connection, path)
    durable, last_durable = _load_ranges(connection, path, DURABLE)
    unreadable, last_unreadable = _load_ranges(connection, path, UNREADABLE)
    leaves, last_leaf = tallies.leaves, 0
    if digests:
        try:
            leaves, last_leaf = journal_leaves.load(connection)
        except ValueError as error:
            raise DamagedJournal(path, str(error)) from None
    if Tallies(durable, unreadable, leaves) != tallies:
        raise DamagedJournal(path, _BROKEN_SEAL)
    try:
        facts, state = decode_facts(row.facts_text), JournalState(row.state)
    except ValueError as error:  # sealed by a journal's writer, so not damage
        raise UserError(f"the journal holds what this nbdshard does not know: {error}", path) from None
    last = max(last_durable, last_unreadable, last_leaf)
    if last > facts.size:
        raise DamagedJournal(path, f"a range ends at {last}, the job at {facts.size}")
    return Contents(row, facts, state, tallies)


def _load_job(connection: sqlite3.Connection, path: str) -> tuple[JobRow, Tallies]:
    """The job's row, under its seal."""
    jobs = connection.execute("SELECT * FROM job").fetchall()
    if len(jobs) != 1:
        raise DamagedJournal(path, f"it holds {len(jobs)} jobs")
    *values, tallied, found = jobs[0]
    if [type(value) for value in (*values, tallied)] != [str, int, str, int, int, int, str]:
        raise DamagedJournal(path, "the job's row has values of wrong types")
    row = JobRow(*values)
    try:
        tallies = Tallies.from_text(tallied)
    except ValueError:
        raise DamagedJournal(path, _BROKEN_SEAL) from None
    if seal(row, tallies) != found:
        raise DamagedJournal(path, _BROKEN_SEAL)
    return row, tallies


def _load_ranges(connection: sqlite3.Connection, path: str, table: str) -> tuple[Tally, int]:
    """What the table has, and where its last range ends."""
    tally, last = Tally(), -1
    for start, end in connection.execute(f"SELECT start_byte, end_byte FROM {table} ORDER BY start_byte"):
        if not (isinstance(end, int) and last < start < end and start >= 0):
            raise DamagedJournal(path, f"the range [{start}, {end}) of {table} is out of order")
        tally = tally.plus(start, end)
        last = end
    return tally, last


def check_ranges(path: str, tallies: Tallies, durable: Iterable[Range], unreadable: Iterable[Range]) -> None:
    """Raise DamagedJournal unless these are what the tallies say."""
    for pieces, expected in ((durable, tallies.durable), (unreadable, tallies.unreadable)):
        tally = Tally()
        for piece in pieces:
            tally = tally.plus(piece.start, piece.end)
        if tally != expected:
            raise DamagedJournal(path, _BROKEN_SEAL)


def _check_structure(connection: sqlite3.Connection, path: str, *, whole: bool) -> None:
    """`whole`: of all tables, free pages and leaves too."""
    _check_version(path, connection.execute("PRAGMA user_version").fetchone()[0])
    if tuple(sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master ORDER BY rowid")) != _TABLES:
        raise DamagedJournal(path, "its tables are not those of a journal")
    for what in ("1",) if whole else ("job", DURABLE, UNREADABLE):
        problem = connection.execute(f"PRAGMA integrity_check({what})").fetchone()[0]
        if problem != "ok":
            raise DamagedJournal(path, str(problem))


# -- tables of ranges --------------------------------------------------------------------------------------------------


def join(connection: sqlite3.Connection, table: str, piece: Range, tally: Tally) -> Tally:
    """Add `piece`, joined with the rows it overlaps or touches. In a transaction; raises sqlite3.Error."""
    rows = _touching(connection, table, piece)
    if len(rows) == 1 and rows[0][0] <= piece.start and piece.end <= rows[0][1]:
        return tally
    start = min([piece.start, *(row[0] for row in rows)])
    end = max([piece.end, *(row[1] for row in rows)])
    return _insert(connection, table, start, end, _delete(connection, table, rows, tally))


def cut(connection: sqlite3.Connection, table: str, piece: Range, tally: Tally) -> Tally:
    """Take `piece` out of the rows it overlaps. In a transaction; raises sqlite3.Error."""
    rows = _touching(connection, table, piece)
    rows = [(start, end) for start, end in rows if start < piece.end and piece.start < end]
    tally = _delete(connection, table, rows, tally)
    for start, end in rows:
        if start < piece.start:
            tally = _insert(connection, table, start, piece.start, tally)
        if piece.end < end:
            tally = _insert(connection, table, piece.end, end, tally)
    return tally


def _touching(connection: sqlite3.Connection, table: str, piece: Range) -> list[tuple[int, int]]:
    """Rows that overlap or adjoin `piece`. Rows are disjoint: no row before the last one that starts before it does."""
    return connection.execute(
        f"SELECT start_byte, end_byte FROM {table} WHERE start_byte <= :end AND end_byte >= :start AND start_byte >= "
        f"coalesce((SELECT max(start_byte) FROM {table} WHERE start_byte <= :start), 0) ORDER BY start_byte",
        {"start": piece.start, "end": piece.end},
    ).fetchall()


def _delete(connection: sqlite3.Connection, table: str, rows: list[tuple[int, int]], tally: Tally) -> Tally:
    for start, end in rows:
        tally = tally.minus(start, end)
    if rows:
        connection.execute(f"DELETE FROM {table} WHERE start_byte BETWEEN ? AND ?", (rows[0][0], rows[-1][0]))
    return tally


def _insert(connection: sqlite3.Connection, table: str, start: int, end: int, tally: Tally) -> Tally:
    connection.execute(f"INSERT INTO {table} VALUES (?, ?)", (start, end))
    return tally.plus(start, end)
