"""A scheduler and its workers in few words: what a worker would send, and what is to come back."""

from __future__ import annotations

from msgspec.structs import replace

from nbdshard.common import messages
from nbdshard.common.limits import GIB, MIB
from nbdshard.common.messages import (
    Counters,
    EndpointAddress,
    EndpointDescription,
    ErrorReport,
    FromCoordinator,
    FromWorker,
    Hello,
    JobOptions,
    Side,
)
from nbdshard.common.ranges import Range
from nbdshard.coordinator.instructions import Finish, Instruction, Send
from nbdshard.coordinator.job import Job, Outcome, Pace, Verdict
from nbdshard.coordinator.scheduler import Scheduler

UUID = "6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e11"
EPOCH = 3
OPTIONS = JobOptions(request_size=MIB, requests=64, queue_size=16 * MIB, sparse_unit=None)
SOURCE = EndpointAddress("nbd", "nbd://source.example/disk")
DESTINATION = EndpointAddress("nbd", "nbd://destination.example/disk")
SERVER = EndpointDescription(peer="nbd://server", size=None, can_multi_conn=True, can_flush=True, can_zero=True)


DISK = replace(SERVER, size=8 * MIB)
BIG = replace(SERVER, size=GIB)


def job(**changes: object) -> Job:
    """A job over TCP servers, 4 connections a side, changed as told."""
    whole = Job(UUID, EPOCH, SOURCE, (DESTINATION,), OPTIONS, connections=4, workers=1, machine="here")
    return replace(whole, **changes)


def server(size: int | None, **changes: object) -> EndpointDescription:
    """An NBD server that can all there is, changed as told."""
    return replace(SERVER, size=size, **changes)


def hello(name: str, **changes: object) -> Hello:
    whole = Hello(messages.PROTOCOL_VERSION, name, "here", f"host-{name}", 100, "epoll")
    return replace(whole, **changes)


def opened(
    source: EndpointDescription, destination: EndpointDescription, connections: tuple[int, int] = (1, 1)
) -> messages.Opened:
    return messages.Opened(UUID, EPOCH, source, [destination], *connections)


def wanted(leases: int = 1) -> messages.Wanted:
    return messages.Wanted(UUID, EPOCH, leases)


def written(lease: messages.Lease, end: int | None = None) -> messages.Written:
    """All of `lease` was copied."""
    length = lease.range.length if end is None else end - lease.range.start
    return messages.Written(UUID, EPOCH, lease.lease, Counters(copied=length), end)


def progress(lease: messages.Lease, done: int) -> messages.Progress:
    return messages.Progress(UUID, EPOCH, lease.lease, Counters(copied=done))


def failed(lease: messages.Lease, kind: str, text: str) -> messages.Failed:
    return messages.Failed(UUID, EPOCH, lease.lease, error(kind, text))


def open_failed(text: str, kind: str = "connection", side: Side | None = None) -> messages.OpenFailed:
    return messages.OpenFailed(UUID, EPOCH, replace(error(kind, text), side=side))


def flushed(
    flush: messages.Flush, *leases: messages.Lease, durable: bool = True, failure: ErrorReport | None = None
) -> messages.Flushed:
    return messages.Flushed(UUID, EPOCH, flush.flush, [lease.lease for lease in leases], durable, failure)


def alive(at: float = 0.0) -> messages.Alive:
    """Said `at` that moment by the worker's own clock."""
    return messages.Alive(UUID, EPOCH, at)


def goodbye(reason: str = "") -> messages.Goodbye:
    return messages.Goodbye(UUID, EPOCH, reason)


def error(kind: str, text: str) -> ErrorReport:
    return ErrorReport(kind, text)  # type: ignore[arg-type]


