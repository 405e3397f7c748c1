"""What the workers report about ranges, and what they are told about them: leases, and the flushes that end them. Pure.

Nothing here decides about workers or about the job: a `Trouble` tells the scheduler whose end it is.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from nbdshard.common.errors import BugError
from nbdshard.common.limits import (
    ATTEMPTS_PER_RANGE,
    FLUSH_BYTES_PER_SECOND,
    FLUSH_SECONDS,
    LEASES_PER_WORKER,
    RETURNS_PER_RANGE,
    WRITTEN_LEASES_JOB_MAX,
    WRITTEN_LEASES_MAX,
)
from nbdshard.common.messages import Failed, Flush, Flushed, Lease, Noted, Progress, Written
from nbdshard.coordinator.crew import Crew, Outbox
from nbdshard.coordinator.ending import error_line
from nbdshard.coordinator.job import Job
from nbdshard.coordinator.leases import Granted, Ledger
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.states import WorkerState
from nbdshard.coordinator.workers import FlushAsked, Worker


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that ends more than a lease: the job (`is_fatal`), or the worker that broke the protocol."""

    text: str
    is_fatal: bool = True


class Copying:
    """The ranges of one job on their way, from the plan to the last flush."""

    def __init__(self, job: Job, plan: Plan, crew: Crew, outbox: Outbox) -> None:
        self._job = job
        self._plan = plan
        self._crew = crew
        self._outbox = outbox
        # In order, one range is written before the next is begun.
        self._leases_at_once = 1 if plan.in_order else LEASES_PER_WORKER
        self._flush_after = min(WRITTEN_LEASES_MAX, WRITTEN_LEASES_JOB_MAX // plan.worker_count)  # leases of one worker
        self._written_max = 2 * self._flush_after  # a worker whose flush takes long does not pile up more
        self._wishing: OrderedDict[str, Worker] = OrderedDict()
        self._unflushed: OrderedDict[str, Worker] = OrderedDict()  # wrote something that no flush asked for covers
        self._flush_number = 0
        self.ledger = Ledger(plan)
        self.repeatable = plan.repeatable
        self.undurable = False  # a server without FLUSH took some of it
        self.dropped = 0  # late reports
        self.moved = False  # a byte was completed, or made durable, since this was last set to False

    # -- leases --------------------------------------------------------------------------------------------------------

    def consider(self, worker: Worker) -> None:
        """Note whether `worker` can take a lease; `grant` gives it one in its turn."""
        if self._can_take(worker):
            self._wishing[worker.identity] = worker

    def grant(self) -> None:
        """Lease pending ranges to the workers that can take some, the longest waiting first."""
        while self._wishing and self.ledger.pending:
            _, worker = self._wishing.popitem(last=False)
            if not self._can_take(worker):
                continue
            granted = self.ledger.grant(worker.identity)
            worker.holding = self.ledger.holding(worker.identity)
            worker.wanted -= 1
            lease = Lease(
                self._job.uuid,
                self._job.epoch,
                granted.number,
                granted.range,
                self._job.granted_seconds,
                granted.until_end,
            )
            self._outbox.send(worker, lease)
            self.consider(worker)

    def _can_take(self, worker: Worker) -> bool:
        return worker.can_take(self._leases_at_once, self._written_max)

    def progress(self, worker: Worker, message: Progress) -> Trouble | None:
        granted = self._leased(worker, message.lease)
        if granted is None:
            return None
        if message.done.total > granted.range.length:
            return _blame(f"it reported {message.done.total} bytes of the {granted.range.length} of a lease")
        self.moved |= self.ledger.progress(granted, message.done)
        return None

    def written(self, worker: Worker, message: Written, now: float) -> Trouble | None:
        if message.lease >= self.ledger.next_number:
            return _blame(f"it reported lease {message.lease}, which was never granted")
        granted = self._leased(worker, message.lease)
        if granted is not None:
            whole = granted.range.length
            if granted.until_end:
                if message.end is None or message.end > granted.range.end:
                    return _blame("it did not tell where the stream ended")
                whole = message.end - granted.range.start
            if message.done.total != whole:
                return _blame(f"it reported {message.done.total} of {whole} bytes of a lease as all of it")
            self.ledger.wrote(granted, message.done, message.end if granted.until_end else None)
            self.moved = True
            self._wrote(worker, now)
        # Also for one that came late: it is sent again until it is noted, and does no harm.
        self._outbox.send(worker, Noted(self._job.uuid, self._job.epoch, message.lease))
        self.consider(worker)
        return None

    def failed(self, worker: Worker, message: Failed) -> Trouble | None:
        granted = self._leased(worker, message.lease)
        if granted is None:
            return None
        text = error_line(message.error)
        if message.error.kind != "connection" or not self._plan.repeatable:
            self.ledger.fail(granted)
            return Trouble(text)
        again = self.ledger.give_back(granted, attempt=False)
        self.consider(worker)
        return None if again else Trouble(f"{text} ({RETURNS_PER_RANGE} times for {_named(granted)})")

    def lost(self, worker: Worker, why: str, *, attempt: bool) -> Trouble | None:
        """What `worker` holds does not count any more: its leases, and what it wrote and no flush covers.

        `attempt`: its leases have used up one of their attempts, because they may be what ended it.
        """
        self._wishing.pop(worker.identity, None)
        self._unflushed.pop(worker.identity, None)
        holding, trouble = worker.holding, None
        if holding is None:
            return None
        if not self._plan.repeatable and (holding.leased or holding.written):
            trouble = Trouble(f"{why}; a stream cannot be copied a second time")
        for granted in list(holding.leased.values()):
            if not self.ledger.give_back(granted, attempt=attempt):
                most = ATTEMPTS_PER_RANGE if attempt else RETURNS_PER_RANGE
                trouble = trouble or Trouble(f"{_named(granted)} was lost {most} times: {why}")
        for granted in list(holding.written.values()):
            if not self.ledger.give_back(granted, attempt=False):
                trouble = trouble or Trouble(f"{_named(granted)} was lost {RETURNS_PER_RANGE} times: {why}")
        self.ledger.close_holding(worker.identity)
        return trouble

    def _leased(self, worker: Worker, lease: int) -> Granted | None:
        """The valid lease of `worker` with this number; a report about any other is late."""
        granted = worker.holding.leased.get(lease) if worker.holding is not None else None
        if granted is None:
            self.dropped += 1
        return granted

    # -- flushes -------------------------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        """Have everything flushed that was written. Asks nobody twice for the same."""
        while self._unflushed:
            _, worker = self._unflushed.popitem(last=False)
            self._ask_flush(worker, now)

    def flushed(self, worker: Worker, message: Flushed, now: float) -> Trouble | None:
        asked = worker.flush
        if asked is None or asked.number != message.flush or worker.holding is None:
            self.dropped += 1
            return None
        self._crew.flush_over(worker)
        if message.error is not None:
            return Trouble(error_line(message.error))
        self.moved = True
        written = worker.holding.written
        covered = set(message.leases)
        if not message.durable:
            # Nothing better can be had of this server: ranges end as written, and the outcome says so.
            self.undurable = True
            covered |= asked.leases
        trouble = None
        for number in covered & written.keys():
            self.ledger.settle(written[number])
        for number in asked.leases & written.keys():
            # Its connection is gone, and with it perhaps the server that had acknowledged it.
            granted = written[number]
            if not self._plan.repeatable:
                trouble = Trouble(f"no flush covers {_named(granted)}; a stream cannot be copied a second time")
            if not self.ledger.give_back(granted, attempt=False):
                trouble = trouble or Trouble(f"no flush covered {_named(granted)} in {RETURNS_PER_RANGE} tries")
        if written:
            self._wrote(worker, now)
        self.consider(worker)
        return trouble

    def _wrote(self, worker: Worker, now: float) -> None:
        """`worker` has written leases. Now and then it must flush before the end: each is an object until then."""
        assert worker.holding is not None
        written = worker.holding.written
        is_many = len(written) >= self._flush_after
        if not self._job.options.flush:
            if is_many:
                for granted in list(written.values()):
                    self.ledger.settle(granted)  # the user wants no more than that
        elif worker.flush is None and worker.state is WorkerState.READY:
            if is_many:
                self._unflushed.pop(worker.identity, None)
                self._ask_flush(worker, now)
            else:
                self._unflushed[worker.identity] = worker

    def _ask_flush(self, worker: Worker, now: float) -> None:
        assert worker.holding is not None
        self._flush_number += 1
        # One server may have to write back what all of them wrote.
        seconds = FLUSH_SECONDS + self.ledger.unsettled_bytes / FLUSH_BYTES_PER_SECOND
        asked = FlushAsked(self._flush_number, frozenset(worker.holding.written), now + seconds, seconds)
        self._crew.flush_begins(worker, asked)
        self._outbox.send(worker, Flush(self._job.uuid, self._job.epoch, self._flush_number))

    # -- the invariants ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise BugError when the ranges, or who holds them, are not as they must be. For tests."""
        self.ledger.validate()
        for worker in self._crew.workers.values():
            held = len(worker.holding.leased) if worker.holding is not None else 0
            if held > self._leases_at_once:
                raise BugError(f"worker {worker.name} holds {held} leases")
            written = len(worker.holding.written) if worker.holding is not None else 0
            if written + held > self._written_max + self._leases_at_once:
                raise BugError(f"worker {worker.name} has {written} written leases that no flush covers")
            if self._can_take(worker) and worker.identity not in self._wishing:
                raise BugError(f"worker {worker.name} wants a lease and is not in the queue")
            if worker.state is WorkerState.READY and worker.holding is not None and self._job.options.flush:
                asked = worker.flush.leases if worker.flush is not None else frozenset[int]()
                if worker.holding.written.keys() - asked and worker.identity not in self._unflushed and not asked:
                    raise BugError(f"worker {worker.name} wrote what no flush will cover")


def _blame(text: str) -> Trouble:
    return Trouble(text, is_fatal=False)


def _named(granted: Granted) -> str:
    return f"the range of {granted.range.length} bytes at offset {granted.range.start}"
