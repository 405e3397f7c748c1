"""What the workers report about ranges that they compare: leases as of a copy, without flushes. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from nbdshard.common.differences import Differences
from nbdshard.common.messages import Compared, EndpointDescription, Noted, Written
from nbdshard.common.ranges import are_apart
from nbdshard.coordinator.copying import Copying, Trouble, blame
from nbdshard.coordinator.crew import Crew, Outbox
from nbdshard.coordinator.instructions import Journal
from nbdshard.coordinator.job import Comparison, Job
from nbdshard.coordinator.leases import Granted
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.workers import Worker

Ends = tuple[EndpointDescription, EndpointDescription]


class Comparing(Copying):
    """The ranges of one job on their way to be compared: all of them, also what an earlier run has copied.

    A lease that is compared is done with: there is nothing that could be lost any more.
    """

    writes = False

    def __init__(self, job: Job, plan: Plan, crew: Crew, outbox: Outbox, *, first_number: int = 1) -> None:
        """`first_number`: of its leases; those below it are the copy's, and reports about them are late."""
        anew = replace(job, durable=(), unreadable=(), options=replace(job.options, checksum=False))
        super().__init__(anew, plan, crew, outbox)
        self.ledger.next_number = first_number
        self.differences = Differences()

    def connected(self, worker: Worker, instance: str, now: float) -> Trouble | None:
        """Whichever life of the server it is: nothing is at stake."""
        worker.instance = instance
        return None

    def written(self, worker: Worker, message: Written, now: float) -> Trouble | None:
        if worker.holding is not None and message.lease in worker.holding.leased:
            return blame(f"it reported lease {message.lease} as written, which it was to compare")
        return super().written(worker, message, now)

    def found(self, ends: Ends) -> Comparison:
        """What was found until now, between these `ends`."""
        found = self.differences
        sizes = (ends[0].size or 0, ends[1].size or 0) if self._job.options.mode == "compare" else None
        return Comparison(self.ledger.counters, found.total_bytes, found.ranges, found.is_cut, sizes)

    def compared(self, worker: Worker, message: Compared, now: float) -> Trouble | None:
        if message.lease >= self.ledger.next_number:
            return blame(f"it reported lease {message.lease}, which was never granted")
        granted = self._leased(worker, message.lease)
        if granted is not None:
            if message.done.total != granted.range.length:
                total, whole = message.done.total, granted.range.length
                return blame(f"it reported {total} of {whole} bytes of a lease as all of it")
            if not _is_possible(granted, message):
                return blame("it reported differences that are none of its lease's")
            worker.tempo.count(message.done.total - granted.done.total, now)
            self.ledger.wrote(granted, message.done, None)
            self.ledger.settle(granted)
            self.moved = True
            self.differences.merge(message.differences, message.differing)
            if message.differing:
                self._outbox.add(Journal(demoted=(granted.range,)))  # whoever resumes the copy copies it again
        self._outbox.send(worker, Noted(self._job.uuid, self._job.epoch, message.lease))
        self.consider(worker)
        return None


def _is_possible(granted: Granted, message: Compared) -> bool:
    """Whether these can be the first differences of the lease: in order, apart from one another, and no fewer bytes."""
    pieces = message.differences
    told = sum(piece.length for piece in pieces)
    is_enough = told <= message.differing <= granted.range.length and bool(pieces) == bool(message.differing)
    return is_enough and are_apart(pieces, granted.range)
