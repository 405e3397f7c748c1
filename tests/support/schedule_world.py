"""A world for the scheduler, made from one seed: workers that die, freeze, lose connections and repeat themselves.

The reference is the simulated disk. A server keeps what was written in its cache until a flush on the connection
generation that wrote it; a restart of the server loses the cache and every connection. A flush that fails loses part of
what anybody wrote, and tells only the one who asked for it: the next flush succeeds. So a scheduler that calls a
range durable too early, forgets one, or lets two processes write to the same bytes is found out by the disk itself.

The journal holds what `Journal` instructions told. It survives the coordinator, which may crash between any two
instructions; the next one begins with what the journal has. What it has must be on the disk at every moment.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import msgspec
from msgspec.structs import replace

from nbdshard.common import messages
from nbdshard.common.limits import MIB
from nbdshard.common.messages import Counters, EndpointDescription, FromCoordinator, FromWorker
from nbdshard.common.nbd.hints import Hints
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.instructions import Finish, Forget, Instruction, Journal, Kill, Prepare, Send, Start
from nbdshard.coordinator.job import Job, Outcome
from nbdshard.coordinator.scheduler import Scheduler
from support import schedules

UNIT = 64 * 1024


class BrokenPromise(AssertionError):
    """The journal and the disk do not agree."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances per step of a worker's life, and until when (seconds) anything goes wrong at all."""

    until: float = 60.0
    crash: float = 0.0
    freeze: float = 0.0
    drop_connection: float = 0.0
    leave: float = 0.0
    restart_server: float = 0.0
    open_fails: float = 0.0
    never_opens: float = 0.0
    loses_message: float = 0.0
    repeats_message: float = 0.0
    ignores_stop: float = 0.0
    flush_fails: float = 0.0
    coordinator_crash: float = 0.0  # for each instruction
    tells_lives: bool = False  # the destination's server names its life, which is another one after each restart


@dataclass(eq=False, slots=True)
class Process:
    """A simulated worker. `leases` are those it may still write under; `generation` counts its connections' lives."""

    name: str
    is_alive: bool = True
    is_frozen: bool = False
    said_goodbye: bool = False
    is_open: bool = False
    share: tuple[int, int] = (0, 0)
    generation: int = 0
    heard: float = 0.0
    leases: dict[int, messages.Lease] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)  # lease -> how many of its units are written
    unnoted: dict[int, messages.Written] = field(default_factory=dict)
    covered: set[int] = field(default_factory=set)  # leases written by connections that still live
    inbox: list[FromCoordinator] = field(default_factory=list)


