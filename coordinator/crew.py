"""The crew: who is there, who has how many of the job's connections, and when to look at whom. Pure.

Connections are a budget per side. Until the ends are known one worker, the scout, gets one connection to either side:
a server may take one only, and a small copy needs no more. All others stand by with none. The plan then says how many
workers are useful (`active_max`) and what the budget really is; those who stand by are given shares as long as there
is some, and again when a worker has left. Where the destination takes one writer only, it has the whole budget, and
its role moves when it is known gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush
from math import inf
from typing import Final
from zlib import crc32

from msgspec.structs import replace

from nbdshard.common.errors import BugError
from nbdshard.common.limits import BACKOFF_JITTER, OPEN_SECONDS
from nbdshard.common.messages import Assign, EndpointDescription, FromCoordinator, Hello, Stop
from nbdshard.coordinator.instructions import Forget, Instruction, Kill, Send
from nbdshard.coordinator.job import Job
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.states import WorkerEvent, WorkerState
from nbdshard.coordinator.workers import FlushAsked, Worker

LIVE: Final = frozenset({WorkerState.JOINING, WorkerState.READY, WorkerState.WAITING})


class Outbox:
    """Instructions on their way to the shell, in order."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []

    def add(self, instruction: Instruction) -> None:
        self._instructions.append(instruction)

    def send(self, worker: Worker, message: FromCoordinator) -> None:
        self._instructions.append(Send(worker.identity, message))

    def take(self) -> list[Instruction]:
        """All there are; they are the caller's now."""
        taken, self._instructions = self._instructions, []
        return taken


