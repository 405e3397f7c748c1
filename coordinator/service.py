"""The coordinator's shell: one poll loop around the scheduler. It carries out instructions and decides nothing.

A turn: wait for something to happen or for the next deadline, then hear signals, messages, ended processes, orders of
the user and the clock, in this order, acting on the scheduler's instructions after each until there are none.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
import zmq

from nbdshard.common import logs
from nbdshard.common.channel import CoordinatorChannel
from nbdshard.common.errors import BugError, UserError
from nbdshard.common.limits import (
    COMMAND_GRACE_SECONDS,
    DEPARTURE_SETTLE_SECONDS,
    FINISH_SECONDS_MAX,
    POLL_SECONDS_MAX,
    POLL_SECONDS_MIN,
    WORKER_START_SECONDS,
)
from nbdshard.common.messages import FromCoordinator, Hello
from nbdshard.common.signals import SignalWatch
from nbdshard.common.units import format_seconds
from nbdshard.coordinator.clock import SteadyClock
from nbdshard.coordinator.command_server import CommandServer
from nbdshard.coordinator.control_socket import ControlSocket
from nbdshard.coordinator.instructions import Finish, Forget, Instruction, Journal, Kill, Prepare, Send, Start
from nbdshard.coordinator.job import Job, Outcome, Pace, Status
from nbdshard.coordinator.keeping import Keeper
from nbdshard.coordinator.launcher import Departure, Launcher
from nbdshard.coordinator.progress import Display
from nbdshard.coordinator.scheduler import Scheduler

_NOT_BEGUN: Final = ("opening", "stopping", "done")  # phases in which nothing is copied


class Shell(msgspec.Struct, frozen=True):
    """What the loop works with; whoever made each of these closes it."""

    channel: CoordinatorChannel
    launcher: Launcher | None  # None: workers come from elsewhere
    prepare: Callable[[int], None]  # gives the destination its size; raises UserError
    servers: Sequence[CommandServer]
    display: Display
    signals: SignalWatch
    keeper: Keeper | None = None  # None: nothing of the job is kept
    control: ControlSocket | None = None  # None: nobody can say anything about the job while it runs
    clock: SteadyClock = msgspec.field(default_factory=SteadyClock)
    worker_start_seconds: float = WORKER_START_SECONDS
    finish_seconds: float = FINISH_SECONDS_MAX


def run_job(job: Job, shell: Shell, make_scheduler: Callable[[Job, float], Scheduler] = Scheduler) -> Outcome:
    """Run `job` to its end. Returns whatever happens to the copy; raises only BugError, for a fault of ours.

    However it ends, no local worker is left running.
    """
    shell.signals.counting()
    loop = _Loop(make_scheduler(job, shell.clock()), shell)
    try:
        outcome = loop.run()
        if shell.launcher is not None:
            loop.end_workers()
        return outcome
    finally:
        loop.close()
        shell.display.close()
        if shell.launcher is not None:
            shell.launcher.close(0)


class _Loop:
    def __init__(self, scheduler: Scheduler, shell: Shell) -> None:
        self._scheduler = scheduler
        self._shell = shell
        self._clock = shell.clock
        self._poller = zmq.Poller()
        self._processes = select.epoll()  # of the local workers' pidfds: a turn costs the same however many there are
        self._watched: set[int] = set()
        self._a_process_ended = False
        self._signals_heard = 0
        self._stop_deadline: float | None = None
        self._started: set[str] = set()  # names of all local workers ever started
        self._awaited: dict[str, float] = {}  # local workers without a Hello, and until when
        self._departures: deque[tuple[float, Departure]] = deque()  # heard of; messages may still be on their way
        self._left_servers: dict[str, float] = {}  # servers that ended well, and when that becomes a failure
        self._outcome: Outcome | None = None
        self._is_waiting = False  # for a server that was lost
        for end in shell.channel.sockets:
            self._poller.register(end, zmq.POLLIN)
        servers = [server.descriptor for server in shell.servers]
        orders = [shell.control.descriptor] if shell.control is not None else []
        for descriptor in (shell.signals.descriptor, self._processes.fileno(), *servers, *orders):
            self._poller.register(descriptor, zmq.POLLIN)

    def run(self) -> Outcome:
        """Turn until the scheduler finishes."""
        self._act(self._scheduler.start())
        while self._outcome is None:
            self._wait()
            self._turn()
        self._shell.display.end(self._scheduler.status(), self._outcome, self._clock())
        return self._outcome

    def end_workers(self) -> None:
        """The job is over: who never joined it is killed at once, the others may leave by themselves."""
        launcher = self._shell.launcher
        if launcher is not None:
            for name in self._awaited:
                launcher.kill(name)
            launcher.close()

    def close(self) -> None:
        """Watch nothing any more. Idempotent."""
        self._processes.close()

    def _turn(self) -> None:
        for step in (
            self._hear_signals,
            self._hear_messages,
            self._hear_processes,
            self._hear_servers,
            self._hear_orders,
            self._hear_clock,
        ):
            if self._outcome is not None:
                return
            step()

    def _wait(self) -> None:
        before = self._clock()
        timeout = min(max(self._deadline() - before, POLL_SECONDS_MIN), POLL_SECONDS_MAX)
        ready = self._poller.poll(int(timeout * 1000) + 1)
        self._a_process_ended = any(end == self._processes.fileno() for end, _ in ready)
        self._clock.waited(before, timeout)

    def _deadline(self) -> float:
        deadlines = [self._scheduler.deadline(), self._shell.display.due()]
        deadlines += self._awaited.values()
        deadlines += self._left_servers.values()
        if self._shell.control is not None:
            deadlines.append(self._shell.control.deadline())
        if self._departures:
            deadlines.append(self._departures[0][0])
        return min(deadlines)

    def _watch_processes(self) -> None:
        """Watch exactly the pidfds of the workers that run; the kernel forgets those that are closed."""
        running = set(self._shell.launcher.descriptors) if self._shell.launcher is not None else set[int]()
        for descriptor in running - self._watched:
            self._processes.register(descriptor, select.EPOLLIN)
        self._watched = running

    # -- what happens --------------------------------------------------------------------------------------------------

    def _hear_signals(self) -> None:
        """Each of the first two signals is one wish to stop: softly, then at once."""
        signals = self._shell.signals
        signals.drain()
        while self._signals_heard < min(len(signals.received), 2):
            name = signals.received[self._signals_heard].name
            self._signals_heard += 1
            now = self._clock()
            self._stop_deadline = now + self._shell.finish_seconds
            self._act(self._scheduler.stop(f"stopped by {name}", now))

    def _hear_messages(self) -> None:
        for worker, message in self._shell.channel.receive():
            if self._outcome is not None:
                return
            if self._shell.launcher is not None and worker not in self._started:
                logs.warning(f"worker {worker[:8]} was not started by this coordinator; its message is dropped")
                continue
            if isinstance(message, Hello):
                self._awaited.pop(worker, None)
            self._act(self._scheduler.message(worker, message, self._clock()))

    def _hear_processes(self) -> None:
        """Report ended workers a little later: what they sent last may still be on its way through ZeroMQ's thread."""
        now = self._clock()
        if self._a_process_ended:
            self._reap(now)
        while self._departures and self._departures[0][0] <= now and self._outcome is None:
            _, departure = self._departures.popleft()
            if self._awaited.pop(departure.worker, None) is not None:
                self._act(self._scheduler.worker_unstartable(departure.reason, now))
            else:
                self._act(self._scheduler.worker_gone(departure.worker, departure.reason, now))

    def _reap(self, now: float) -> None:
        assert self._shell.launcher is not None
        for departure in self._shell.launcher.reap():
            logs.debug(departure.reason)
            self._departures.append((now + DEPARTURE_SETTLE_SECONDS, departure))
        self._watch_processes()  # before a new worker's pidfd can get the number of one closed now

    def _hear_servers(self) -> None:
        """A server of ours that failed ends the job; one that left with status 0 does so after a grace."""
        now = self._clock()
        for server in self._shell.servers:
            if server.side not in self._left_servers and server.ended():
                self._poller.unregister(server.descriptor)
                self._left_servers[server.side] = now + (COMMAND_GRACE_SECONDS if server.succeeded else 0)
            if self._left_servers.get(server.side, now + 1) <= now and self._outcome is None:
                self._left_servers[server.side] = float("inf")
                self._act(self._scheduler.fail(server.story(), now))

    def _hear_orders(self) -> None:
        control, now = self._shell.control, self._clock()
        if control is not None:
            status = self._scheduler.status()
            control.note(status, now)
            control.hear(status, self._obey, now)

    def _obey(self, pace: Pace) -> Status:
        if self._scheduler.is_ending:
            raise UserError("the job is ending: its rate does not change any more, and it does not pause or go on")
        self._act(self._scheduler.set_pace(pace, self._clock()))
        return self._scheduler.status()

    def _hear_clock(self) -> None:
        now = self._clock()
        for name in [name for name, until in self._awaited.items() if until <= now]:
            logs.warning(f"worker {name[:8]} did not join within {self._shell.worker_start_seconds:g} s; it is killed")
            self._awaited[name] = float("inf")
            self._kill(name)
        self._act(self._scheduler.tick(now))
        if self._outcome is None and self._shell.keeper is not None:
            try:
                self._shell.keeper.look(now)
            except UserError as error:
                self._act(self._scheduler.fail(str(error), now))
        if self._outcome is None:
            status = self._scheduler.status()
            self._tell_of_waiting(status)
            self._shell.display.show(status, now)
            if self._stop_deadline is not None and now >= self._stop_deadline:
                waited = f"{self._shell.finish_seconds:g} s"
                raise BugError(f"the scheduler did not finish within {waited} of being told to stop")

    def _tell_of_waiting(self, status: Status) -> None:
        """Nobody who looks at a copy that stands still shall have to guess why."""
        if status.waiting_for and not self._is_waiting:
            patience = format_seconds(status.waiting_seconds_max)
            logs.warning(f"{status.waiting_for}; waiting for it up to {patience}")
        elif self._is_waiting and not status.waiting_for and status.workers:
            logs.warning("connected again")
        self._is_waiting = bool(status.waiting_for)

    # -- what is done about it -----------------------------------------------------------------------------------------

    def _act(self, instructions: Iterable[Instruction]) -> None:
        """Carry out `instructions`, and those that follow from them, until there are none."""
        pending = deque(instructions)
        while pending:
            pending.extend(self._carry_out(pending.popleft()))
        self._look_whether_it_began()
        for note in self._scheduler.take_notes():
            logs.info(note)  # a local copy's one line says what its user must know; a coordinator's log says these too

    def _look_whether_it_began(self) -> None:
        keeper, ends = self._shell.keeper, self._scheduler.ends
        if keeper is None or keeper.has_begun or ends is None or self._outcome is not None:
            return
        status = self._scheduler.status()
        if status.size is not None and status.phase not in _NOT_BEGUN:
            keeper.begin(ends, status.size, self._clock())

    def _carry_out(self, instruction: Instruction) -> list[Instruction]:
        match instruction:
            case Send(worker, message):
                self._send(worker, message)
            case Start(count):
                return self._start(count)
            case Kill(worker):
                self._kill(worker)
            case Prepare(size):
                return self._prepare(size)
            case Journal():
                return self._journal(instruction)
            case Forget(worker):
                self._awaited.pop(worker, None)
            case Finish(outcome):
                self._outcome = outcome
        return []

    def _send(self, worker: str, message: FromCoordinator) -> None:
        self._shell.channel.send(worker, message)

    def _start(self, count: int) -> list[Instruction]:
        launcher = self._shell.launcher
        if launcher is None:
            raise BugError("asked to start a worker in a job whose workers come from elsewhere")
        more: list[Instruction] = []
        for _ in range(count):
            try:
                name = launcher.start()
            except UserError as error:
                more += self._scheduler.worker_unstartable(str(error), self._clock())
            else:
                self._started.add(name)
                self._awaited[name] = self._clock() + self._shell.worker_start_seconds
        self._watch_processes()
        return more

    def _kill(self, worker: str) -> None:
        if self._shell.launcher is not None:
            self._shell.launcher.kill(worker)

    def _journal(self, change: Journal) -> list[Instruction]:
        keeper, ends, size = self._shell.keeper, self._scheduler.ends, self._scheduler.status().size
        if keeper is None or ends is None or size is None:
            return []
        try:
            keeper.note(change, ends, size, is_last=self._scheduler.is_complete)
        except UserError as error:
            if self._scheduler.is_complete:
                logs.warning(str(error))  # every byte is copied all the same
            return self._scheduler.fail(str(error), self._clock())
        return []

    def _prepare(self, size: int) -> list[Instruction]:
        try:
            self._shell.prepare(size)
        except UserError as error:
            return self._scheduler.prepare_failed(str(error), self._clock())
        return self._scheduler.prepared(self._clock())
