"""The coordinator's shell, simulated: does what the scheduler says, and looks at every invariant after each event."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from math import isinf

from nbdshard.common.limits import WORKER_START_SECONDS
from nbdshard.common.messages import EndpointDescription, FromWorker, Hello
from nbdshard.coordinator import job
from nbdshard.coordinator.instructions import Finish, Forget, Instruction, Journal, Kill, Prepare, Send, Start
from nbdshard.coordinator.job import Job, Outcome
from nbdshard.coordinator.scheduler import Scheduler
from simulation.channel import Mischief, Wire, decode
from simulation.clock import Pace, SimClock
from simulation.process import SimProcess

Note = Callable[[Journal, tuple[EndpointDescription, EndpointDescription], int, bool], None]
Spawn = Callable[[str, Callable[[FromWorker], None], Callable[[SimProcess, str], None]], SimProcess]


class SimCoordinator:
    """Runs `job`. `spawn` makes a worker process; `log` hears of everything that happens."""

    def __init__(
        self,
        job: Job,
        clock: SimClock,
        chance: random.Random,
        pace: Pace,
        mischief: Mischief,
        spawn: Spawn,
        log: Callable[[str], None],
    ) -> None:
        self.outcome: Outcome | None = None
        self.stopped_at: float | None = None  # when the user first asked for it
        self.processes: dict[str, SimProcess] = {}
        self.scheduler = Scheduler(job, clock.now)
        self.started = 0
        # For a job with a journal: it is told what is durable; and the coordinator may die before any instruction.
        self.note: Note = lambda *_: None
        self.dies_before: Callable[[Instruction], bool] = lambda _: False
        self.crashed = False
        self._heir: SimCoordinator | None = None  # at the same address
        self._strangers: set[str] = set()  # workers of those before
        self._skew = 0.0  # its clock, against the world's
        self._job = job
        self._clock = clock
        self._chance = chance
        self._pace = pace
        self._mischief = mischief
        self._spawn = spawn
        self._log = log
        self._wires: dict[str, tuple[Wire, Wire]] = {}  # of each worker: to it, from it
        self._awaited: set[str] = set()  # local workers that have not said Hello
        self._tick_at = -1.0

    @property
    def is_over(self) -> bool:
        return self.outcome is not None or self.crashed

    def set_pace(self, pace: job.Pace) -> None:
        """The user wants it faster, slower, paused, or to go on."""
        if not self.is_over:
            self._log(f"{pace} by the user")
            self._act(self.scheduler.set_pace(pace, self._now))

    def crash(self) -> None:
        """It is killed. The kernel kills its local workers; those elsewhere go on, and talk to its heir."""
        self._log("the coordinator crashes")
        self.crashed = True
        if self._job.local_workers:
            for process in self.processes.values():
                self._clock.after(self._pace.seconds(), lambda process=process: process.kill("was orphaned"))  # type: ignore[misc]

    def jump(self, seconds: float) -> None:
        """Its clock is so much later all at once: its machine stood still, and nobody else's."""
        self._skew += seconds
        if not self.is_over:
            self._arm()

    @property
    def _now(self) -> float:
        return self._clock.now + self._skew

    def inherit(self, before: SimCoordinator) -> None:
        """Stand where `before` did: what its workers say, and queued for it, comes here."""
        before._heir = self
        for name, process in before.processes.items():
            if not process.ended:
                self.processes[name] = process
                self._wires[name] = (self._wire(), self._wire())
                self._strangers.add(name)

    def start(self) -> None:
        self._act(self.scheduler.start())

    def stop(self) -> None:
        """Ctrl-C."""
        if not self.is_over:
            self._log("stop by the user")
            self.stopped_at = self._clock.now if self.stopped_at is None else self.stopped_at
            self._act(self.scheduler.stop("stopped by SIGINT", self._now))

    def start_worker(self) -> None:
        """One more worker process; it may be killed, but not by us, if the job's workers come from elsewhere."""
        if self.crashed or self._heir is not None:
            return
        self.started += 1
        name = f"{self._chance.getrandbits(128):032x}"
        self._wires[name] = (self._wire(), self._wire())
        self._log(f"start worker {name[:8]}")
        if self._job.local_workers:
            self._awaited.add(name)
            self._clock.after(WORKER_START_SECONDS, lambda: self._not_awaited_any_longer(name))
        self.processes[name] = self._spawn(name, lambda message: self._sent(name, message), self._ended)

    def _wire(self) -> Wire:
        return Wire(self._clock, self._chance, self._pace, self._mischief)

    def _not_awaited_any_longer(self, name: str) -> None:
        if name in self._awaited and not self.crashed:
            self.processes[name].kill("was killed")

    def hold_up(self, name: str, seconds: tuple[float, float]) -> None:
        """Messages to and from this worker are late by so much."""
        for wire, late in zip(self._wires[name], seconds, strict=True):
            wire.hold_up(late)

    # -- what happens --------------------------------------------------------------------------------------------------

    def _sent(self, name: str, message: FromWorker) -> None:
        if self._heir is not None:
            self._heir._sent(name, message)
            return
        self._wires[name][1].send(message, lambda frame: self._arrived(name, frame))

    def _arrived(self, name: str, frame: bytes) -> None:
        if self.is_over:
            return
        message = decode(frame, name)
        self._log(f"{name[:8]} > {message}")
        if isinstance(message, Hello):
            self._awaited.discard(name)
            self._strangers.discard(name)  # it came when the one before was dead: it is ours
        error = getattr(message, "error", None)
        assert error is None or error.kind not in ("bug", "protocol"), f"worker {name[:8]}: {error.text}"
        self._act(self.scheduler.message(name, message, self._now))

    def _ended(self, process: SimProcess, reason: str) -> None:
        """The process has ended; a local one is reaped, after its last messages."""
        self._log(f"{process.name[:8]} ended: {reason}")
        if self._job.local_workers and not self.crashed:
            heard = max(self._clock.now, self._wires[process.name][1].last_arrival)
            self._clock.at(heard + self._pace.seconds(), lambda: self._reaped(process.name, reason))

    def _reaped(self, name: str, reason: str) -> None:
        if self.is_over:
            return
        if name in self._awaited:
            self._awaited.discard(name)
            self._act(self.scheduler.worker_unstartable(reason, self._now))
        else:
            self._act(self.scheduler.worker_gone(name, reason, self._now))

    def _tick(self, when: float) -> None:
        if self._tick_at == when and not self.is_over:
            self._tick_at = -1.0
            self._act(self.scheduler.tick(self._now))

    # -- what is done about it -----------------------------------------------------------------------------------------

    def check_fences(self) -> None:
        """What a worker elsewhere may write to by its own clock has not been taken from it."""
        copying = self.scheduler._copying
        if self._job.local_workers or copying is None or self.is_over:
            return
        for name, process in self.processes.items():
            if name in self._strangers:
                may_write = process.writable() if self._job.is_resumed and copying.ledger.leased_count else []
                assert not may_write, f"ranges are leased while {name[:8]} may write under leases of an earlier run"
                continue
            for number in process.writable():
                holding = copying.ledger.holding(name) if name in copying.ledger.holders else None
                assert holding is not None and number in holding.leased, (
                    f"lease {number} was taken from {name[:8]}, which may still write under it"
                )

    def _act(self, instructions: Iterable[Instruction]) -> None:
        self.scheduler.validate()
        self.check_fences()
        for instruction in instructions:
            assert self.outcome is None, f"{instruction} after Finish"
            if self.dies_before(instruction):
                self.crash()
                return
            self._carry_out(instruction)
        if not self.is_over:
            self._arm()

    def _arm(self) -> None:
        deadline = self.scheduler.deadline()
        if isinf(deadline):
            self._tick_at = -1.0
            return
        when = max(deadline - self._skew, self._clock.now + 0.001)
        if when != self._tick_at:
            self._tick_at = when
            self._clock.at(when + self._pace.seconds(), lambda: self._tick(when))

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Send(worker, message):
                self._log(f"{worker[:8]} < {message}")
                process = self.processes[worker]
                self._wires[worker][0].send(message, process.channel.arrive)
            case Start(count):
                assert self._job.local_workers
                for _ in range(count):
                    self._clock.after(self._pace.seconds(), self.start_worker)
            case Kill(worker):
                self._log(f"kill {worker[:8]}")
                self._clock.after(self._pace.seconds(), lambda: self.processes[worker].kill("was killed"))
            case Prepare(size):
                self._log(f"prepare {size}")
                self._clock.after(self._pace.seconds(), self._prepared)
            case Forget(worker):
                assert worker in self.processes
            case Journal():
                self._log(str(instruction))
                scheduler = self.scheduler
                ends, room = scheduler.ends, scheduler.status().size
                assert ends is not None and room is not None
                self.note(instruction, ends, room, scheduler.is_complete)
            case Finish(outcome):
                self._log(f"finish {outcome}")
                self.outcome = outcome

    def _prepared(self) -> None:
        if not self.is_over:
            self._act(self.scheduler.prepared(self._now))