class Crew:
    """The workers that are there, and the budget of connections."""

    def __init__(self, job: Job, outbox: Outbox) -> None:
        self._job = job
        self._options = job.options
        self._outbox = outbox
        self._alarms: list[tuple[float, int, str]] = []
        self._alarms_set = 0
        self._standby: OrderedDict[str, Worker] = OrderedDict()
        self.workers: OrderedDict[str, Worker] = OrderedDict()  # next in turn for a heartbeat first
        self.unfenced: dict[str, str] = {}  # identity -> name: may still write, and is not waited for
        self.plan: Plan | None = None
        self.is_open = True  # shares may be given: not while the destination is being prepared
        self.active_max = 1
        self.active_count = 0  # workers with a share
        self.live_count = 0  # in one of the LIVE states
        self.ready_count = 0
        self.waiting_count = 0
        self.flushing_count = 0
        self._source_budget = self._source_total = 1
        self._destination_budget = self._destination_total = 1
        self._expected: tuple[EndpointDescription, EndpointDescription] | None = None
        self.source_connections = self.destination_connections = 0  # open now
        self.source_connections_most = self.destination_connections_most = 0
        self.rings: set[str] = set()
        self.took_part_count = 0

    # -- joining and leaving -------------------------------------------------------------------------------------------

    def join(self, identity: str, hello: Hello, now: float) -> Worker:
        """A worker that said Hello. It stands by until `place` gives it connections."""
        worker = Worker(identity, hello, now)
        self.workers[identity] = worker
        self._standby[identity] = worker
        self.live_count += 1
        self.arm(worker)
        return worker

    def opened(self, worker: Worker, source_connections: int, destination_connections: int) -> None:
        """It has connections to either side."""
        if worker.state is not WorkerState.READY:
            self.ready_count += 1
        if worker.state is WorkerState.WAITING:
            self.waiting_count -= 1
        worker.step(WorkerEvent.OPENED)
        worker.open_by = inf
        self._count_connections(worker, source_connections, destination_connections)
        if not worker.took_part:
            worker.took_part = True
            self.took_part_count += 1
            self.rings.add(worker.hello.ring)

    def wait(self, worker: Worker, now: float, backoff: tuple[float, float]) -> None:
        """Its connections are lost: it is given new ones after a pause that doubles with each loss in a row.

        `backoff`: the first such pause, and the longest, in seconds.
        """
        if worker.state is WorkerState.READY:
            self.ready_count -= 1
        if worker.state is not WorkerState.WAITING:
            self.waiting_count += 1
        worker.step(WorkerEvent.LOST)
        worker.wanted = 0
        worker.losses += 1
        worker.open_by = inf
        self.flush_over(worker)
        self._count_connections(worker, 0, 0)
        self._take_share(worker)
        # Those who lost the same server come back one after the other.
        share = 1 - BACKOFF_JITTER * (crc32(worker.identity.encode()) % 256) / 256
        first, longest = backoff
        pause = min(first * 2.0 ** min(worker.losses - 1, 16), longest)
        worker.return_at = now + pause * share
        self.arm(worker)

    def come_back(self, worker: Worker, now: float) -> None:
        """Its pause is over: it stands by for connections."""
        worker.return_at = inf
        self._standby[worker.identity] = worker
        self.place(now)

    def dismiss(self, worker: Worker, reason: str, leave_by: float, *, at_once: bool = False) -> None:
        """Tell it to stop, and give it until `leave_by` to say Goodbye."""
        self._leave_live(worker)
        worker.step(WorkerEvent.STOPPED)
        worker.leave_by = min(worker.leave_by, leave_by)
        worker.why = worker.why or reason
        self._outbox.send(worker, Stop(self._job.uuid, self._job.epoch, reason, now=at_once))
        self.arm(worker)

    def kill(self, worker: Worker, reaped_by: float) -> None:
        """Have the local process of `worker` killed; it must be reaped until `reaped_by`."""
        self._leave_live(worker)
        worker.step(WorkerEvent.STOPPED)
        worker.killed = True
        worker.leave_by = reaped_by
        self._outbox.add(Kill(worker.identity))
        self.arm(worker)

    def remove(self, worker: Worker, *, fenced: bool) -> None:
        """It is gone. Not `fenced`: it may still write, and is remembered until its Goodbye is heard."""
        self._leave_live(worker)
        worker.step(WorkerEvent.LEFT)
        self._count_connections(worker, 0, 0)
        del self.workers[worker.identity]
        self._take_share(worker)
        if fenced:
            self._outbox.add(Forget(worker.identity))
        else:
            self.unfenced[worker.identity] = worker.name

    def _take_share(self, worker: Worker) -> None:
        """Its connections are closed: others may have them."""
        if worker.assigned:
            self.active_count -= 1
            self._source_budget += worker.source_share
            self._destination_budget += worker.destination_share
            worker.source_share = worker.destination_share = 0

    def turn_away(self, identity: str, hello: Hello, reason: str) -> None:
        """A worker that comes when the job is over: it is told so, and not counted."""
        worker = Worker(identity, hello, 0.0)
        self._assign(worker, expect=False)
        self._outbox.send(worker, Stop(self._job.uuid, self._job.epoch, reason))
        self._outbox.add(Forget(identity))

    def stop_unfenced(self, identity: str) -> None:
        """Tell a worker that was given up to stop: it may not have heard it the last time."""
        stop = Stop(self._job.uuid, self._job.epoch, "its lease has expired", now=True)
        self._outbox.add(Send(identity, stop))

    def shrink(self, worker: Worker) -> None:
        """The server has no room for `worker`'s connections: neither will it have for another's."""
        self.active_max = max(1, self.active_max - 1)
        # The budget is given back when it leaves: take from the total what it could not use.
        sources = min(worker.source_share, self._source_total - 1)
        destinations = min(worker.destination_share, self._destination_total - 1)
        self._source_total -= sources
        self._source_budget -= sources
        self._destination_total -= destinations
        self._destination_budget -= destinations

    def _leave_live(self, worker: Worker) -> None:
        self._standby.pop(worker.identity, None)
        worker.wanted = 0
        self.flush_over(worker)
        if worker.state in LIVE:
            self.live_count -= 1
        if worker.state is WorkerState.READY:
            self.ready_count -= 1
        if worker.state is WorkerState.WAITING:
            self.waiting_count -= 1
        worker.return_at = inf

    def _count_connections(self, worker: Worker, sources: int, destinations: int) -> None:
        self.source_connections += sources - worker.source_connections
        self.destination_connections += destinations - worker.destination_connections
        worker.source_connections, worker.destination_connections = sources, destinations
        self.source_connections_most = max(self.source_connections_most, self.source_connections)
        self.destination_connections_most = max(self.destination_connections_most, self.destination_connections)

    # -- connections ---------------------------------------------------------------------------------------------------

    def adopt(self, plan: Plan, scout: Worker, source: EndpointDescription, destination: EndpointDescription) -> None:
        """The ends are known: from now on the plan's budget holds."""
        self.plan = plan
        self.active_max = plan.worker_count
        self._expected = (source, destination)
        self._source_total = plan.source_limit
        self._source_budget = plan.source_limit - scout.source_share
        self._destination_total = plan.destination_limit
        self._destination_budget = plan.destination_limit - scout.destination_share

    def raise_shares(self) -> None:
        """Give the workers that have less than a fair share of the plan's budget the rest of it."""
        for worker in self.workers.values():
            if worker.state is not WorkerState.READY or not worker.assigned:
                continue
            sources = min(-(-self._source_total // self.active_max) - worker.source_share, self._source_budget)
            destinations = min(
                -(-self._destination_total // self.active_max) - worker.destination_share, self._destination_budget
            )
            if sources > 0 or destinations > 0:
                self._grow(worker, max(0, sources), max(0, destinations))
                # It compares its new connections with its own first ones, not with a size it may not have seen.
                self._assign(worker, expect=False)

    def place(self, now: float) -> None:
        """Give connections to those who stand by, as far as there are some."""
        while self._standby and self.is_open and self._has_room():
            _, worker = self._standby.popitem(last=False)
            places = self.active_max - self.active_count
            self.active_count += 1
            self._grow(worker, -(-self._source_budget // places), -(-self._destination_budget // places))
            if self.plan is None:
                worker.open_by = now + OPEN_SECONDS
                self.arm(worker)
            self._assign(worker, expect=True)

    def read_back(self) -> None:
        """Everything is copied: from now on leases are about what was written, over the same connections."""
        self._options = replace(self._options, mode="read-back")
        for worker in self.workers.values():
            worker.wanted = 0
            worker.holding = None
            if worker.assigned and worker.state in LIVE:
                self._assign(worker, expect=False)

    def assign(self, worker: Worker) -> None:
        """Answer a Hello with the job and the share the worker has, which may be none."""
        self._assign(worker, expect=True)

    def _has_room(self) -> bool:
        if self.plan is not None and self.plan.single_writer and self.unfenced:
            return False
        return self.active_count < self.active_max and self._source_budget > 0 and self._destination_budget > 0

    def _grow(self, worker: Worker, sources: int, destinations: int) -> None:
        worker.source_share += sources
        worker.destination_share += destinations
        self._source_budget -= sources
        self._destination_budget -= destinations

    def _assign(self, worker: Worker, *, expect: bool) -> None:
        job = self._job
        source = destination = None
        if expect and self._expected is not None:
            source, destination = self._expected
            if job.destination_grows and destination.size is not None and self.plan is not None:  # prepared since
                destination = replace(destination, size=self.plan.size)
        message = Assign(
            job.uuid,
            job.epoch,
            source=job.source,
            destinations=list(job.destinations),
            options=self._options,
            source_connections=worker.source_share,
            destination_connections=worker.destination_share,
            heartbeat_seconds=job.heartbeat_seconds,
            lease_seconds=job.granted_seconds,
            expected_source=source,
            expected_destinations=None if destination is None else [destination],
        )
        self._outbox.send(worker, message)

    # -- flushes, heartbeats and alarms --------------------------------------------------------------------------------

    def flush_begins(self, worker: Worker, flush: FlushAsked) -> None:
        """It was asked to flush."""
        worker.flush = flush
        self.flushing_count += 1
        self.arm(worker)

    def flush_over(self, worker: Worker) -> None:
        """Its flush was answered, or never will be."""
        if worker.flush is not None:
            worker.flush = None
            self.flushing_count -= 1

    def next_in_turn(self, count: int) -> Iterator[Worker]:
        """The next `count` workers; after everybody else has been, they come again. `count` is at most their number."""
        for _ in range(count):
            identity, worker = next(iter(self.workers.items()))
            self.workers.move_to_end(identity)
            yield worker

    def arm(self, worker: Worker) -> None:
        """Look at `worker` when it is due. Being heard of only puts that off, so no message has to come here."""
        due = worker.due(self._job.lease_seconds)
        if due < worker.alarm:
            worker.alarm = due
            self._alarms_set += 1
            heappush(self._alarms, (due, self._alarms_set, worker.identity))

    def next_alarm(self) -> float:
        """When `due` may have somebody to tell of; never too late, perhaps too early."""
        return self._alarms[0][0] if self._alarms else inf

    def due(self, now: float) -> Iterator[Worker]:
        """Those about whom something is to be done now; each must be given a later time, or removed."""
        while self._alarms and self._alarms[0][0] <= now:
            when, _, identity = heappop(self._alarms)
            worker = self.workers.get(identity)
            if worker is None or worker.alarm != when:
                continue  # an entry that an earlier one replaced
            worker.alarm = inf
            if worker.due(self._job.lease_seconds) <= now:
                yield worker
            if identity in self.workers:
                self.arm(worker)

    # -- the invariants ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise BugError if a count, a budget or the single writer's rule does not hold."""
        workers = self.workers.values()
        assigned = [worker for worker in workers if worker.assigned]
        live = [w for w in workers if w.state in LIVE]
        counts = (
            (self.active_count, len(assigned), "workers with a share"),
            (self.live_count, len(live), "live workers"),
            (self.ready_count, sum(w.state is WorkerState.READY for w in live), "ready workers"),
            (self.waiting_count, sum(w.state is WorkerState.WAITING for w in live), "waiting workers"),
            (self.flushing_count, sum(w.flush is not None for w in workers), "flushing workers"),
            (self.source_connections, sum(w.source_connections for w in workers), "source connections"),
            (self._source_budget, self._source_total - sum(w.source_share for w in assigned), "sources left"),
            (
                self._destination_budget,
                self._destination_total - sum(w.destination_share for w in assigned),
                "destinations left",
            ),
        )
        for counted, real, what in counts:
            if counted != real:
                raise BugError(f"{what}: {counted} were counted, {real} are there")
        if any(worker.identity in self.unfenced for worker in workers):
            raise BugError("a worker is both there and unfenced")
        if self.plan is not None and self.plan.single_writer:
            writers = [worker.name for worker in workers if worker.destination_connections > 0]
            if len(writers) > 1 or any(worker.destination_connections > 1 for worker in workers):
                raise BugError(f"the destination takes one writer only, and has {', '.join(writers)}")
