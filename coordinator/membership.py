"""Workers come and go, and what that means for the job. Pure: the lower half of the scheduler.

Who is let in, who is put in another's place, who is waited for and for how long, and the way out that every job takes.
"""

from __future__ import annotations

from nbdshard.common.limits import (
    BEATS_PER_TICK_MAX,
    DRAIN_SECONDS,
    KILL_SECONDS,
    LEAVE_SECONDS,
    NOTES_MAX,
    OPEN_SECONDS,
    WORKER_REPLACEMENTS_MAX,
    WORKER_START_ATTEMPTS,
    WORKERS_MAX,
)
from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    AliveToo,
    Counters,
    EndpointDescription,
    FromWorker,
    Goodbye,
    Hello,
    Refused,
)
from nbdshard.coordinator.admission import refusal
from nbdshard.coordinator.comparing import Comparing
from nbdshard.coordinator.copying import Copying, Trouble
from nbdshard.coordinator.crew import Crew, Outbox
from nbdshard.coordinator.ending import Ending, make_outcome, one_line
from nbdshard.coordinator.instructions import Finish, Forget, Send, Start
from nbdshard.coordinator.job import Comparison, Job, Outcome, Verdict
from nbdshard.coordinator.rates import Rates
from nbdshard.coordinator.states import JOBS, JobEvent, Phase, WorkerState
from nbdshard.coordinator.workers import Worker


