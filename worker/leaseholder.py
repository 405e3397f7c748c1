"""What a copier and a comparer have in common: leases, from their beginning to their end; the rate; retries. Pure."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Generic, Protocol, TypeVar

from nbdshard.common.bucket import Bucket, earliest
from nbdshard.common.limits import LEASES_PER_WORKER
from nbdshard.common.messages import Counters, ErrorReport, Failed, FromWorker, Lease, Progress, Wanted
from nbdshard.worker.retries import Retries
from nbdshard.worker.shape import CopyShape


class Leased(Protocol):
    """The work of one lease. `reported`: how far the coordinator knows it to be; `outstanding`: what is under way."""

    lease: int
    abandoned: bool
    error: ErrorReport | None
    outstanding: int
    reported: Counters

    @property
    def counters(self) -> Counters: ...


LeasedWork = TypeVar("LeasedWork", bound=Leased)


class Leaseholder(Generic[LeasedWork]):
    """One worker's part of one job, whatever it does with the bytes."""

    def __init__(self, shape: CopyShape, job: str, epoch: int, now: float) -> None:
        self.shape = shape
        self.job = job
        self.epoch = epoch
        self.now = now
        self.outbox: list[FromWorker] = []
        self.leases: dict[int, LeasedWork] = {}
        self.draining = False
        self.has_work = False  # something has ended or begun since the last `pump`: more may be possible
        self.earliest_expiry = inf  # never later than the first end of a lease that is not over: then `expire` is due
        self.bucket = Bucket(shape.request_size, now)
        self._retries = Retries()
        self._due: list[tuple[LeasedWork, Callable[[], None]]] = []  # retries of it whose pause is over
        self._wish = 0  # leases the coordinator knows we want

    # -- the shell's side ----------------------------------------------------------------------------------------------

    def revoke(self, lease_id: int) -> None:
        """Give a lease up; reported as failed once nothing of it is on the wire."""
        if lease := self.leases.get(lease_id):
            self.abandon(lease, ErrorReport(kind="connection", text="the lease was revoked"))

    def limit(self, rate: int | None) -> None:
        """Read no more than `rate` bytes per second from now on; None: without a limit; 0: begin nothing."""
        if rate != self.bucket.rate:
            self.has_work = True
            self.bucket.set(rate, self.now)

    def drain(self) -> None:
        """Begin nothing more; `idle` tells when what was begun is finished.

        How far the leases are is told: what comes back half done is no range that nobody can copy.
        """
        self.report_progress()
        self.draining = True
        for lease in list(self.leases.values()):
            self.abandon(lease, None)

    def abort(self, error: ErrorReport) -> None:
        """The connections are gone: every lease has failed. Nothing is under way any more."""
        self.draining = True
        for lease in self.leases.values():
            self.outbox.append(Failed(self.job, self.epoch, lease.lease, error))
        self.leases.clear()

    def report_progress(self) -> None:
        """Queue a Progress message for every lease that got further since the last."""
        for lease in self.leases.values():
            done = lease.counters
            if done != lease.reported and not lease.abandoned:
                lease.reported = done
                self.outbox.append(Progress(self.job, self.epoch, lease.lease, done))

    def deadline(self) -> float | None:
        """When `pump` has something to do even if nothing happens: the next retry, or the rate allows a read."""
        return earliest(self._retries.deadline, self.bucket.ready_at())

    # -- leases --------------------------------------------------------------------------------------------------------

    def _admits(self, message: Lease) -> bool:
        """Whether the lease is to be begun. One that is known already is a repeated message."""
        if message.lease in self.leases or self.draining:
            return False
        self.has_work = True
        self._wish = max(0, self._wish - 1)
        return True

    def _want_leases(self, most: int = LEASES_PER_WORKER) -> None:
        """Tell the coordinator of room for more, up to `most` in all."""
        room = most - len(self.leases)
        if room > 0 and room != self._wish:
            self._wish = room
            self.outbox.append(Wanted(self.job, self.epoch, room))

    def given_up(self, lease: LeasedWork) -> bool:
        """Whether nothing more is to be begun for `lease`."""
        return lease.abandoned or self.draining

    def abandon(self, lease: LeasedWork, error: ErrorReport | None) -> None:
        """Begin nothing more for `lease`; reported as failed with `error`, if any, once nothing is under way."""
        if not lease.abandoned:
            self.has_work = True
            lease.abandoned = True
            lease.error = error
            self._call_back(lease)
            self._forget_if_quiet(lease)

    def _call_back(self, lease: LeasedWork) -> None:
        """`lease` is given up: have those stop who work for it by themselves."""

    def _forget_if_quiet(self, lease: LeasedWork) -> None:
        if lease.outstanding == 0 and self.leases.pop(lease.lease, None) is not None and lease.error is not None:
            self.outbox.append(Failed(self.job, self.epoch, lease.lease, lease.error))

    def later(self, lease: LeasedWork, attempts: int, action: Callable[[], None]) -> None:
        """Try a request of `lease` again after a pause that doubles with each attempt."""
        self._retries.add(self.now, attempts, lambda: self._due.append((lease, action)))

    def _try_again(self) -> None:
        """Try again what is due; while nothing is to be begun, only end what belongs to leases that are given up."""
        self._retries.run(self.now)
        due, self._due = self._due, []
        for lease, action in due:
            if self.bucket.is_closed and not self.given_up(lease):
                self._due.append((lease, action))
            else:
                action()
