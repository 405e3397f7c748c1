"""What becomes of a job's journal in one run: made when there is something to keep, and taken away when all is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.messages import EndpointDescription, LeafRun
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator import instructions
from nbdshard.coordinator.job import Outcome, Verdict

if TYPE_CHECKING:  # loading it takes as long as a small copy, which ends without a journal
    from nbdshard.coordinator.journal import Journal
    from nbdshard.coordinator.journal_facts import JobFacts

Describe = Callable[[EndpointDescription, EndpointDescription, int], "JobFacts"]  # source, destination, size in bytes


class Keeper:
    """The journal of one run.

    It is made with the first range that is durable: where nothing is durable nothing can be resumed. A copy that is
    complete by then makes none, so a short one is not slowed down by files.

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
    ) -> None:
        """`locate`: where a new one is to be; may raise UserError. `journal`: that of an earlier run, already open.

        `keeps`: also when the job is complete; one that lists what could not be read is kept in any case. `is_wanted`:
        the user asked for it, and does not want to copy without. `has_leaves`: what is durable comes with its digests.
        """
        self._locate = locate
        self._describe = describe
        self._journal = journal
        self._keeps = keeps
        self._is_wanted = is_wanted
        self._has_leaves = has_leaves
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

    def resume(self) -> None:
        """The job goes on. Raises UserError when that cannot be written down."""
        if self._journal is not None:
            from nbdshard.coordinator.journal_facts import JournalState

            self._journal.set_state(JournalState.RUNNING)

    def note(
        self,
        change: instructions.Journal,
        ends: tuple[EndpointDescription, EndpointDescription],
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
                self._journal = self._make(ends, size)
            except UserError as error:
                self._is_given_up = True
                if self._is_wanted:
                    raise
                logs.warning(f"{error}; the copy goes on, but cannot be resumed")
                return
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

    def _make(self, ends: tuple[EndpointDescription, EndpointDescription], size: int) -> Journal:
        from nbdshard.coordinator.journal import Journal

        return Journal.create(self._locate(), self._describe(*ends, size))

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