class Membership:
    """The state of one job, and how it changes when workers join, leave, die, fall silent or break the protocol."""

    def __init__(self, job: Job, now: float) -> None:
        self._job = job
        self._now = now
        self._out = Outbox()
        self._crew = Crew(job, self._out)
        self._beat_at = now + job.heartbeat_seconds
        self._rates = Rates(job, self._crew, self._out)
        self._phase = Phase.OPENING
        self._copying: Copying | None = None  # what is done with ranges now
        self._copied: Copying | None = None  # what was done before, when what was written is read back
        self._ends: tuple[EndpointDescription, EndpointDescription] | None = None
        self._ending: Ending | None = None
        self._outcome: Outcome | None = None
        self._starting = 0  # local processes started that have not said Hello
        self._departed: set[str] = set()  # local workers that left; their processes are still to be reaped
        self._replacements = 0
        self._ended_unopened = 0  # local workers in a row that ended before they opened anything
        self._last_reason = "no worker could be had"
        self._dropped = 0
        self._notes: list[str] = []

    # -- workers come --------------------------------------------------------------------------------------------------

    def _hello(self, identity: str, hello: Hello) -> None:
        known = self._crew.workers.get(identity)
        if known is not None:
            known.heard = self._now
            if known.hello != hello:
                self._misbehaved(known, "it said Hello a second time, as somebody else")
            elif known.state is not WorkerState.DRAINING:
                self._crew.assign(known)
            return
        if self._starting:
            self._starting -= 1
        reason = refusal(self._job, hello)
        if reason is None and len(self._crew.workers) >= WORKERS_MAX:
            reason = f"the job has {WORKERS_MAX} workers already"
        if reason is not None:
            self._refuse(identity, hello, reason)
        elif self._ending is not None:
            self._crew.turn_away(identity, hello, self._ending.reason)
            self._leave_process(identity)
        else:
            worker = self._crew.join(identity, hello, self._now)
            self._crew.place(self._now)
            if not worker.assigned:
                self._crew.assign(worker)
            self._rates.welcome(worker, self._now)

    def _refuse(self, identity: str, hello: Hello, reason: str) -> None:
        self._out.add(Send(identity, Refused(PROTOCOL_VERSION, reason)))
        self._out.add(Forget(identity))
        self._leave_process(identity)
        self._note(f"worker {hello.host}/{hello.pid} was refused: {reason}")
        if self._job.local_workers:
            self._fail(reason)  # the next one would be no other

    def _start_workers(self, count: int) -> None:
        self._starting += count
        self._out.add(Start(count))

    def _not_started(self, reason: str) -> None:
        if self._starting:
            self._starting -= 1
        self._ended_unopened += 1
        self._last_reason = f"no worker could be started: {reason}"
        self._note(reason)
        self._carry_on(replace=True)

    def _carry_on(self, *, replace: bool) -> None:
        """A worker was lost. Put others in its place; if nobody is left and nobody can come, that is the end."""
        if self._ending is not None:
            return
        crew = self._crew
        crew.place(self._now)
        if self._job.local_workers and replace and self._ended_unopened < WORKER_START_ATTEMPTS:
            missing = crew.active_max - crew.live_count - self._starting
            missing = min(missing, WORKER_REPLACEMENTS_MAX - self._replacements)
            is_needed = self._copying is None or self._copying.ledger.unwritten
            if missing > 0 and (is_needed or not crew.live_count):
                self._replacements += missing
                self._start_workers(missing)
        if self._job.local_workers and not crew.live_count and not self._starting:
            self._fail(self._last_reason)

    def _beat(self) -> None:
        """Our heartbeat, to so many that everybody has it in time and a large crew does not hold up the others.

        It tells each what was heard of it, and from that its leases count: so they end on its side first.
        """
        crew = self._crew
        count = min(len(crew.workers), BEATS_PER_TICK_MAX)
        share = count / len(crew.workers) if crew.workers else 1.0
        self._beat_at = self._now + self._job.heartbeat_seconds * share
        for worker in crew.next_in_turn(count):
            if not worker.killed:
                self._out.send(worker, AliveToo(self._job.uuid, self._job.epoch, worker.alive_at))
                self._rates.remind(worker)

    # -- workers go ----------------------------------------------------------------------------------------------------

    def _ended(self, worker: Worker, reason: str) -> None:
        """Its process is dead."""
        if worker.took_part:
            reason = f"worker {worker.name} ended: {reason}"
        else:
            self._ended_unopened += 1
            reason = f"worker {worker.name} ended before it opened both sides: {reason}"
        if worker.killed and worker.why:
            reason = worker.why  # that is what ended it
        self._last_reason = reason
        self._note(reason)
        self._gone(worker, reason, attempt=True)

    def _goodbye(self, worker: Worker, message: Goodbye) -> None:
        """It closed its connections and writes nothing more."""
        if worker.state is not WorkerState.DRAINING:
            reason = one_line(message.reason)
            worker.why = f"worker {worker.name} left: {reason}" if reason else f"worker {worker.name} left"
            self._last_reason = worker.why
            self._note(worker.why)
            self._ended_unopened += not worker.took_part
        self._leave_process(worker.identity)
        self._gone(worker, worker.why, attempt=False)

    def _gone(self, worker: Worker, why: str, *, attempt: bool, fenced: bool = True) -> None:
        self._crew.remove(worker, fenced=fenced)
        if self._ending is not None:
            return
        if self._copying is not None:
            self._trouble(worker, self._copying.lost(worker, why, attempt=attempt))
        self._carry_on(replace=worker.replaceable)

    def _misbehaved(self, worker: Worker, what: str) -> None:
        self._last_reason = f"worker {worker.name} broke the control protocol: {what}"
        self._note(self._last_reason)
        if worker.state is not WorkerState.DRAINING:
            self._crew.dismiss(worker, self._last_reason, self._now + DRAIN_SECONDS)

    def _trouble(self, worker: Worker, trouble: Trouble | None) -> None:
        if trouble is None:
            return
        if trouble.is_fatal:
            self._fail(trouble.text)
        else:
            self._misbehaved(worker, trouble.text)

    def _leave_process(self, identity: str) -> None:
        if self._job.local_workers:
            self._departed.add(identity)

    def _fenced(self, identity: str) -> None:
        del self._crew.unfenced[identity]
        self._out.add(Forget(identity))
        self._carry_on(replace=True)

    def _look_at(self, worker: Worker) -> None:
        """Something that was waited for from `worker` did not come."""
        now = self._now
        if worker.state is WorkerState.DRAINING:
            self._did_not_leave(worker)
        elif worker.flush is not None and worker.flush.deadline <= now:
            self._fail(f"worker {worker.name} did not answer a flush within {worker.flush.seconds:.0f} s")
        elif worker.return_at <= now:
            self._crew.come_back(worker, now)
        elif worker.open_by <= now:
            self._fail(f"worker {worker.name} did not open both sides within {OPEN_SECONDS:g} s")
        else:
            reason = f"worker {worker.name} was not heard of for {self._job.lease_seconds:g} s"
            self._last_reason = reason
            self._note(reason)
            if self._job.local_workers:
                worker.why = reason
                self._crew.kill(worker, now + KILL_SECONDS)  # its ranges are given away once it is reaped
            else:
                self._crew.dismiss(worker, reason, now, at_once=True)
                self._gone(worker, reason, attempt=True, fenced=self._is_fenced(worker))

    def _did_not_leave(self, worker: Worker) -> None:
        if self._job.local_workers and not worker.killed:
            self._crew.kill(worker, self._now + KILL_SECONDS)
            return
        if worker.killed:
            self._fail(f"worker {worker.name} did not end within {KILL_SECONDS:g} s of being killed")
        self._gone(worker, worker.why, attempt=False, fenced=self._is_fenced(worker))

    def _is_fenced(self, worker: Worker) -> bool:
        """Whether `worker`, of which nothing is known any more, cannot write: what is compared is only read, and
        before what was written is read back every write was answered."""
        return not worker.ever_leased or (self._copying is not None and not self._copying.writes)

    def _stranger(self, identity: str, message: FromWorker) -> None:
        """Somebody we do not count on: of interest only if it may still write."""
        if identity not in self._crew.unfenced:
            self._dropped += 1
        elif isinstance(message, Goodbye):
            self._fenced(identity)
        else:
            self._dropped += 1
            self._crew.stop_unfenced(identity)

    # -- the way out ---------------------------------------------------------------------------------------------------

    def _done(self, copying: Copying) -> None:
        """Nothing is left to `copying`: what was copied may be to be read back, or the job ends well."""
        copying.note_unreadable()
        found = self._comparison()
        if self._job.verify and found is None:
            self._read_back(copying)
        elif found is not None and found.differing:
            self._end(Verdict.DIFFERENT, "source and destination differ", "everything is compared")
        elif self._copied is None and found is not None:
            self._end(Verdict.COMPLETE, "", "everything is compared")
        else:
            self._end(Verdict.COMPLETE, "", "the copy is complete")

    def _read_back(self, copied: Copying) -> None:
        """Everything is written, and flushed as asked: whether it really is there is seen on the same connections."""
        assert self._crew.plan is not None
        self._phase = JOBS.step(self._phase, JobEvent.VERIFY)
        self._copied = copied
        number = copied.ledger.next_number
        self._copying = Comparing(self._job, self._crew.plan, self._crew, self._out, first_number=number)
        self._crew.read_back()
        self._carry_on(replace=True)
        if self._ending is None and not self._copying.ledger.unwritten:
            self._done(self._copying)  # of nothing

    def _fail(self, error: str) -> None:
        line = one_line(error)
        if self._copied is not None:
            line = f"everything is copied, but could not be verified: {line}"
        self._end(Verdict.FAILED, line, f"the job failed: {line}")

    def _end(self, verdict: Verdict, error: str, reason: str) -> None:
        """The verdict is known. Only the first one counts; everybody is told to stop."""
        if self._ending is not None:
            return
        now = self._now
        self._phase = JOBS.step(self._phase, JobEvent.END)
        self._ending = Ending(verdict, error, reason, self._counters(), now + DRAIN_SECONDS)
        self._crew.is_open = False
        for worker in list(self._crew.workers.values()):
            if worker.state is not WorkerState.DRAINING:
                # One that never opened anything may hang in a handshake, and has nothing to finish.
                patience = DRAIN_SECONDS if worker.took_part else LEAVE_SECONDS
                self._crew.dismiss(worker, reason, now + patience)
        for identity in self._crew.unfenced:
            self._crew.stop_unfenced(identity)

    def _hurry(self, ending: Ending, reason: str) -> None:
        """The user does not want to wait for the wire."""
        ending.at_once = True
        leave_by = self._now + LEAVE_SECONDS
        ending.deadline = min(ending.deadline, leave_by)
        for worker in list(self._crew.workers.values()):
            if not worker.killed:
                self._crew.dismiss(worker, reason, leave_by, at_once=True)

    def _finish_if_quiet(self, ending: Ending) -> None:
        """Nobody is waited for any more: that is the end."""
        if self._crew.workers or (self._crew.unfenced and self._now < ending.deadline):
            return
        self._phase = JOBS.step(self._phase, JobEvent.FINISH)
        is_undurable = self._copy is not None and self._copy.undurable
        is_complete = ending.verdict is Verdict.COMPLETE and self._copy is not None
        checksum = self._copy.finish_checksum() if is_complete and self._copy is not None else ""
        self._outcome = make_outcome(
            self._job,
            ending,
            self._crew,
            self._ends,
            size=self._size(),
            resumed=self._resumed(),
            unreadable=tuple(self._copy.ledger.unreadable) if self._copy is not None else (),
            is_undurable=is_undurable,
            checksum=checksum,
            comparison=self._comparison(),
        )
        self._out.add(Finish(self._outcome))

    @property
    def _copy(self) -> Copying | None:
        """The copy of the job, also when it is over and verified; the comparison of one that copies nothing."""
        return self._copied or self._copying

    def _comparison(self) -> Comparison | None:
        if not isinstance(self._copying, Comparing) or self._ends is None:
            return None
        return self._copying.found(self._ends)

    def _size(self) -> int | None:
        if self._copying is not None:
            return self._copying.ledger.size
        return self._ends[0].size if self._ends is not None else None

    def _resumed(self) -> int:
        return self._copy.ledger.resumed_bytes if self._copy is not None else 0

    def _counters(self) -> Counters:
        return self._copy.ledger.counters if self._copy is not None else Counters()

    def _note(self, line: str) -> None:
        if len(self._notes) < NOTES_MAX:
            self._notes.append(line)
