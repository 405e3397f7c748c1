"""The coordinator's machine: what happens comes in, instructions come out. Pure; time is an argument.

Every method that takes an event returns the instructions to carry out, in order. The shell's duties: pass on every
message with the sender's routing identity, call `tick` at `deadline()`, carry out what comes back. `Finish` comes
exactly once; after it every event is taken and nothing is answered.

The way of a job: one worker, the scout, opens both ends; the planner looks at them; the destination is prepared;
workers ask for leases and report them written; those that wrote flush; all are told to stop; when the last one has
left, or is known dead, or was waited for long enough, the job is over. Failures and a stop by the user take the same
way out.

What comes late (of another job or epoch, about a lease that is no longer valid, from a worker that was told to stop) is
dropped and counted in `dropped`.
"""

from __future__ import annotations

from math import inf
from typing import assert_never

from nbdshard.common.errors import BugError, IllegalEvent, UserError
from nbdshard.common.limits import (
    DRAIN_SECONDS,
    IDLE_JOB_SECONDS,
)
from nbdshard.common.messages import (
    Alive,
    Compared,
    EndpointDescription,
    ErrorReport,
    Failed,
    Flushed,
    FromWorker,
    Goodbye,
    Hello,
    Leaves,
    Opened,
    OpenFailed,
    Progress,
    Wanted,
    Written,
)
from nbdshard.coordinator.admission import disagreement
from nbdshard.coordinator.comparing import Comparing
from nbdshard.coordinator.copying import Copying, Trouble, blame
from nbdshard.coordinator.deadlines import Deadlines
from nbdshard.coordinator.ending import error_line, one_line, stopped_line
from nbdshard.coordinator.instructions import Instruction, Prepare
from nbdshard.coordinator.job import Job, Outcome, Pace, Status, Verdict
from nbdshard.coordinator.membership import Membership
from nbdshard.coordinator.planner import check_job
from nbdshard.coordinator.states import JOBS, RECEPTION, JobEvent, Phase, Reception, WorkerState
from nbdshard.coordinator.workers import Worker

_PAUSABLE = frozenset({Phase.OPENING, Phase.COPYING, Phase.VERIFYING})


