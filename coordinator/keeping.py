"""What becomes of a job's journal in one run: made when there is something to keep, and taken away when all is done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import FOLD_PAUSE_FACTOR, FOLD_SECONDS_MIN, JOURNAL_DELAY_SECONDS
from nbdshard.common.messages import EndpointDescription, LeafRun
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator import instructions
from nbdshard.coordinator.job import Outcome, Verdict

if TYPE_CHECKING:  # loading it takes as long as a small copy, which ends without a journal
    from nbdshard.coordinator.journal import Journal
    from nbdshard.coordinator.journal_facts import JobFacts

Ends = tuple[EndpointDescription, EndpointDescription]  # source and destination
Describe = Callable[[EndpointDescription, EndpointDescription, int], "JobFacts"]  # source, destination, size in bytes
_RESUMABLE: Final = (Verdict.PAUSED, Verdict.STOPPED, Verdict.FAILED, Verdict.DIFFERENT, Verdict.UNFENCED)


class Keeper:
    """The journal of one run.

    It is made with the first range that is durable; before that only when it was asked for and the copy has gone on for
    a moment, or when the job ends in a way that bids to go on with it. A copy that is complete by then makes none, so a
    short one is not slowed down by files.

    A copy goes on without a journal rather than not at all: when nobody asked for one and it cannot be made, and when
    it cannot be written in the middle (its file system is full). The user is told once. What is durable meanwhile is
    written down when that is possible again; but not in a job with a checksum, whose digests are not kept for that.
    """

    def __init__(
        self,
        locate: Callable[[], str],
        describe: Describe,
        *,
        journal: Journal | None = None,
        keeps: bool = False,
        is_wanted: bool = False,
        has_leaves: bool = False,
        let_go: Callable[[], None] | None = None,
    ) -> None:
        """`locate`: where a new one is to be; may raise UserError. `journal`: that of an earlier run, already open.

        `keeps`: also when the job is complete; one that lists what could not be read is kept in any case. `is_wanted`:
        the user asked for it, and does not want to copy without. `has_leaves`: what is durable comes with its digests.
        `let_go`: to be called once the workers have both ends open.
        """
        self._locate = locate
        self._describe = describe
        self._journal = journal
        self._keeps = keeps
        self._is_wanted = is_wanted
        self._has_leaves = has_leaves
        self._let_go = let_go
        self._begun: tuple[Ends, int, float] | None = None  # the ends, the size, and when they were known
        self._fold_at = 0.0
        self._is_given_up = False
        self._is_behind = False  # the last try to write it failed
        self._unwritten = RangeSet()  # durable, and not in the journal, because it could not be written
        self._unlisted = RangeSet()  # what the source could not read, and the journal does not say so yet
        if journal is not None and journal.unreadable:
            self._keeps = True

    @property
    def path(self) -> str:
        """Where the journal is; "" while there is none to resume from."""
        return self._journal.path if self._journal is not None else ""

    @property
    def place(self) -> str:
        """Where it is or will be, as an absolute path; "" if there is no place."""
        with suppress(UserError):
            return os.path.abspath(self.path or self._locate())
        return ""

    @property
    def has_begun(self) -> bool:
        return self._begun is not None

    def begin(self, ends: Ends, size: int, now: float) -> None:
        """Both ends are open, and the copy begins: from now on there is something to resume."""
        self._begun = (ends, size, now)
        if self._let_go is not None:
            self._let_go()

    def look(self, now: float) -> None:
        """A turn of the loop. Raises UserError when a journal that is wanted cannot be made.

        So that others can look at the journal, its log is folded in once in a while: so seldom that it does not matter.
        """
        if self._journal is None:
            if self._begun is not None and self._is_wanted and not self._is_given_up:
                ends, size, since = self._begun
                if now >= since + JOURNAL_DELAY_SECONDS:
                    self._begin_journal(ends, size)
        elif now >= self._fold_at:
            start = time.monotonic()
            self._journal.fold()
            self._fold_at = now + max(FOLD_SECONDS_MIN, FOLD_PAUSE_FACTOR * (time.monotonic() - start))

    def resume(self) -> None:
        """The job goes on. Raises UserError when that cannot be written down."""
        if self._journal is not None:
            from nbdshard.coordinator.journal_facts import JournalState

            self._journal.set_state(JournalState.RUNNING)

    def note(
        self,
        change: instructions.Journal,
        ends: Ends,
        size: int,
        *,
        is_last: bool = False,
    ) -> None:
        """Carry out `change`: on the disk when this returns, or told to the user. `is_last`: the job is complete.

        Raises UserError when the job shall not go on: a journal that is wanted cannot be made, or one that claims too
        much cannot be removed.
        """
        if change.unreadable:
            self._keeps = True  # the list of it is what is left to do
        if self._is_given_up or (is_last and not self._keeps):
            return
        for piece in change.demoted:
            self._unwritten.remove(piece)
            self._unlisted.remove(piece)
        if self._journal is None:
            if not (change.durable or change.unreadable):
                return
            try:
                self._begin_journal(ends, size)
            except UserError as error:
                if self._is_wanted:
                    raise
                logs.warning(f"{error}; the copy goes on, but cannot be resumed")
                return
        assert self._journal is not None
        if change.demoted:
            try:
                self._journal.demote(change.demoted)
            except UserError as error:
                journal, self._journal, self._is_given_up = self._journal, None, True
                journal.remove()  # it says more than is true; to remove it takes no room
                if self._has_leaves:  # without those of an earlier run there would be no checksum
                    raise UserError(f"{error}; it is removed, and the digests in it") from None
                logs.warning(f"{error}; it is removed, and the copy goes on, but cannot be resumed")
                return
        self._record(self._journal, change.durable, change.unreadable, change.leaves)

    def _begin_journal(self, ends: Ends, size: int) -> None:
        from nbdshard.coordinator.journal import Journal

        try:
            self._journal = Journal.create(self._locate(), self._describe(*ends, size))
        except UserError:
            self._is_given_up = True
            raise

    def _begin_late(self, verdict: Verdict) -> None:
        """Make the journal of a job that ends with nothing durable, if the user is to go on with it."""
        if self._begun is None or self._is_given_up or verdict not in _RESUMABLE:
            return
        if self._is_wanted or verdict is Verdict.PAUSED:
            ends, size, _ = self._begun
            try:
                self._begin_journal(ends, size)
            except UserError as error:
                logs.warning(f"{error}; the copy cannot be resumed")

    def _record(
        self,
        journal: Journal,
        durable: Iterable[Range] = (),
        unreadable: Iterable[Range] = (),
        leaves: Iterable[LeafRun] = (),
    ) -> None:
        for piece in durable:
            self._unwritten.add(piece)
        for piece in unreadable:
            self._unlisted.add(piece)
        if not (self._unwritten or self._unlisted):
            return
        try:
            journal.record(self._unwritten, self._unlisted, leaves)
        except UserError as error:
            if not self._is_behind:
                logs.warning(f"{error}; the copy goes on, but if it is resumed, what is copied now is copied again")
            self._is_behind = True
            if self._has_leaves:
                self._unwritten = RangeSet()  # to be copied again: nothing may be in the journal without its digests
        else:
            self._unwritten, self._unlisted = RangeSet(), RangeSet()
            if self._is_behind:
                logs.warning(f"{journal.path}: the journal could be written again")
            self._is_behind = False

    def end(self, outcome: Outcome) -> None:
        """The job is over: leave the journal as its end bids. Never raises; what could not be done is told."""
        if self._journal is None:
            self._begin_late(outcome.verdict)
        journal = self._journal
        if journal is None:
            return
        from nbdshard.coordinator.journal_facts import JournalState

        states = {
            Verdict.COMPLETE: JournalState.COMPLETE,
            Verdict.PAUSED: JournalState.PAUSED,
            Verdict.STOPPED: JournalState.PAUSED,
            Verdict.DIFFERENT: JournalState.FAILED,
            Verdict.FAILED: JournalState.FAILED,
            Verdict.UNFENCED: JournalState.FAILED,
        }
        try:
            if outcome.verdict is Verdict.COMPLETE and not self._keeps:
                self._journal = None
                journal.remove()
            else:
                self._record(journal)
                journal.set_state(states[outcome.verdict])
        except UserError as error:
            logs.warning(str(error))
        finally:
            journal.close()
