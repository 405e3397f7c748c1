"""What becomes of a job's journal in one run: made when there is something to keep, and taken away when all is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.messages import EndpointDescription
from nbdshard.coordinator import instructions
from nbdshard.coordinator.job import Outcome, Verdict

if TYPE_CHECKING:  # loading it takes as long as a small copy, which ends without a journal
    from nbdshard.coordinator.journal import Journal
    from nbdshard.coordinator.journal_facts import JobFacts

Describe = Callable[[EndpointDescription, EndpointDescription, int], "JobFacts"]  # source, destination, size in bytes


class Keeper:
    """The journal of one run.

    It is made with the first range that is durable: a copy that is over before that is not slowed down by files, and
    where nothing is durable nothing can be resumed.
    """

    def __init__(self, path: str, describe: Describe, *, journal: Journal | None = None, keeps: bool = False) -> None:
        """`journal`: that of an earlier run, already open. `keeps`: also when the job is complete."""
        self.path = path
        self._describe = describe
        self._journal = journal
        self._keeps = keeps

    @property
    def exists(self) -> bool:
        """Whether there is a journal to resume from."""
        return self._journal is not None

    def resume(self) -> None:
        """The job goes on. Raises UserError when that cannot be written down."""
        if self._journal is not None:
            from nbdshard.coordinator.journal_facts import JournalState

            self._journal.set_state(JournalState.RUNNING)

    def note(
        self, change: instructions.Journal, ends: tuple[EndpointDescription, EndpointDescription], size: int
    ) -> None:
        """Carry out `change`: on the disk when this returns. Raises UserError when it cannot be written."""
        if self._journal is None:
            if not change.durable:
                return
            from nbdshard.coordinator.journal import Journal

            self._journal = Journal.create(self.path, self._describe(*ends, size))
        if change.demoted:
            try:
                self._journal.demote(change.demoted)
            except UserError:
                self._journal.remove()  # it says more than is true; to remove it takes no room
                self._journal = None
                raise
        if change.durable:
            self._journal.record(change.durable)

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
            Verdict.FAILED: JournalState.FAILED,
            Verdict.UNFENCED: JournalState.FAILED,
        }
        try:
            if outcome.verdict is Verdict.COMPLETE and not self._keeps:
                self._journal = None
                journal.remove()
            else:
                journal.set_state(states[outcome.verdict])
        except UserError as error:
            logs.warning(str(error))
        finally:
            journal.close()