class Scheduler(Membership):
    """One job, from `start` to `Finish`. Times are monotonic seconds."""

    def __init__(self, job: Job, now: float) -> None:
        super().__init__(job, now)
        self._is_started = False
        self._deadlines = Deadlines(job, self._crew, now)
        # A coordinator that was killed leaves workers elsewhere that may write until their leases end. They may be
        # stopped or out of reach, and nobody has their names: the next one waits for as long as a lease lasts.
        self._grant_from = now
        if job.is_resumed and not job.local_workers:
            self._grant_from += job.lease_seconds
            self._note(
                f"workers of an earlier run may write for {job.lease_seconds:g} s more: nothing is leased sooner"
            )

    # -- what the shell asks -------------------------------------------------------------------------------------------

    @property
    def outcome(self) -> Outcome | None:
        """The outcome once `Finish` was given."""
        return self._outcome

    @property
    def is_complete(self) -> bool:
        """Whether everything is copied, and flushed as asked: only the workers are still to leave."""
        return self._ending is not None and self._ending.verdict is Verdict.COMPLETE

    @property
    def is_ending(self) -> bool:
        """Whether the verdict is known: nothing that the user orders has any effect but to stop at once."""
        return self._ending is not None

    @property
    def ends(self) -> tuple[EndpointDescription, EndpointDescription] | None:
        """What the first worker found, once it has; the destination before it was given its size."""
        return self._ends

    @property
    def pace(self) -> Pace:
        """How fast the user wants it to go."""
        return self._rates.pace

    @property
    def dropped(self) -> int:
        """Messages that came too late to count."""
        return self._dropped + sum(each.dropped for each in (self._copied, self._copying) if each is not None)

    def take_notes(self) -> list[str]:
        """Lines for the log about what went wrong without ending the job; each is given once."""
        taken, self._notes = self._notes, []
        return taken

    def status(self) -> Status:
        crew = self._crew
        phase = Phase.OPENING if self._phase is Phase.PREPARING else self._phase
        return Status(
            size=self._size(),
            counters=self._counters(),
            workers=crew.ready_count,
            source_connections=crew.source_connections,
            destination_connections=crew.destination_connections,
            phase="paused" if self.pace.is_paused and phase in _PAUSABLE else phase.value,
            waiting_for=self._last_reason if self._deadlines.is_waiting else "",
            waiting_seconds=self._deadlines.waited(self._now),
            waiting_seconds_max=self._deadlines.loss_seconds,
            resumed=self._resumed(),
            unreadable_bytes=self._copy.ledger.unreadable.total if self._copy is not None else 0,
            verifies=self._job.verify,
            verified=self._copying.ledger.counters.total if self._copied is not None and self._copying else None,
            pace=self.pace,
        )

    def deadline(self) -> float:
        """When `tick` is due next; infinite when nothing is waited for."""
        if self._phase is Phase.DONE:
            return inf
        beat = self._beat_at if self._crew.workers else inf
        unfenced = self._ending.deadline if self._ending is not None and self._crew.unfenced else inf
        checkpoint = self._copying.flushes.deadline() if self._copying is not None and self._ending is None else inf
        grant = self._grant_from if self._copying is not None and self._now < self._grant_from else inf
        rates = self._rates.deadline() if self._ending is None else inf
        alarms = (unfenced, self._idle_by(), self._stalled_by(), self._crew.next_alarm())
        return min(grant, beat, checkpoint, rates, *alarms)

    def validate(self) -> None:
        """Raise BugError when an invariant does not hold. Looks at everything: for tests."""
        self._crew.validate()
        if self._copying is not None:
            self._copying.validate()
            lost = self._copying.ledger.holders - self._crew.workers.keys()
            if lost and self._ending is None:
                raise BugError(f"workers that are gone hold ranges: {sorted(lost)}")
        if (self._outcome is not None) != (self._phase is Phase.DONE):
            raise BugError(f"in phase {self._phase.name} the outcome is {self._outcome}")
        if (self._ending is not None) != (self._phase in (Phase.STOPPING, Phase.DONE)):
            raise BugError(f"in phase {self._phase.name} the ending is {self._ending}")
        if self._starting < 0:
            raise BugError(f"{self._starting} worker processes are starting")

    # -- what the shell reports ----------------------------------------------------------------------------------------

    def start(self) -> list[Instruction]:
        """Begin. To be called once, before anything else."""
        if self._is_started:
            raise IllegalEvent("job", self._phase.name, "start", "it was started before")
        self._is_started = True
        if self._job.local_workers:
            self._start_workers(1)
        return self._out.take()

    def message(self, worker: str, message: FromWorker, now: float) -> list[Instruction]:
        """`message` came from the worker with the routing identity `worker`."""
        self._now = now
        if self._phase is Phase.DONE:
            self._dropped += 1
            return []
        if isinstance(message, Hello):
            self._hello(worker, message)
        elif (message.job, message.epoch) != (self._job.uuid, self._job.epoch):
            self._dropped += 1
        elif (sender := self._crew.workers.get(worker)) is None:
            self._stranger(worker, message)
        else:
            sender.heard = now
            self._receive(sender, message)
        return self._advance()

    def worker_gone(self, worker: str, reason: str, now: float) -> list[Instruction]:
        """The process of `worker` is known dead: it writes nothing more. `reason` is for the user."""
        self._now = now
        if self._phase is Phase.DONE:
            return []
        record = self._crew.workers.get(worker)
        if record is not None:
            self._ended(record, one_line(reason))
        elif worker in self._departed:
            self._departed.discard(worker)
        elif worker in self._crew.unfenced:
            self._fenced(worker)
        elif self._starting:
            self._not_started(one_line(reason))
        else:
            self._dropped += 1
        return self._advance()

    def worker_unstartable(self, reason: str, now: float) -> list[Instruction]:
        """One of the processes asked for by `Start` could not be started, or ended before its Hello."""
        self._now = now
        if self._phase is not Phase.DONE:
            self._not_started(one_line(reason))
        return self._advance()

    def prepared(self, now: float) -> list[Instruction]:
        """The destination has its size."""
        self._now = now
        if self._phase is Phase.PREPARING:
            self._begin_copying()
        elif self._phase not in (Phase.STOPPING, Phase.DONE):
            raise IllegalEvent("job", self._phase.name, "prepared")
        return self._advance()

    def prepare_failed(self, error: str, now: float) -> list[Instruction]:
        """The destination could not be given its size: `error` is the line for the user."""
        if self._phase not in (Phase.PREPARING, Phase.STOPPING, Phase.DONE):
            raise IllegalEvent("job", self._phase.name, "prepare_failed")
        return self.fail(error, now)

    def stop(self, reason: str, now: float) -> list[Instruction]:
        """The user wants the job to stop; asked a second time (or during the end): at once."""
        self._now = now
        if self._ending is None:
            done = self._counters().total + self._resumed()
            self._end(Verdict.STOPPED, stopped_line(done, self._size()), reason)
        elif self._phase is Phase.STOPPING and not self._ending.at_once:
            self._hurry(self._ending, reason)
        return self._advance()

    def set_pace(self, pace: Pace, now: float) -> list[Instruction]:
        """The user wants it faster, slower, paused, or to go on."""
        self._now = now
        if self._ending is None and pace != self.pace:
            self._deadlines.begin(now)
            self._rates.set(pace, now)
            for worker in self._crew.workers.values():
                worker.tempo.begin(now)
        return self._advance()

    def fail(self, error: str, now: float) -> list[Instruction]:
        """The shell met something that ends the job: `error` is the line for the user."""
        self._now = now
        self._fail(error)
        return self._advance()

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        self._now = now
        if self._phase is Phase.DONE:
            return []
        if now >= self._beat_at:
            self._beat()
        for worker in self._crew.due(now):
            self._look_at(worker)
        if now >= self._idle_by() and self._deadlines.is_waiting:
            text = f"{self._last_reason}; it was waited for {self._deadlines.waited(now):.0f} s"
            self._end(Verdict.PAUSED, text, f"the job pauses: {text}")
        elif now >= self._idle_by():
            ever = "been connected" if self._ends is not None else "joined"
            self._fail(f"no worker has {ever} for {IDLE_JOB_SECONDS:g} s")
        if now >= self._stalled_by():
            self._fail(f"no byte was completed for {self._deadlines.stood(now):.0f} s")
        if self._copying is not None and self._ending is None:
            self._copying.flushes.checkpoint(now)
        return self._advance()

    # -- what workers report -------------------------------------------------------------------------------------------

    def _receive(self, worker: Worker, message: FromWorker) -> None:
        match RECEPTION[worker.state][type(message)]:
            case Reception.LATE:
                self._dropped += 1
            case Reception.WRONG:
                self._misbehaved(worker, f"it sent {type(message).__name__} while {worker.state.name}")
            case Reception.TAKEN:
                self._take(worker, message)

    def _take(self, worker: Worker, message: FromWorker) -> None:
        copying = self._copying
        trouble: Trouble | None = None
        match message:
            case Opened():
                self._opened(worker, message)
            case OpenFailed():
                self._open_failed(worker, message)
            case Goodbye():
                self._goodbye(worker, message)
            case Wanted():
                worker.wanted = message.leases
                if copying is not None:
                    copying.consider(worker)
            case Alive():
                worker.alive_at = max(worker.alive_at, message.at)
            case Hello():
                pass
            case Progress() | Leaves() | Written() | Compared() | Failed() | Flushed() if copying is None:
                self._dropped += 1
            case Progress():
                trouble = copying.progress(worker, message, self._now)
            case Leaves():
                trouble = copying.leaves(worker, message)
            case Written():
                worker.losses = 0
                trouble = copying.written(worker, message, self._now)
            case Compared():
                worker.losses = 0
                if isinstance(copying, Comparing):
                    trouble = copying.compared(worker, message, self._now)
                else:
                    trouble = blame("it compared what it was to copy")
            case Failed():
                trouble = copying.failed(worker, message)
            case Flushed():
                trouble = copying.flushed(worker, message, self._now)
            case _:
                assert_never(message)
        self._trouble(worker, trouble)

    def _opened(self, worker: Worker, message: Opened) -> None:
        source, (destination,) = message.source, message.destinations
        numbers = (message.source_connections, message.destination_connections)
        if not worker.assigned or 0 in numbers:
            self._misbehaved(worker, f"it opened {numbers[0]} and {numbers[1]} connections")
            return
        for end, number in zip((source, destination), numbers, strict=True):
            if number > 1 and not end.can_multi_conn:
                self._misbehaved(worker, f"it opened {number} connections to {end.peer}, which takes one only")
                return
        self._deadlines.learn(source, destination)
        if self._ends is None:
            self._crew.opened(worker, *numbers)
            self._ended_unopened = 0
            self._scouted(worker, source, destination)
            return
        found = disagreement(self._ends[0], source, "source", size_matters=True) or disagreement(
            self._ends[1], destination, "destination", size_matters=not self._job.destination_grows
        )
        if found is not None:
            self._turned_away(worker, f"worker {worker.name}: {found}")
            return
        if worker.state is WorkerState.WAITING:
            self._note(f"worker {worker.name} is connected again")
        self._crew.opened(worker, *numbers)
        self._ended_unopened = 0
        if self._copying is not None:
            self._trouble(worker, self._copying.connected(worker, destination.hints.instance, self._now))
            self._copying.consider(worker)

    def _scouted(self, scout: Worker, source: EndpointDescription, destination: EndpointDescription) -> None:
        """The first worker has opened both ends: can the job be done, and how?"""
        self._ends = (source, destination)
        if self._job.expected is not None:
            for end, then, any_size in zip(
                self._ends, self._job.expected, (False, self._job.destination_grows), strict=True
            ):
                if what := end.difference(then, any_size=any_size):
                    text = f"{end.peer}: is not what the journal is about: {what}"
                    self._fail(f"{text}; --force-resume goes on all the same")
                    return
        try:
            plan = check_job(self._job, source, destination)
        except UserError as error:
            self._fail(str(error))
            return
        self._crew.adopt(plan, scout, source, destination)
        make = Copying if self._job.options.mode == "copy" else Comparing
        self._copying = make(self._job, plan, self._crew, self._out)
        self._copying.connected(scout, destination.hints.instance, self._now)
        self._deadlines.begin(self._now)
        if self._job.destination_grows:
            self._crew.is_open = False
            self._phase = JOBS.step(self._phase, JobEvent.PREPARE)
            self._out.add(Prepare(plan.size or 0))
        else:
            self._begin_copying()

    def _begin_copying(self) -> None:
        is_copy = self._copying is None or self._copying.writes
        self._phase = JOBS.step(self._phase, JobEvent.COPY if is_copy else JobEvent.VERIFY)
        crew = self._crew
        crew.is_open = True
        crew.raise_shares()
        crew.place(self._now)
        missing = crew.active_max - crew.live_count - self._starting
        if self._job.local_workers and missing > 0:
            self._start_workers(missing)
        self._deadlines.begin(self._now)
        for worker in crew.workers.values():
            if self._copying is not None:
                self._copying.consider(worker)

    def _open_failed(self, worker: Worker, message: OpenFailed) -> None:
        text = error_line(message.error)
        if not worker.assigned:
            self._misbehaved(worker, "it was given no connections, and failed to open some")
        elif self._ends is None:
            self._fail(text)
        elif self._may_return(worker, message.error):
            if worker.state is WorkerState.READY and self._copying is not None:
                self._trouble(worker, self._copying.lost(worker, text, attempt=False, returns=True))
            if self._ending is None:
                self._last_reason = text
                self._deadlines.lost(message.error.side)
                if not worker.losses:
                    self._note(f"{text}; worker {worker.name} tries again")
                self._crew.wait(worker, self._now, self._deadlines.backoff(message.error.side))
                self._crew.place(self._now)  # another one may do better
        else:
            if worker.state is WorkerState.READY and self._copying is not None:
                self._trouble(worker, self._copying.lost(worker, text, attempt=False))
            elif self._job.local_workers:
                self._crew.shrink(worker)  # a server that admits fewer than it says; use those obtained
            self._turned_away(worker, text)

    def _may_return(self, worker: Worker, error: ErrorReport) -> bool:
        """Whether trying again later may help: the server was there, and is lost to everybody or to this worker."""
        is_lost = worker.took_part or self._crew.ready_count == 0
        is_repeatable = self._copying is not None and self._copying.repeatable
        return self._deadlines.is_waited_for(error.side) and is_lost and is_repeatable and error.kind == "connection"

    def _turned_away(self, worker: Worker, text: str) -> None:
        """`worker` is of no use, and another in its place would be none either. The job goes on if anybody is left."""
        self._last_reason = text
        self._note(text)
        worker.replaceable = False
        if worker.state is not WorkerState.DRAINING:
            self._crew.dismiss(worker, text, self._now + DRAIN_SECONDS)
        self._carry_on(replace=False)
        if not self._crew.live_count and not self._starting:
            self._fail(text)

    # -- what follows --------------------------------------------------------------------------------------------------

    def _advance(self) -> list[Instruction]:
        """After every event: do what has become possible, and hand over the instructions."""
        if self._copying is not None and self._copying.moved:
            self._copying.moved = False
            self._deadlines.completed(self._now)
        if self._copying is not None and self._phase in (Phase.COPYING, Phase.FLUSHING, Phase.VERIFYING):
            self._press_on(self._copying)
        if self._ending is None:
            self._rates.share(self._now)
        if self._ending is not None and self._phase is Phase.STOPPING:
            self._finish_if_quiet(self._ending)
        self._deadlines.look(self._now, is_paused=self.pace.is_paused)
        return self._out.take()

    def _press_on(self, copying: Copying) -> None:
        copying.work_on_checksum(self._now)
        is_idle = copying.must_wait or not copying.ledger.unwritten
        if self._crew.ready_count and is_idle and (trouble := copying.give_up_waiting()):
            self._fail(trouble.text)
            return
        if self._now >= self._grant_from and not self.pace.is_paused:
            copying.grant(self._now, self._rates.even_share)
        if copying.ledger.unwritten:
            if self._phase is Phase.FLUSHING:
                self._phase = JOBS.step(self._phase, JobEvent.COPY)
            return
        if self._job.options.flush and copying.unsettled:
            if self._phase is Phase.COPYING:
                self._phase = JOBS.step(self._phase, JobEvent.FLUSH)
            copying.flushes.ask_all(self._now)
            return
        self._done(copying)

    def _idle_by(self) -> float:
        return self._deadlines.idle_by() if self._ending is None else inf

    def _stalled_by(self) -> float:
        """Not for streams, whose other end may take its time."""
        if self._copying is None or not self._copying.repeatable or self._ending is not None or self.pace.is_paused:
            return inf
        return self._deadlines.stalled_by(self._rates.request_seconds())
