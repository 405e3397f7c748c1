"""Who is to flush, and when; and which flushes have no answer yet. Pure.

::

    wrote  ->  awaits  ->  asked  ->  answered
               the checkpoint         (or lost with its connection: then nobody knows how it ended)

What a flush covers, and what follows when it fails, is not for here but for `copying.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from math import inf

from nbdshard.common.limits import (
    CHECKPOINT_ASKS_PER_TICK_MAX,
    COVERED_LEASES_MAX,
    FLUSH_BYTES_PER_SECOND,
    FLUSH_SECONDS,
)
from nbdshard.common.messages import Flush
from nbdshard.coordinator.crew import Crew, Outbox
from nbdshard.coordinator.job import Job
from nbdshard.coordinator.leases import Ledger
from nbdshard.coordinator.workers import FlushAsked, Worker


class Flushes:
    """Those of one job. `number`: of the last one sent; `unanswered`: without an answer, by worker, oldest first."""

    def __init__(self, job: Job, crew: Crew, outbox: Outbox, ledger: Ledger, *, can_flush: bool) -> None:
        self._job = job
        self._crew = crew
        self._outbox = outbox
        self._ledger = ledger
        self._can_flush = can_flush
        self.number = 0
        self.unanswered: OrderedDict[str, int] = OrderedDict()
        self._awaiting: OrderedDict[str, Worker] = OrderedDict()  # wrote something that no flush asked for covers
        self._checkpoint_at = inf  # counts while somebody is in `_awaiting`
        self._to_ask = 0  # workers that the checkpoint under way has still to ask
        self._bytes_written = 0  # since the last checkpoint

    @property
    def oldest_unanswered(self) -> float:
        """The number of the oldest flush without an answer; infinite if there is none."""
        return next(iter(self.unanswered.values()), inf)

    @property
    def is_full(self) -> bool:
        """Whether so much is covered and waits for an older flush that no new one is asked for."""
        return self._ledger.covered_count >= COVERED_LEASES_MAX

    def awaits(self, worker: Worker) -> bool:
        """Whether the next checkpoint asks `worker`."""
        return worker.identity in self._awaiting

    # -- who is to flush -----------------------------------------------------------------------------------------------

    def count(self, written: int) -> None:
        """So many bytes more are written: after a certain number of them there is a checkpoint."""
        self._bytes_written += written

    def wait(self, worker: Worker, now: float) -> None:
        """The next checkpoint asks `worker`."""
        if not self._awaiting:
            self._to_ask = 0
            self._checkpoint_at = now + self._job.checkpoint_seconds
        if self._bytes_written >= self._job.checkpoint_bytes:
            self._checkpoint_at = min(self._checkpoint_at, now)
        self._awaiting[worker.identity] = worker

    def forget(self, worker: Worker) -> None:
        """`worker` has nothing to flush any more."""
        self._awaiting.pop(worker.identity, None)

    def forget_all(self) -> None:
        """Nobody has anything to flush any more."""
        self._awaiting.clear()

    # -- asking --------------------------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """When `checkpoint` is due; infinite while nothing was written that no flush was asked for."""
        if not self._awaiting or self.is_full or not self._can_flush:
            return inf
        return self._checkpoint_at

    def checkpoint(self, now: float) -> None:
        """If it is time, ask those who wrote to flush: so many at once that others do not wait for a large crew."""
        if now < self.deadline():
            return
        if not self._to_ask:
            # All of them at about the same time: a server writes back once for all.
            self._to_ask = len(self._awaiting)
            self._bytes_written = 0
        for _ in range(min(self._to_ask, len(self._awaiting), CHECKPOINT_ASKS_PER_TICK_MAX)):
            _, worker = self._awaiting.popitem(last=False)
            self._ask(worker, now)
            self._to_ask -= 1
        if not self._to_ask:
            self._checkpoint_at = now + self._job.checkpoint_seconds  # of those who wrote again meanwhile

    def ask_all(self, now: float) -> None:
        """Have everything flushed that was written. Asks nobody twice for the same."""
        while self._awaiting:
            _, worker = self._awaiting.popitem(last=False)
            self._ask(worker, now)

    def ask(self, worker: Worker, now: float) -> None:
        """Have `worker` flush what it wrote, without waiting for the checkpoint."""
        self.forget(worker)
        self._ask(worker, now)

    def _ask(self, worker: Worker, now: float) -> None:
        assert worker.holding is not None
        self.number += 1
        # One server may have to write back what all of them wrote.
        seconds = FLUSH_SECONDS + self._ledger.unsettled_bytes / FLUSH_BYTES_PER_SECOND
        asked = FlushAsked(self.number, frozenset(worker.holding.written), now + seconds, seconds)
        self.unanswered[worker.identity] = self.number
        self._crew.flush_begins(worker, asked)
        self._outbox.send(worker, Flush(self._job.uuid, self._job.epoch, self.number))
