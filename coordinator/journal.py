"""The journal of a job on disk: what a coordinator needs to go on where another one died.

It remembers what the job is (`JobFacts`), how it stands, and which ranges are durable at the destination. Every change
is one transaction that is on the disk (fsync) when the call returns, which takes as long as the disk does.
coordinator/journal_schema.py describes the format.

A run has its journal to itself. SQLite's lock is the process's: a copy of the process (fork(2)) must not touch it, nor
may anybody in the process open and close the file in other ways (fcntl(2): that would drop the lock). So workers are
forked first, and the journal opened then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Final, Self

import msgspec

from nbdshard.common.errors import BugError, UserError
from nbdshard.common.limits import JOURNAL_PATIENCE_SECONDS
from nbdshard.common.messages import LeafRun
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator import journal_leaves
from nbdshard.coordinator import journal_schema as schema
from nbdshard.coordinator.journal_facts import JobFacts, JournalState, encode_facts
from nbdshard.coordinator.journal_tally import Tallies, Tally

READ_ATTEMPTS: Final = 20  # to read the file while a run does not fold its log in
_PATIENCE_STEP_SECONDS: Final = 0.02

Clock = Callable[[], int]  # nanoseconds since 1970
_held: set[tuple[int, int]] = set()  # device and inode of the journals this process has open


class Snapshot(msgspec.Struct, frozen=True):
    """A journal as it was at one moment, after a commit. Times in nanoseconds since 1970."""

    path: str
    facts: JobFacts
    epoch: int
    state: JournalState
    durable: list[Range]
    unreadable: list[Range]  # zeroes are at the destination for what the source could not read
    created_ns: int
    opened_ns: int  # when its last run began
    changed_ns: int
    holder: int | None  # pid of the run that has it open; 0 if that is not to be seen from here; None: nobody runs

    @property
    def durable_bytes(self) -> int:
        return sum(piece.length for piece in self.durable)

    @property
    def unreadable_bytes(self) -> int:
        return sum(piece.length for piece in self.unreadable)


class Journal:
    """A journal that this process holds. Made by `create` or `open`; a context manager that closes it."""

    def __init__(
        self, path: str, inode: tuple[int, int], connection: sqlite3.Connection, contents: schema.Contents, clock: Clock
    ) -> None:
        self.path = path
        self.facts = contents.facts
        self._inode = inode
        self._connection = connection
        self._row = contents.row
        self._tallies = contents.tallies
        self._clock = clock
        self._is_folded = True  # nothing of it is in the log only
        self._broken: UserError | None = None  # why nothing can be written any more
        self._closed = False
        _held.add(inode)

    # -- making and opening ----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str, facts: JobFacts, *, clock: Clock = time.time_ns) -> Journal:
        """A new journal, of epoch 1 and in state RUNNING, held by this process. Missing folders are made, of mode 0700.

        Raises UserError when there is one already, or none can be made; then nothing is left of it.
        """
        now = clock()
        row = schema.JobRow(encode_facts(facts), 1, JournalState.RUNNING.value, now, now, now)
        with schema.told(path, "made"):
            _make_folder(os.path.dirname(os.path.abspath(path)))
            _put_in_place(path, row)
            try:
                real_path = os.path.realpath(path)
                connection = schema.connect(real_path)
                try:
                    return cls(path, _inode(real_path), connection, schema.load(connection, path), clock)
                except BaseException:
                    connection.close()
                    raise
            except BaseException:
                _remove(path)
                raise

    @classmethod
    def open(cls, path: str, *, clock: Clock = time.time_ns) -> Journal:
        """The journal at `path`, checked, for another run: its epoch is raised, and on the disk, on return.

        The state is left as the last run left it. Raises UserError when it is missing, in use, of another format or
        not to be written, DamagedJournal when it is damaged; then it holds what it held.
        """
        with schema.told(path, "opened"):
            real_path = os.path.realpath(path)
            connection = _locked(path)
            try:
                journal = cls(path, _inode(real_path), connection, schema.load(connection, path), clock)
            except BaseException:
                connection.close()
                raise
        try:
            row = journal._row
            journal._write(msgspec.structs.replace(row, epoch=row.epoch + 1, opened_ns=clock()))
            journal.fold()
        except BaseException:
            journal.close()
            raise
        return journal

    @staticmethod
    def read(path: str) -> Snapshot:
        """Look at a journal, in use or not. Raises UserError and DamagedJournal as `open` does.

        The file is read where it is, without a lock and without the digests, so no run is held up. Of a journal in use
        this is what was folded in (`fold`), a moment ago as a rule. What a run that died left in its log is folded in
        first, as the next run would do. When something was written meanwhile, what was read may not hold together; the
        seal tells, and it is read again.
        """
        attempts = 0
        while True:
            attempts += 1
            with schema.told(path, "read"):
                pid = _who_holds(path)
                if pid is None:
                    _fold_in(path)
                try:
                    found = _snapshot(path)
                except UserError:
                    if (pid is None and _who_holds(path) is None) or attempts >= READ_ATTEMPTS:
                        raise
                    time.sleep(_PATIENCE_STEP_SECONDS)  # a disk may be slow to take what is folded in
                else:
                    after = _who_holds(path)
                    if after == pid or attempts >= READ_ATTEMPTS:
                        return msgspec.structs.replace(found, holder=after)

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self._row.epoch

    @property
    def state(self) -> JournalState:
        return JournalState(self._row.state)

    @property
    def durable(self) -> list[Range]:
        """The durable ranges, in order and merged: none touches another."""
        with schema.told(self.path, "read"):
            return _rows(self._connection, self.path, schema.DURABLE)

    @property
    def unreadable(self) -> list[Range]:
        """Where zeroes are for what the source could not read, in order and merged."""
        with schema.told(self.path, "read"):
            return _rows(self._connection, self.path, schema.UNREADABLE)

    def leaves(self, where: Range) -> list[LeafRun]:
        """The digests of what is durable in `where`, which begins where a leaf does, in a job with a checksum.

        In order; leaves that are left out are zeroes.
        """
        with schema.told(self.path, "read"):
            return journal_leaves.read(self._connection, where)

    @property
    def durable_bytes(self) -> int:
        return self._tallies.durable.total_bytes

    # -- changing it -----------------------------------------------------------------------------------------------

    def record(self, ranges: Iterable[Range], unreadable: Iterable[Range] = (), leaves: Iterable[LeafRun] = ()) -> None:
        """These ranges are durable now: all of them, or on an error none. What is durable already may be among them.

        Of them these are `unreadable`, and no others: zeroes are there for what the source could not read. There may be
        `unreadable` ranges besides where nothing is durable. `leaves`: the digests of `ranges`, if there
        is to be a checksum.

        Raises UserError when the journal cannot be written. It may be called again when only room was missing; after
        any other failure it will raise the same error, as will `demote` and `set_state`.
        """
        pieces, lost = self._checked(ranges), self._checked(unreadable)

        def edit(tallies: Tallies) -> Tallies:
            durable, unreadable, digests = tallies.durable, tallies.unreadable, tallies.leaves
            for piece in pieces:
                durable = schema.join(self._connection, schema.DURABLE, piece, durable)
                digests = self._without_leaves(piece, digests)
                if unreadable.count:  # an earlier run may have failed to read it
                    unreadable = schema.cut(self._connection, schema.UNREADABLE, piece, unreadable)
            for piece in lost:
                unreadable = schema.join(self._connection, schema.UNREADABLE, piece, unreadable)
            digests = journal_leaves.put(self._connection, leaves, digests)
            return Tallies(durable, unreadable, digests)

        self._write(self._row, edit)

    def demote(self, ranges: Iterable[Range]) -> None:
        """These ranges are durable no longer: as `record`, the other way round.

        If it raises, the journal goes on claiming what is not so: then `remove` it, which takes no room.
        """
        pieces = self._checked(ranges)

        def edit(tallies: Tallies) -> Tallies:
            durable, unreadable, digests = tallies.durable, tallies.unreadable, tallies.leaves
            for piece in pieces:
                digests = self._without_leaves(piece, digests)
                durable = schema.cut(self._connection, schema.DURABLE, piece, durable)
                unreadable = schema.cut(self._connection, schema.UNREADABLE, piece, unreadable)
            return Tallies(durable, unreadable, digests)

        if self._write(self._row, edit):
            self.fold()

    def fold(self) -> None:
        """Move what was committed into the database file, where a look sees it. Never raises: the log is as durable."""
        if not self._is_folded:
            self._is_folded = schema.fold(self._connection)

    def set_state(self, state: JournalState) -> None:
        """Remember how the job stands. Raises as `record` does."""
        self._write(msgspec.structs.replace(self._row, state=state.value))
        self.fold()

    def close(self) -> None:
        """Let go of the journal. Never raises; does nothing the second time."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            _held.discard(self._inode)

    def remove(self) -> None:
        """Close it and remove its file: the job is done with. Raises UserError when the file stays."""
        self.close()
        with schema.told(self.path, "removed"):
            _remove(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _without_leaves(self, piece: Range, tally: Tally) -> Tally:
        return journal_leaves.cut(self._connection, piece, tally) if tally.count else tally

    def _checked(self, ranges: Iterable[Range]) -> list[Range]:
        pieces = list(RangeSet(ranges))
        if pieces and pieces[-1].end > self.facts.size:
            raise BugError(f"{pieces[-1]} is not within the job's {self.facts.size} bytes")
        return pieces

    def _write(self, row: schema.JobRow, edit: Callable[[Tallies], Tallies] | None = None) -> bool:
        """Commit `row` and what `edit` does to the ranges; False if nothing changed. On an error nothing did."""
        if self._broken is not None:
            raise self._broken
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            tallies = edit(self._tallies) if edit is not None else self._tallies
            changed = row is not self._row or tallies != self._tallies
            if changed:
                row = msgspec.structs.replace(row, changed_ns=self._clock())
                self._seal(row, tallies)
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._undo(error)
            if isinstance(error, sqlite3.Error):
                raise schema.explain(error, self.path, "written") from error
            raise
        self._row, self._tallies = row, tallies
        self._is_folded = self._is_folded and not changed
        return changed

    def _seal(self, row: schema.JobRow, tallies: Tallies) -> None:
        """Write the job's row, in place of the one we know: never a seal over anything else."""
        values = (row.epoch, row.state, row.opened_ns, row.changed_ns, tallies.as_text(), schema.seal(row, tallies))
        done = self._connection.execute(
            "UPDATE job SET epoch = ?, state = ?, opened_ns = ?, changed_ns = ?, tallies = ?, seal = ? WHERE seal = ?",
            (*values, schema.seal(self._row, self._tallies)),
        )
        if done.rowcount != 1:
            raise BugError(f"{self.path}: the journal is not as it was left")

    def _undo(self, error: BaseException) -> None:
        """Roll back. Only a lack of room leaves the journal fit for another try: the kernel may tell of a write that
        was lost only once."""
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:  # SQLite may have rolled back itself
                self._connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            if schema.primary_code(error) != sqlite3.SQLITE_FULL:
                self._broken = schema.explain(error, self.path, "written")
        else:
            self._broken = schema.cannot(self.path, "written", f"interrupted by {type(error).__name__}")


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _looked_at(path: str, access: int) -> Iterator[tuple[int, int | None]]:
    """A descriptor of the file, if it seems to be a journal, and its `holder`. Raises UserError, OSError."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        raise UserError("there is no such journal", path, "`nbdshard jobs` lists those there are") from None
    if not stat.S_ISREG(facts.st_mode):
        raise UserError("is not a journal of nbdshard", path)
    if (facts.st_dev, facts.st_ino) in _held:  # before it is opened: closing it would drop the lock
        raise schema.JournalInUse(path, os.getpid())
    descriptor = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        schema.check_header(path, schema.read_header(descriptor))
        yield descriptor, schema.holder(descriptor)
    finally:
        os.close(descriptor)


def _inode(path: str) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def _make_folder(folder: str) -> None:
    """Make `folder` and what is missing above it, for our user alone. What is there already is left as it is."""
    if os.path.isdir(folder):
        return
    _make_folder(os.path.dirname(folder))
    with contextlib.suppress(FileExistsError):  # made just now by another command; or a file, which the next step tells
        os.mkdir(folder, 0o700)


def _put_in_place(path: str, row: schema.JobRow) -> None:
    """Make the file, under a name of its own, and call it `path` when it is whole: none is found half made, or with
    the log of another.

    Raises UserError if there is a file of that name, OSError, sqlite3.Error.
    """
    fresh = f"{path}.{os.getpid()}.new"
    try:
        os.close(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        with contextlib.closing(schema.connect(os.path.realpath(fresh))) as connection:
            schema.write_first(connection, row)
            schema.fold_or_raise(connection)
        is_free = not os.path.lexists(path)
        if is_free:
            _remove_logs(os.path.realpath(path))  # of a journal that is no more: it would be taken for this one's
        if not is_free or not _link(fresh, path):
            advice = "go on with that job by --resume, or name another journal"
            raise UserError("there is a file already", path, advice)
        _sync_folder(os.path.dirname(os.path.realpath(path)))
    finally:
        with contextlib.suppress(FileNotFoundError):
            _remove(fresh)


def _link(fresh: str, path: str) -> bool:
    """Give `fresh` the name `path`, too; False where that is taken. Raises OSError."""
    try:
        os.link(fresh, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.rename(fresh, path)  # a file system without links
    return True


def _sync_folder(folder: str) -> None:
    """Make the file's name durable; SQLite does so for its logs only."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    """The logs first: without its file a log would be taken for that of the next file of this name."""
    _remove_logs(os.path.realpath(path))
    os.unlink(path)


def _remove_logs(real_path: str) -> None:
    for suffix in (schema.LOG_SUFFIX, "-journal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(real_path + suffix)


def _who_holds(path: str) -> int | None:
    """As `schema.holder`. Raises UserError for what is no journal."""
    with _looked_at(path, os.O_RDONLY) as (_, pid):
        return pid


def _locked(path: str) -> sqlite3.Connection:
    """A connection to the journal at `path`, which nobody else has. Raises UserError, OSError, sqlite3.Error.

    Somebody who looks at it may have it for a moment (`_fold_in`); only who keeps it is a run.
    """
    until = time.monotonic() + JOURNAL_PATIENCE_SECONDS
    while True:
        try:
            with schema.told(path, "opened"):
                with _looked_at(path, os.O_RDWR) as (_, pid):
                    if pid is not None:
                        raise schema.JournalInUse(path, pid)
                return schema.connect(os.path.realpath(path))
        except schema.JournalInUse as error:
            if error.pid == os.getpid() or time.monotonic() >= until:
                raise
            time.sleep(_PATIENCE_STEP_SECONDS)


def _fold_in(path: str) -> None:
    """Bring what a run that died has left in its log into the database file. Raises UserError, OSError, sqlite3.Error.

    It is SQLite's recovery, under its lock, and adds and takes nothing.
    """
    real_path = os.path.realpath(path)
    try:
        if os.stat(real_path + schema.LOG_SUFFIX).st_size == 0:
            return
    except FileNotFoundError:
        return
    if not os.access(real_path, os.W_OK):
        what = "a run that died left a part of it in a log, which only who may write to it can fold in"
        raise UserError(what, path, "look at it as its user")
    try:
        with schema.told(path, "read"), contextlib.closing(schema.connect(real_path)) as connection:
            schema.fold_or_raise(connection)
    except schema.JournalInUse:  # the next run has just begun: it does the same
        return


def _snapshot(path: str) -> Snapshot:
    with schema.told(path, "read"), contextlib.closing(schema.look_into(os.path.realpath(path))) as connection:
        contents = schema.load(connection, path, digests=False)
        row = contents.row
        durable, unreadable = (_rows(connection, path, table) for table in (schema.DURABLE, schema.UNREADABLE))
        # They may have been read from the disk a second time, and nothing kept them as they were.
        schema.check_ranges(path, contents.tallies, durable, unreadable)
        times = (row.created_ns, row.opened_ns, row.changed_ns)
        return Snapshot(path, contents.facts, row.epoch, contents.state, durable, unreadable, *times, None)


def _rows(connection: sqlite3.Connection, path: str, table: str) -> list[Range]:
    rows = connection.execute(f"SELECT start_byte, end_byte FROM {table} ORDER BY start_byte")
    try:
        return [Range(*row) for row in rows]
    except (TypeError, ValueError):  # they were checked; so they were written to since
        raise schema.DamagedJournal(path, "its ranges are none") from None