class World:
    """Everything around one scheduler: a clock, processes, a network and a disk."""

    def __init__(
        self,
        seed: int,
        job: Job,
        source: EndpointDescription,
        destination: EndpointDescription,
        faults: Faults,
        remote_workers: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.job = job
        self.source = source
        self.destination = destination
        self.faults = faults
        self.now = 0.0
        self.scheduler = Scheduler(job, self.now)
        self.processes: dict[str, Process] = {}
        self.outcomes: list[Outcome] = []
        self.cached: dict[int, tuple[str, int]] = {}  # unit -> who wrote it last, in which generation
        self.durable: set[int] = set()
        self.journaled: set[int] = set()
        self.coordinator_crashes = 0
        self.given_up: set[str] = set()
        self.lease_ranges: dict[int, messages.Lease] = {}
        self.life = 0
        self._names = (f"w{number}" for number in count())
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._remote_workers = remote_workers

    # -- the loop ------------------------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), action))

    def run(self, seconds_max: float) -> Outcome:
        """Run to the end; fails when there is none within `seconds_max` of simulated time."""
        self._begin()
        while not self.outcomes:
            deadline = self.scheduler.deadline()
            if self._events and self._events[0][0] <= deadline:
                self.now, _, action = heapq.heappop(self._events)
                action()
            else:
                assert deadline < seconds_max, f"nothing happens any more: {self.scheduler.status()}"
                self.now = max(self.now, deadline)
                self.act(self.scheduler.tick(self.now))
            assert self.now < seconds_max, f"no end: {self.scheduler.status()}"
        for process in self.processes.values():
            self.act(self.scheduler.message(process.name, schedules.alive(), self.now))
        self.act(self.scheduler.tick(self.now + 1000))
        (outcome,) = self.outcomes
        return outcome

    def _begin(self) -> None:
        for _ in range(self._remote_workers):
            self.later(self.random.uniform(0, 5), self.start_process)
        if self.faults.restart_server:
            self.later(1.0, self._maybe_restart_server)
        self.act(self.scheduler.start())

    def restart_coordinator(self) -> None:
        """It is gone, and its workers with it: they miss its heartbeat, or are killed. The next one has the journal."""
        for process in self.processes.values():
            process.is_alive = process.is_open = False
            process.leases.clear()
        self.processes.clear()
        self.outcomes.clear()
        self._events.clear()
        self.given_up.clear()
        durable = RangeSet(Range.of(unit * UNIT, UNIT) for unit in self.journaled)
        self.job = replace(self.job, durable=tuple(durable))
        self.scheduler = Scheduler(self.job, self.now)

    def act(self, instructions: list[Instruction]) -> None:
        self.scheduler.validate()
        assert not (instructions and self.outcomes), "something came after Finish"
        for position, instruction in enumerate(instructions):
            if self.chance(self.faults.coordinator_crash):
                self.coordinator_crashes += 1
                self.restart_coordinator()
                self._begin()
                return
            match instruction:
                case Send(name, message):
                    self._send(name, message)
                case Start(number):
                    for _ in range(number):
                        self.later(self.random.uniform(0.05, 0.5), self.start_process)
                case Kill(name):
                    self.die(self.processes[name], "killed by SIGKILL")
                case Prepare():
                    self.later(self.random.uniform(0, 0.2), lambda: self.act(self.scheduler.prepared(self.now)))
                case Forget():
                    pass
                case Journal(durable, demoted):
                    self.journaled.difference_update(unit for piece in demoted for unit in units_of(piece))
                    self.journaled.update(unit for piece in durable for unit in units_of(piece))
                    self._check_journal()
                case Finish(outcome):
                    assert position == len(instructions) - 1
                    self.outcomes.append(outcome)

    def chance(self, probability: float) -> bool:
        return self.now < self.faults.until and self.random.random() < probability

    # -- the network: in order, with delays ----------------------------------------------------------------------------

    def _send(self, name: str, message: FromCoordinator) -> None:
        process = self.processes[name]
        if isinstance(message, messages.Lease):
            self._check_fence(process, message)
            if again := self.journaled.intersection(units_of(message.range)):
                raise BrokenPromise(f"units {sorted(again)} are copied again, though the journal has them")
            self.lease_ranges[message.lease] = message
            if process.is_alive and not process.said_goodbye:
                process.leases[message.lease] = message  # it may write from now on
        if isinstance(message, messages.Assign) and message.destination_connections:
            self._check_single_writer(process)
        if isinstance(message, messages.Stop) and message.now and not self.job.local_workers:
            self.given_up.add(name)
        process.inbox.append(message)
        self.later(self.random.uniform(0.0001, 0.02), lambda: self._deliver(process))

    def _deliver(self, process: Process) -> None:
        if process.is_alive and not process.is_frozen and not process.said_goodbye and process.inbox:
            self.hear(process, process.inbox.pop(0))

    def say(self, process: Process, message: FromWorker) -> None:
        if not process.is_alive or (process.said_goodbye and not isinstance(message, messages.Goodbye)):
            return
        if isinstance(message, messages.Written | messages.Alive) and self.chance(self.faults.loses_message):
            return
        times = 2 if self.chance(self.faults.repeats_message) else 1
        for _ in range(times):
            if not process.is_alive:
                return  # the coordinator crashed at the first one
            self.act(self.scheduler.message(process.name, message, self.now))

    # -- processes -----------------------------------------------------------------------------------------------------

    def start_process(self) -> None:
        process = Process(next(self._names), heard=self.now)
        self.processes[process.name] = process
        if self.chance(self.faults.crash):
            process.is_alive = False
            if self.job.local_workers:
                self.act(self.scheduler.worker_unstartable("exited with status 1", self.now))
            return
        machine = "here" if self.job.local_workers else "elsewhere"
        self.say(process, schedules.hello(process.name, machine=machine))
        self.later(self.job.heartbeat_seconds, lambda: self.beat(process))

    def beat(self, process: Process) -> None:
        """Its heartbeat, and the moment at which its misfortunes strike."""
        if not process.is_alive or process.said_goodbye:
            return
        self.later(self.job.heartbeat_seconds, lambda: self.beat(process))
        if self.chance(self.faults.crash):
            self.die(process, "killed by SIGSEGV")
        elif self.chance(self.faults.freeze):
            process.is_frozen = True
            self.later(self.random.choice((3.0, 15.0, 200.0)), lambda: self.thaw(process))
        elif self.chance(self.faults.leave):
            self.goodbye(process, "asked to leave")
        elif self.chance(self.faults.drop_connection):
            self.lose_connections(process, reopens=self.random.random() < 0.5)
        elif not process.is_frozen:
            self._expire(process)
            for report in list(process.unnoted.values()):
                self.say(process, report)
            self.say(process, schedules.alive())
            if process.is_open:
                self.want(process)

    def die(self, process: Process, reason: str) -> None:
        if not process.is_alive:
            return
        process.is_alive = process.is_open = False
        process.leases.clear()
        if self.job.local_workers:
            self.later(
                self.random.uniform(0.001, 0.1),
                lambda: self.act(self.scheduler.worker_gone(process.name, reason, self.now)),
            )

    def thaw(self, process: Process) -> None:
        process.is_frozen = False
        self._expire(process)
        while process.is_alive and process.inbox and not process.said_goodbye:
            self.hear(process, process.inbox.pop(0))

    def _expire(self, process: Process) -> None:
        if self.now - process.heard > self.job.lease_seconds:
            self._fail_leases(process, "the lease expired")

    def _fail_leases(self, process: Process, text: str) -> None:
        for held in list(process.leases.values()):
            process.leases.pop(held.lease, None)
            self.say(process, schedules.failed(held, "connection", text))

    def goodbye(self, process: Process, reason: str) -> None:
        process.is_open = False
        process.leases.clear()
        process.said_goodbye = True
        self.say(process, schedules.goodbye(reason))
        if self.job.local_workers:
            self.later(0.01, lambda: self.die(process, "exited with status 0"))

    def lose_connections(self, process: Process, *, reopens: bool) -> None:
        if not process.is_open or not process.is_alive:
            return
        process.generation += 1
        process.covered.clear()
        process.begun.clear()
        if process.is_frozen:
            return
        self._fail_leases(process, "connection reset by peer")
        if not reopens:
            process.is_open = False
            process.leases.clear()  # what was granted meanwhile finds no connection
            self.say(process, schedules.open_failed("connection reset by peer"))

    def _maybe_restart_server(self) -> None:
        self.later(1.0, self._maybe_restart_server)
        if self.chance(self.faults.restart_server):
            self.cached.clear()
            self.life += 1
            for process in list(self.processes.values()):
                notices = not self.faults.tells_lives or self.random.random() < 0.5
                self.lose_connections(process, reopens=notices)

    # -- what a worker does --------------------------------------------------------------------------------------------

    def hear(self, process: Process, message: FromCoordinator) -> None:
        process.heard = self.now
        match message:
            case messages.Assign():
                share = (message.source_connections, message.destination_connections)
                if min(share) > 0 and share != process.share:
                    process.share = share
                    self.later(self.random.uniform(0.01, 0.3), lambda: self.open(process))
            case messages.Lease():
                self.later(self.random.uniform(0.05, 1.0), lambda: self.work(process, message))
            case messages.Noted(lease=lease):
                process.unnoted.pop(lease, None)
            case messages.Flush():
                generation = process.generation
                self.later(self.random.uniform(0.01, 1.0), lambda: self.flush(process, message, generation))
            case messages.Stop(now=at_once):
                if at_once or not self.chance(self.faults.ignores_stop):
                    self.later(self.random.uniform(0, 0.1), lambda: self.stop(process))
            case messages.Refused():
                process.said_goodbye = True
            case messages.AliveToo() | messages.Revoke():
                pass

    def stop(self, process: Process) -> None:
        if process.is_alive and not process.is_frozen and not process.said_goodbye:
            self.goodbye(process, "")

    def open(self, process: Process) -> None:
        if not process.is_alive or process.is_frozen or process.said_goodbye:
            return
        if self.chance(self.faults.never_opens):
            return
        if not process.is_open and self.chance(self.faults.open_fails):
            self.say(process, schedules.open_failed("connection refused"))
            return
        process.is_open = True
        sources = self.random.randint(1, process.share[0]) if self.source.can_multi_conn else 1
        targets = self.random.randint(1, process.share[1]) if self.destination.can_multi_conn else 1
        self.say(process, schedules.opened(self.source, self._described(), (sources, targets)))
        self.want(process)

    def _described(self) -> EndpointDescription:
        """The destination as it is now."""
        if not self.faults.tells_lives:
            return self.destination
        return replace(self.destination, hints=Hints(instance=f"{self.life:08x}-0000-4000-8000-000000000000"))

    def want(self, process: Process) -> None:
        room = 2 - len(process.leases)
        if room > 0 and process.is_open:
            self.say(process, schedules.wanted(room))

    def work(self, process: Process, lease: messages.Lease) -> None:
        """A piece of a lease: some progress, or all the rest of it."""
        if not process.is_alive or lease.lease not in process.leases or process.said_goodbye:
            return
        if process.is_frozen:
            self.later(1.0, lambda: self.work(process, lease))
            return
        self._expire(process)
        if lease.lease not in process.leases:
            return
        if self.random.random() < 0.4:
            done = self.random.randrange(lease.range.length)
            self._write(process, lease, done // UNIT)
            self.say(process, schedules.progress(lease, done))
            self.later(self.random.uniform(0.05, 1.0), lambda: self.work(process, lease))
            return
        self._write(process, lease, lease.range.length // UNIT)
        process.covered.add(lease.lease)
        del process.leases[lease.lease]
        report = messages.Written(schedules.UUID, schedules.EPOCH, lease.lease, Counters(copied=lease.range.length))
        process.unnoted[lease.lease] = report
        self.say(process, report)
        self.want(process)

    def flush(self, process: Process, asked: messages.Flush, generation: int) -> None:
        """Flush what the living connections wrote; what others wrote is not ours to vouch for."""
        if not process.is_alive or process.is_frozen or process.said_goodbye:
            return
        covered = sorted(process.covered) if generation == process.generation else []
        failure = None
        if self.chance(self.faults.flush_fails):
            failure = schedules.error("request", "flush failed: EIO")
            for unit in list(self.cached):
                if unit not in self.durable and self.random.random() < 0.5:
                    del self.cached[unit]
        else:
            for lease in covered:
                for unit in units_of(self.lease_ranges[lease].range):
                    if self.cached.get(unit) == (process.name, generation):
                        self.durable.add(unit)
            if self.faults.tells_lives and self.destination.can_multi_conn and generation == process.generation:
                # A flush on any connection is one for all; here for the same worker's, whose connections are gone.
                self.durable.update(unit for unit, (name, _) in self.cached.items() if name == process.name)
            process.covered.difference_update(covered)
        answer = messages.Flushed(schedules.UUID, schedules.EPOCH, asked.flush, covered, True, failure)
        self.later(self.random.uniform(0.0, 1.0), lambda: self.answer(process, answer, generation))

    def answer(self, process: Process, answer: messages.Flushed, generation: int) -> None:
        """The server's answer arrives, if the connection it was asked on still lives."""
        if process.is_frozen:
            self.later(1.0, lambda: self.answer(process, answer, generation))
            return
        if generation != process.generation:
            lost = schedules.error("connection", "connection lost while flushing")
            answer = msgspec.structs.replace(answer, leases=[], error=lost)
        self.say(process, answer)

    def _write(self, process: Process, lease: messages.Lease, count: int) -> None:
        """The server has the first `count` units of `lease` in its cache."""
        for unit in units_of(lease.range)[process.begun.get(lease.lease, 0) : count]:
            self.cached[unit] = (process.name, process.generation)
            self.durable.discard(unit)
        process.begun[lease.lease] = max(count, process.begun.get(lease.lease, 0))
        self._check_journal()

    # -- what must never happen ----------------------------------------------------------------------------------------

    def _check_fence(self, process: Process, lease: messages.Lease) -> None:
        """Nobody else that is known to live may still write to the bytes of a lease that is given out."""
        for other in self.processes.values():
            if other.name in self.given_up:
                continue  # a lease is no fence: it checks its own clock, and the outcome names it until its Goodbye
            for held in other.leases.values():
                assert not held.range.overlaps(lease.range), f"{other.name} and {process.name} at {lease.range}"

    def _check_journal(self) -> None:
        """What the journal has would survive the server's crash at this very moment."""
        if lost := self.journaled - self.durable:
            raise BrokenPromise(f"units {sorted(lost)} are in the journal, and not on the disk")

    def _check_single_writer(self, process: Process) -> None:
        """Nobody else has a connection to a destination that takes one writer only."""
        if not self.destination.can_multi_conn:
            others = [other.name for other in self.processes.values() if other is not process and other.is_open]
            assert others == [], f"{process.name} may write besides {others}"

    def lost_units(self) -> list[int]:
        """The units of the export that are not durable."""
        assert self.source.size is not None
        return [unit for unit in range(self.source.size // UNIT) if unit not in self.durable]


def units_of(piece: Range) -> range:
    return range(piece.start // UNIT, piece.end // UNIT)


def small_job(**changes: object) -> Job:
    """64 ranges of 64 KiB for several workers: the smallest there are, so that a run is short."""
    return schedules.job(**{"workers": 4, "range_size": UNIT, **changes})


def small_disk(**changes: object) -> EndpointDescription:
    return schedules.server(4 * MIB, **changes)
