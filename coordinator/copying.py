"""What the workers report about ranges, and what they are told about them: leases, and what flushes make of them. Pure.

Nothing here decides about workers or about the job: a `Trouble` tells the scheduler whose end it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from nbdshard.common.errors import BugError
from nbdshard.common.limits import (
    ATTEMPTS_PER_RANGE,
    DIGEST_BYTES_MAX,
    LEAF_BYTES,
    LEASES_PER_WORKER,
    RETURNS_PER_RANGE,
    WRITTEN_LEASES_JOB_MAX,
    WRITTEN_LEASES_MAX,
)
from nbdshard.common.messages import ErrorReport, Failed, Flushed, Lease, Leaves, Noted, Progress, Written
from nbdshard.common.ranges import Range, RangeSet, are_apart
from nbdshard.coordinator.crew import Crew, Outbox
from nbdshard.coordinator.ending import error_line
from nbdshard.coordinator.flushes import Flushes
from nbdshard.coordinator.instructions import Journal
from nbdshard.coordinator.job import Job
from nbdshard.coordinator.leases import Granted, Ledger
from nbdshard.coordinator.lives import Lives
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.states import RangeState, WorkerState
from nbdshard.coordinator.workers import Worker

if TYPE_CHECKING:  # a copy without a checksum does not load it
    from nbdshard.coordinator.checksum import ImageChecksum


class Trouble(msgspec.Struct, frozen=True):
    """Something that ends more than a lease: the job (`is_fatal`), or the worker that broke the protocol."""

    text: str
    is_fatal: bool = True


class Copying:
    """The ranges of one job on their way, from the plan to the last flush."""

    writes = True  # who was granted a lease may have written

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
        self._suspect_before = 0  # leases below this number were under way when a flush was lost
        self.ledger = Ledger(plan, job.durable, job.unreadable)
        self.flushes = Flushes(job, crew, outbox, self.ledger, can_flush=plan.can_flush)
        self._checksum = _begin_checksum(job, self.ledger) if job.options.checksum else None
        self._lives = Lives(job, plan)
        self.repeatable = plan.repeatable
        self.undurable = False  # a server without FLUSH took some of it
        self.dropped = 0  # late reports
        self.moved = False  # a byte was completed, or made durable, since this was last set to False

    # -- leases --------------------------------------------------------------------------------------------------------

    def consider(self, worker: Worker) -> None:
        """Note whether `worker` can take a lease; `grant` gives it one in its turn."""
        if self._can_take(worker):
            self._wishing[worker.identity] = worker

    def grant(self, now: float, share: float | None = None) -> None:
        """Lease pending ranges to the workers that can take some, the longest waiting first.

        `share`: bytes per second that each may read, if the job has a rate.
        """
        while self._wishing and self.ledger.pending and not self.must_wait:
            _, worker = self._wishing.popitem(last=False)
            if not self._can_take(worker):
                continue
            if worker.holding is None or not worker.holding.leased:
                worker.tempo.begin(now)
            granted = self.ledger.grant(worker.identity, worker.tempo.lease_bytes(share))
            worker.holding = self.ledger.holding(worker.identity)
            worker.wanted -= 1
            lease = Lease(
                self._job.uuid,
                self._job.epoch,
                granted.number,
                granted.range,
                self._job.granted_seconds,
                granted.until_end,
                worker.alive_at,
            )
            self._outbox.send(worker, lease)
            self.consider(worker)

    @property
    def must_wait(self) -> bool:
        """Whether so many digests are held that no new range is begun: of one that is late, all others wait."""
        return self._holds_much and not self.ledger.returned

    @property
    def _holds_much(self) -> bool:
        return self._checksum is not None and self.ledger.leaf_bytes + self._checksum.held_bytes >= DIGEST_BYTES_MAX

    def _can_take(self, worker: Worker) -> bool:
        return worker.can_take(self._leases_at_once, self._written_max)

    def progress(self, worker: Worker, message: Progress, now: float) -> Trouble | None:
        granted = self._leased(worker, message.lease)
        if granted is None:
            return None
        if message.done.total > granted.range.length:
            return blame(f"it reported {message.done.total} bytes of the {granted.range.length} of a lease")
        worker.tempo.count(message.done.total - granted.done.total, now)
        self.moved |= self.ledger.progress(granted, message.done)
        return None

    def leaves(self, worker: Worker, message: Leaves) -> Trouble | None:
        granted = self._leased(worker, message.lease)
        if granted is None:
            return None
        if self._checksum is None:
            return blame("it sent digests that nobody has asked for")
        self.ledger.hold(granted, message.runs)
        if sum(run.count for run in granted.runs) > granted.range.length // LEAF_BYTES + 1:
            return blame(f"it sent more digests than the {granted.range.length} bytes of a lease have")
        return None

    def written(self, worker: Worker, message: Written, now: float) -> Trouble | None:
        if message.lease >= self.ledger.next_number:
            return blame(f"it reported lease {message.lease}, which was never granted")
        granted, trouble = self._leased(worker, message.lease), None
        if granted is not None:
            whole = granted.range.length
            if granted.until_end:
                if message.end is None or message.end > granted.range.end:
                    return blame("it did not tell where the stream ended")
                whole = message.end - granted.range.start
            if message.done.total != whole:
                return blame(f"it reported {message.done.total} of {whole} bytes of a lease as all of it")
            places = message.unreadable
            if places and not (self._job.options.salvage and are_apart(places, granted.range)):
                return blame("it told of unreadable places that are none of its lease's")
            if self._checksum is not None:
                runs = granted.runs
                count = sum(run.count for run in runs)
                if count < message.leaves:
                    return None  # some were lost on the way: as this is not noted, all of them are sent again
                if count > message.leaves:
                    return blame(f"it sent {count} digests of a lease that has {message.leaves}")
                if fault := self._checksum.fault_of(runs, granted.range):
                    return blame(fault)
            trouble = self._written(worker, granted, message, now)
        # Also for one that came late: it is sent again until it is noted, and does no harm.
        self._outbox.send(worker, Noted(self._job.uuid, self._job.epoch, message.lease))
        self.consider(worker)
        return trouble

    def _written(self, worker: Worker, granted: Granted, message: Written, now: float) -> Trouble | None:
        if granted.number < self._suspect_before:
            # Part of it may have been among what that flush did not bring to the disk; a later one would not tell.
            return self._given_back([granted], "a flush was lost while it was copied")
        end = message.end if granted.until_end else None
        worker.tempo.count(message.done.total - granted.done.total, now)
        self.ledger.wrote(granted, message.done, end, message.unreadable)
        self.moved = True
        self.flushes.count(message.done.total)
        self._wrote(worker, now, often_lost=self.ledger.often_lost(granted))
        return None

    def failed(self, worker: Worker, message: Failed) -> Trouble | None:
        granted = self._leased(worker, message.lease)
        if granted is None:
            return None
        text = error_line(message.error)
        if message.error.kind != "connection" or not self._plan.repeatable:
            self.ledger.fail(granted)
            return Trouble(text)
        again = self.ledger.cut_off(granted)
        self.consider(worker)
        return None if again else Trouble(f"{text} ({RETURNS_PER_RANGE} times for {_named(granted)})")

    def connected(self, worker: Worker, instance: str, now: float) -> Trouble | None:
        """`worker` has connections, and was told of this life of the destination's server; "": of none (lives.py)."""
        is_the_same = instance != "" and instance == worker.instance
        worker.instance = instance
        was_kept = self._lives.waiting.pop(worker.identity, None) is not None
        trouble = None
        if self._lives.begins_another(instance) or (was_kept and not is_the_same):
            trouble = self._distrust(0, "the destination's server was started again")
        if worker.written:
            self._wrote(worker, now)
        return trouble

    def give_up_waiting(self) -> Trouble | None:
        """Nothing else is left to do: what those wrote who are not connected, others copy again."""
        trouble = None
        while self._lives.waiting and trouble is None:
            _, worker = self._lives.waiting.popitem()
            trouble = self._given_back(worker.written, f"worker {worker.name} is not connected")
        return trouble

    def lost(self, worker: Worker, why: str, *, attempt: bool, returns: bool = False) -> Trouble | None:
        """What `worker` holds does not count any more: its leases, and what it wrote and no flush covers.

        `attempt`: its leases have used up one of their attempts, because they may be what ended it. `returns`: it lost
        its connections only, and what it wrote may be proved to be still there.
        """
        self._wishing.pop(worker.identity, None)
        self.flushes.forget(worker)
        holding, trouble = worker.holding, None
        if holding is None:
            return None
        if not self._plan.repeatable and (holding.leased or holding.written):
            trouble = Trouble(f"{why}; a stream cannot be copied a second time")
        for granted in list(holding.leased.values()):
            if not (self.ledger.give_back(granted, attempt=True) if attempt else self.ledger.cut_off(granted)):
                most = ATTEMPTS_PER_RANGE if attempt else RETURNS_PER_RANGE
                trouble = trouble or Trouble(f"{_named(granted)} was lost {most} times: {why}")
        if not (returns and self._lives.keep(worker)):
            self._lives.waiting.pop(worker.identity, None)
            given_back = self._given_back(worker.written, why)
            trouble = trouble or given_back
        if worker.identity in self.flushes.unanswered:
            found = self._flush_lost(worker, why)
            trouble = trouble or found
        self._crew.flush_over(worker)  # whatever it may still answer
        self.ledger.close_holding(worker.identity)
        return trouble

    def _leased(self, worker: Worker, lease: int) -> Granted | None:
        """The valid lease of `worker` with this number; a report about any other is late."""
        granted = worker.holding.leased.get(lease) if worker.holding is not None else None
        if granted is None:
            self.dropped += 1
        return granted

    # -- flushes -------------------------------------------------------------------------------------------------------

    @property
    def unsettled(self) -> bool:
        """Whether anything is written that a flush has still to cover, or one sent before to confirm."""
        return self.ledger.written_count > 0 or self.ledger.covered_count > 0

    def flushed(self, worker: Worker, message: Flushed, now: float) -> Trouble | None:
        asked = worker.flush
        if asked is None or asked.number != message.flush or worker.holding is None:
            self.dropped += 1
            return None
        self._crew.flush_over(worker)
        if message.error is not None:
            return self._flush_failed(worker, message.error)
        self.moved = True
        written = worker.holding.written
        kept = {number for number in asked.leases & written.keys() if written[number].is_kept and message.durable}
        covered = [written[number] for number in (kept | set(message.leases)) & written.keys()]
        for granted in covered:
            if message.durable:
                self.ledger.cover(granted, self.flushes.number)
            else:
                self._settle(granted)
        if not message.durable:
            # Nothing better can be had of this server: ranges end as written, and the outcome says so.
            self.undurable = True
            for number in asked.leases & written.keys():
                self._settle(written[number])
        trouble = None
        for number in asked.leases & written.keys():
            # Its connection is gone, and with it perhaps the server that had acknowledged it.
            granted = written[number]
            if not self._plan.repeatable:
                trouble = Trouble(f"no flush covers {_named(granted)}; a stream cannot be copied a second time")
            if not self.ledger.give_back(granted, attempt=False):
                trouble = trouble or Trouble(f"no flush covered {_named(granted)} in {RETURNS_PER_RANGE} tries")
        self._answered(worker)
        if written:
            self._wrote(worker, now)
        self.consider(worker)
        return trouble

    def _answered(self, worker: Worker) -> None:
        """Its flush holds up the others no longer: what no flush without an answer can take back goes to the journal.

        Not sooner: if the coordinator died before it heard that the older flush failed, it would resume from a lie.
        """
        self.flushes.unanswered.pop(worker.identity, None)
        settled = self.ledger.confirm(self.flushes.oldest_unanswered)
        for granted in settled:
            self._add_to_checksum(granted)
        if settled:
            durable = (where for granted in settled for where in granted.written)
            unreadable = (where for granted in settled for where in granted.unreadable)
            leaves = tuple(run for granted in settled for run in granted.runs)
            self._outbox.add(Journal(durable=_merged(durable), unreadable=_merged(unreadable), leaves=leaves))

    def _flush_failed(self, worker: Worker, error: ErrorReport) -> Trouble | None:
        text = error_line(error)
        if error.kind == "connection" and self._plan.repeatable:
            return self._flush_lost(worker, text)  # nobody knows how it ended
        # The job ends with it, and the flush stays without an answer: nothing since it was sent is ever settled.
        # The ledger keeps it, so that the user is told how far the copy was.
        self._demoted(self.ledger.covered_since(self.flushes.unanswered[worker.identity]))
        return Trouble(text)

    def _flush_lost(self, worker: Worker, why: str) -> Trouble | None:
        """How the flush of `worker` ended will never be known. The kernel tells of a lost write-back once, and it may
        have told this one: all that was written in the job until now, or covered since this flush was sent, does not
        count any more."""
        trouble = self._distrust(self.flushes.unanswered[worker.identity], why)
        self._answered(worker)
        return trouble

    def _distrust(self, flush: int, why: str) -> Trouble | None:
        """Copy again all that is written, is under way, or was covered since `flush` was sent."""
        self._demoted(self.ledger.covered_since(flush))
        given_back = self.ledger.demote(flush)
        self.flushes.forget_all()
        self._lives.waiting.clear()
        self._suspect_before = self.ledger.next_number
        return self._failed_of(given_back, why)

    def _demoted(self, ranges: Iterable[Range]) -> None:
        if ranges := _merged(ranges):
            self._outbox.add(Journal(demoted=ranges))

    def _given_back(self, ranges: list[Granted], why: str) -> Trouble | None:
        for granted in ranges:
            self.ledger.give_back(granted, attempt=False)
        return self._failed_of(ranges, why)

    def _failed_of(self, ranges: list[Granted], why: str) -> Trouble | None:
        for granted in ranges:
            if granted.state is RangeState.FAILED:
                return Trouble(f"{_named(granted)} was lost {RETURNS_PER_RANGE} times: {why}")
        return None

    def _wrote(self, worker: Worker, now: float, *, often_lost: bool = False) -> None:
        """`worker` has written leases. Now and then it must flush before the end: each is an object until then.

        `often_lost`: one of them was written before, perhaps, and no checkpoint came before its connection was lost.
        """
        assert worker.holding is not None
        written = worker.holding.written
        is_many = len(written) >= self._flush_after or self._holds_much
        if not self._job.options.flush:
            if is_many:
                self._settle_all(written)  # the user wants no more than that
        elif worker.flush is None and worker.state is WorkerState.READY:
            if (is_many or (often_lost and self._plan.can_flush)) and not self.flushes.is_full:
                self.flushes.ask(worker, now)
            else:
                self.flushes.wait(worker, now)

    def note_unreadable(self) -> None:
        """The copy is complete, and what is written is as good as it gets: say what is not there also where no flush
        made it durable."""
        if self.ledger.unreadable and (self.undurable or not self._job.options.flush):
            self._outbox.add(Journal(unreadable=tuple(self.ledger.unreadable)))

    # -- the checksum --------------------------------------------------------------------------------------------------

    def work_on_checksum(self, now: float) -> None:
        """Take what has come to its turn; where too much waits for a flush, have it flushed."""
        if self._checksum is None:
            return
        self._checksum.step()
        if not self.must_wait:
            return
        if self._job.options.flush:
            self.flushes.ask_all(now)
        else:
            self._settle_rest()

    def finish_checksum(self) -> str:
        """The checksum of a job that is complete, in hexadecimal; "" where none was asked for."""
        if self._checksum is None or self.ledger.size is None:
            return ""
        self._settle_rest()
        return self._checksum.finish(self.ledger.size)

    def _settle(self, granted: Granted) -> None:
        self.ledger.settle(granted)
        self._add_to_checksum(granted)

    def _settle_all(self, written: dict[int, Granted]) -> None:
        for granted in list(written.values()):
            self._settle(granted)

    def _settle_rest(self) -> None:
        for holder in self.ledger.holders:
            self._settle_all(self.ledger.holding(holder).written)

    def _add_to_checksum(self, granted: Granted) -> None:
        if self._checksum is not None:
            self._checksum.add(granted.range, granted.runs)

    # -- the invariants ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise BugError when the ranges, or who holds them, are not as they must be. For tests."""
        self.ledger.validate()
        if self.ledger.covered_count and not self.flushes.unanswered:
            raise BugError("what every flush was answered for is not settled")
        for worker in self._crew.workers.values():
            held = len(worker.holding.leased) if worker.holding is not None else 0
            if held > self._leases_at_once:
                raise BugError(f"worker {worker.name} holds {held} leases")
            written = len(worker.holding.written) if worker.holding is not None else 0
            if written + held > self._written_max + self._leases_at_once:
                raise BugError(f"worker {worker.name} has {written} written leases that no flush covers")
            if self._can_take(worker) and worker.identity not in self._wishing:
                raise BugError(f"worker {worker.name} wants a lease and is not in the queue")
            is_awaited = worker.flush is not None or self.flushes.awaits(worker)
            if worker.state is WorkerState.READY and written and self._job.options.flush and not is_awaited:
                raise BugError(f"worker {worker.name} wrote what no flush will cover")
            if self.flushes.awaits(worker) and (not written or worker.flush is not None):
                raise BugError(f"worker {worker.name} is to be flushed for nothing")
            if worker.flush is not None and self.flushes.unanswered.get(worker.identity) != worker.flush.number:
                raise BugError(f"the flush of worker {worker.name} is not waited for")


def _begin_checksum(job: Job, ledger: Ledger) -> ImageChecksum:
    from nbdshard.coordinator.checksum import ImageChecksum

    return ImageChecksum(job.earlier, ledger.taken_over)


def _merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    return tuple(RangeSet(sorted(ranges)))


def blame(text: str) -> Trouble:
    """The worker broke the protocol."""
    return Trouble(text, is_fatal=False)


def _named(granted: Granted) -> str:
    return f"the range of {granted.range.length} bytes at offset {granted.range.start}"