class Stage:
    """A scheduler under test. Every step is validated; `now` moves by `wait`, which ticks at each deadline."""

    def __init__(self, what: Job, now: float = 1000.0) -> None:
        self.job = what
        self.now = now
        self.scheduler = Scheduler(what, now)
        self.sent: dict[str, list[FromCoordinator]] = {}
        self.outcomes: list[Outcome] = []

    def _note(self, instructions: list[Instruction]) -> list[Instruction]:
        self.scheduler.validate()
        for instruction in instructions:
            if isinstance(instruction, Send):
                self.sent.setdefault(instruction.worker, []).append(instruction.message)
            if isinstance(instruction, Finish):
                self.outcomes.append(instruction.outcome)
        assert len(self.outcomes) <= 1
        return instructions

    def start(self) -> list[Instruction]:
        return self._note(self.scheduler.start())

    def say(self, worker: str, *said: FromWorker) -> list[Instruction]:
        """`worker` sends these; the instructions that follow from all of them."""
        followed: list[Instruction] = []
        for message in said:
            followed += self._note(self.scheduler.message(worker, message, self.now))
        return followed

    def gone(self, worker: str, reason: str = "killed by SIGKILL") -> list[Instruction]:
        return self._note(self.scheduler.worker_gone(worker, reason, self.now))

    def unstartable(self, reason: str) -> list[Instruction]:
        return self._note(self.scheduler.worker_unstartable(reason, self.now))

    def prepared(self) -> list[Instruction]:
        return self._note(self.scheduler.prepared(self.now))

    def prepare_failed(self, text: str) -> list[Instruction]:
        return self._note(self.scheduler.prepare_failed(text, self.now))

    def stop(self) -> list[Instruction]:
        return self._note(self.scheduler.stop("stopped by SIGINT", self.now))

    def set_pace(self, pace: Pace) -> list[Instruction]:
        return self._note(self.scheduler.set_pace(pace, self.now))

    def fail(self, text: str) -> list[Instruction]:
        return self._note(self.scheduler.fail(text, self.now))

    def wait(self, seconds: float, *awake: str) -> list[Instruction]:
        """Let time pass, ticking at every deadline; the workers `awake` are heard of once a second."""
        followed: list[Instruction] = []
        end = self.now + seconds
        while self.now < end:
            self.now = max(self.now + 0.001, min(self.now + 1.0, end, self.scheduler.deadline()))
            for worker in awake:
                followed += self.say(worker, alive())
            followed += self._note(self.scheduler.tick(self.now))
        return followed

    def join(
        self,
        worker: str,
        source: EndpointDescription,
        destination: EndpointDescription,
        connections: tuple[int, int] = (1, 1),
    ) -> list[Instruction]:
        """`worker` says Hello and opens both sides."""
        return self.say(worker, hello(worker)) + self.say(worker, opened(source, destination, connections))

    @property
    def outcome(self) -> Outcome:
        """The outcome of a job that must have finished."""
        (outcome,) = self.outcomes
        return outcome


def leases_in(instructions: list[Instruction]) -> list[messages.Lease]:
    return [
        item.message for item in instructions if isinstance(item, Send) and isinstance(item.message, messages.Lease)
    ]


def flushes_in(instructions: list[Instruction]) -> list[messages.Flush]:
    return [
        item.message for item in instructions if isinstance(item, Send) and isinstance(item.message, messages.Flush)
    ]


def without_beats(instructions: list[Instruction]) -> list[Instruction]:
    """Without the heartbeats that came in between."""
    return [
        item for item in instructions if not (isinstance(item, Send) and isinstance(item.message, messages.AliveToo))
    ]


def lease(number: int, start: int, end: int, seconds: float = 86_400.0, *, until_end: bool = False) -> messages.Lease:
    """The message that grants [start, end)."""
    return messages.Lease(UUID, EPOCH, number, Range(start, end), seconds, until_end)


def stop(worker: str, reason: str, *, now: bool = False) -> Send:
    """The instruction to tell `worker` to stop."""
    return Send(worker, messages.Stop(UUID, EPOCH, reason, now))


def stops(followed: list[Instruction]) -> list[tuple[str, str]]:
    """Who was told to stop, and why."""
    return [
        (item.worker, item.message.reason)
        for item in followed
        if isinstance(item, Send) and isinstance(item.message, messages.Stop)
    ]


def copying(
    workers: int = 1, *, local: bool = True, disk: EndpointDescription | None = None, salvage: bool = False
) -> Stage:
    """A job with as many READY workers "a", "b", ... and no lease yet."""
    disk = disk or server(8 * MIB)
    small: dict[str, object] = {} if disk.size != 8 * MIB else {"range_size": 4 * MIB}
    what = job(workers=workers, connections=workers, local_workers=local, **small)
    stage = Stage(replace(what, options=replace(what.options, salvage=salvage)))
    stage.start()
    for name in "abcdefgh"[:workers]:
        stage.join(name, disk, disk)
    return stage


def streaming() -> tuple[Stage, messages.Lease]:
    """A stream into a file, and the one lease of it, which "a" holds."""
    stage = Stage(job(destination_grows=True))
    stage.start()
    stage.join("a", server(None, is_stream=True), server(0))
    stage.prepared()
    (granted,) = leases_in(stage.say("a", wanted(1)))
    return stage, granted


def ended(stage: Stage, *workers: str) -> tuple[Verdict, str]:
    """The verdict and the error, once the workers that are left have said Goodbye."""
    for worker in workers:
        stage.say(worker, goodbye())
    return stage.outcome.verdict, stage.outcome.error
