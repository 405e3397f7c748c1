"""How fast a job may go, and which worker gets how much of it. Pure; time is an argument.

Every worker that holds a lease has an equal share; who has none gets nothing. One that has completed nothing for long,
because it is stopped or its server hangs, keeps a small share, so that it can show when it gets on again. Who has work
is looked at RATE_SHARE_SECONDS apart, and at once when the user says something else.

A share is lowered before another one is raised, and a new worker begins with nothing. So what all have been told never
adds up to more than the limit, and what they do exceeds it for no longer than a message is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from nbdshard.common.limits import RATE_SHARE_SECONDS, RATE_STALL_SECONDS, RATE_WEIGHT
from nbdshard.common.messages import Rate
from nbdshard.coordinator.crew import LIVE, Crew, Outbox
from nbdshard.coordinator.job import Job, Pace
from nbdshard.coordinator.states import WorkerState
from nbdshard.coordinator.workers import Worker


class Rates:
    """What each worker has been told of the job's rate. A job that never had one tells nobody anything."""

    def __init__(self, job: Job, crew: Crew, outbox: Outbox) -> None:
        self._job = job
        self._crew = crew
        self._outbox = outbox
        self._share_at = -inf
        self.pace = Pace(job.rate)

    @property
    def is_on(self) -> bool:
        """Whether the workers may not do as they like."""
        return self.pace.is_paused or self.pace.limit is not None

    def deadline(self) -> float:
        """When `share` is due; infinite while there is nothing to share."""
        is_idle = self.pace.is_paused or self.pace.limit is None or not self._crew.workers
        return inf if is_idle else self._share_at

    def set(self, pace: Pace, now: float) -> None:
        """The user wants it so."""
        if self.pace.is_paused and not pace.is_paused:
            for worker in self._crew.workers.values():
                worker.moved_at = now  # nobody could get on
        self.pace = pace
        self._share_at = -inf
        if self.is_on:
            self.share(now)
            return
        for worker in self._crew.workers.values():
            self._tell(worker, None)

    def welcome(self, worker: Worker, now: float) -> None:
        """`worker` is new: it is to read nothing before it is told how much."""
        worker.moved_at = now
        if self.is_on:
            self._tell(worker, 0)

    def remind(self, worker: Worker) -> None:
        """Tell `worker` again what it was told: a message may be lost."""
        if worker.was_told_rate:
            self._outbox.send(worker, Rate(self._job.uuid, self._job.epoch, worker.rate))

    def share(self, now: float) -> None:
        """If it is time, look at who has work, and tell everybody whose share is another one now."""
        if not self.is_on or now < self._share_at:
            return
        self._share_at = now + RATE_SHARE_SECONDS
        workers = [worker for worker in self._crew.workers.values() if worker.state in LIVE]
        shares = dict.fromkeys((worker.identity for worker in workers), 0)
        if not self.pace.is_paused and self.pace.limit is not None:
            busy = [worker for worker in workers if _is_busy(worker)]
            weights = [self._weight(worker, now) for worker in busy]
            for worker, share in zip(busy, shares_of(self.pace.limit, weights), strict=True):
                shares[worker.identity] = share
        changed = [worker for worker in workers if worker.rate != shares[worker.identity]]
        for is_raised in (False, True):
            for worker in changed:
                share = shares[worker.identity]
                if is_raised == (worker.rate is not None and share > worker.rate):
                    self._tell(worker, share)

    @property
    def even_share(self) -> float | None:
        """What each has of the limit when all have work; None without a limit."""
        return None if self.pace.limit is None else self.pace.limit / max(1, self._crew.ready_count)

    def request_seconds(self) -> float:
        """How long it may take until a worker's share is enough for one request; 0.0 without a limit."""
        if self.pace.limit is None:
            return 0.0
        least = self.pace.limit // (RATE_WEIGHT * max(1, self._crew.ready_count))
        return self._job.options.request_size / max(1, least)

    def _tell(self, worker: Worker, rate: int | None) -> None:
        if worker.rate != rate and worker.state in LIVE:
            worker.rate = rate
            worker.was_told_rate = True
            self._outbox.send(worker, Rate(self._job.uuid, self._job.epoch, rate))

    def _weight(self, worker: Worker, now: float) -> int:
        """Look at how far it is: those that get on have equal shares.

        One that has stalled is found to have until it gets on: its small share would explain that nothing comes.
        """
        assert worker.holding is not None
        mark = tuple((number, granted.done.total) for number, granted in worker.holding.leased.items())
        if mark != worker.mark or not worker.rate:
            worker.mark = mark
            worker.moved_at = now
            worker.has_stalled = False
        patience = RATE_STALL_SECONDS + 2 * self._job.options.request_size / max(1, worker.rate or 1)
        worker.has_stalled |= now - worker.moved_at > patience
        return 1 if worker.has_stalled else RATE_WEIGHT


def shares_of(limit: int, weights: Sequence[int]) -> list[int]:
    """`limit` divided by `weights`, rounded down; so the sum is never more. At least 1 where the limit allows it."""
    total = sum(weights)
    return [limit * weight // total for weight in weights]


def _is_busy(worker: Worker) -> bool:
    return worker.state is WorkerState.READY and worker.holding is not None and bool(worker.holding.leased)
