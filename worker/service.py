"""The worker's shell: one ring, one control channel, some connections and its work between them. It decides nothing.

The work is a copier's, or a comparer's (work.py). The order of a turn: let it queue, let connections and channel send,
wait on the ring, hand out completions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain
from math import inf

from nbdshard.common import logs
from nbdshard.common.errors import BugError, ConnectionLost, NbdshardError, UserError
from nbdshard.common.limits import (
    CHANNEL_LINGER_SECONDS,
    COORDINATOR_SILENCE_SECONDS,
    DRAIN_SECONDS,
    HEARTBEAT_SECONDS,
    LEASE_EARLY_SHARE,
    LOCAL_LEASE_SECONDS,
    PROGRESS_SECONDS,
    TICK_SECONDS,
)
from nbdshard.common.messages import (
    Alive,
    AliveToo,
    Assign,
    Compared,
    ErrorReport,
    Flush,
    FromCoordinator,
    FromWorker,
    Goodbye,
    Hello,
    Lease,
    Leaves,
    Mode,
    Noted,
    Opened,
    OpenFailed,
    Rate,
    Refused,
    Revoke,
    Side,
    Stop,
    Written,
)
from nbdshard.common.ring import Ring
from nbdshard.worker.agreement import check_agreement, check_likeness, may_splice
from nbdshard.worker.clock import WorkerClock
from nbdshard.worker.copier import Copier
from nbdshard.worker.crew import SIDES, Crew
from nbdshard.worker.lanes import MakeLane
from nbdshard.worker.life import LEAVING_STATES, Channel, WorkerState
from nbdshard.worker.opening import OpenConnection
from nbdshard.worker.piped import PipePool
from nbdshard.worker.pipes import Plumbing
from nbdshard.worker.reports import report_error
from nbdshard.worker.shape import CopyShape
from nbdshard.worker.sockets import SYSTEM_SOCKETS, Connector
from nbdshard.worker.work import Work

_CONNECTING_STATES = (WorkerState.OPENING, WorkerState.WORKING, WorkerState.TURNING)  # connections may come up


class Worker:
    """One worker, from Hello to Goodbye. `turn` is one turn of its loop; it is over when `state` is GONE.

    `error` then holds the reason to tell the user, if there is one.
    """

    def __init__(
        self,
        ring: Ring,
        channel: Channel,
        hello: Hello,
        clock: Callable[[], float],
        connector: Connector = SYSTEM_SOCKETS,
        plumbing: Plumbing | None = None,
        make_lane: MakeLane | None = None,
    ) -> None:
        """`plumbing`: None for a worker that splices nothing. `make_lane`: None for one without lanes."""
        self.state = WorkerState.GREETING
        self.error: NbdshardError | None = None
        self._ring = ring
        self._channel = channel
        self._clock = WorkerClock(clock)
        self._connector = connector
        self._plumbing = plumbing
        self._make_lane = make_lane
        self._mode: Mode = "copy"  # of the latest work
        self._pipes: PipePool | None = None
        self._has_told_of_pipes = False
        self._has_mail = False
        self._assign: Assign | None = None
        self._crew: Crew | None = None
        self._work: Work | None = None
        self._next_work: Work | None = None  # while TURNING: it may have leases already, and has no connections yet
        self._failure: ErrorReport | None = None  # why all connections are being closed
        self._outbox: deque[FromWorker] = deque([hello])
        self._unnoted: dict[int, list[FromWorker]] = {}  # by lease: Written or Compared, and what comes before it
        self._goodbye = "stopped by the coordinator"
        self._rate: int | None = None  # also of the copiers to come
        now = self._clock.steady
        self._heard_at = now
        self._leave_by = self._part_by = 0.0
        # By the true time: when we said our first Opened, and the latest thing that the coordinator surely heard.
        self._opened_at = self._heard_of_at = 0.0
        self._next_tick = self._next_heartbeat = self._next_progress = now

    # -- the loop ------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """One turn. Blocks until something happens or the next deadline, never longer."""
        now = self._look()
        self._read_channel(now)
        self._look_at_clock(now)
        if self._work is not None:
            self._work.collect()
            if self.state is not WorkerState.LOSING:
                self._work.pump(self._clock.true)
            self._collect(self._work)
            self._tell_of_pipes(self._work)
        has_work = self._crew is not None and self._crew.pump(now)
        self._advance(now)
        self._send()
        # A full queue must not swallow the Goodbye: without it nobody knows that we write no more.
        if self.state is WorkerState.PARTING and (not self._outbox or now >= self._part_by):
            self.state = WorkerState.GONE
            return
        # Sending may have taken the edge off the channel's descriptor: look again before waiting for it.
        self._rest(now if self._read_channel(now) else self._next_deadline(), has_work=has_work)

    def _rest(self, until: float, *, has_work: bool) -> None:
        """Wait, and let data move, until somebody else than the work has something to do, or `until`.

        `has_work`: a connection has, before anything happens.
        """
        work, crew, clock = self._work, self._crew, self._clock
        while True:
            has_work = has_work or (work is not None and work.has_work and self.state is not WorkerState.LOSING)
            timeout = 0.0 if has_work else max(0.0, until - clock.steady)
            clock.waiting(timeout)
            completions = self._ring.wait(timeout)
            now = self._look()
            is_over = now >= until or not (completions or has_work)
            for operation in completions:
                if operation.owner is None or operation.owner(operation) is not False:
                    has_work = True
            if is_over or self._has_mail or work is None or crew is None or self.state is not WorkerState.WORKING:
                return
            if has_work:
                if work.has_work:
                    work.pump(clock.true)
                has_work = crew.pump(now)
                if work.outbox or self._outbox or work.deadline() is not None:
                    return

    def _look(self) -> float:
        """Look at the clock: the time for everything but leases. Nothing is sent any more under a lease that is over.

        Asked before each piece that is sent directly, and on both sides of each wait: one comparison is all it costs.
        """
        clock = self._clock
        now = clock.look()
        work = self._work
        if work is not None:
            work.now = true = clock.true
            if true >= work.earliest_expiry:
                self._expire(work)
        return now

    def _expire(self, work: Work) -> None:
        """A lease has ended. What is queued under it would be written too, perhaps long after the job's end."""
        clock = self._clock
        lease_seconds = self._assign.lease_seconds if self._assign is not None and work.leases else inf
        slept = clock.last_stop if clock.last_stop >= lease_seconds else 0.0
        if not work.expire(clock.true) and not slept:
            return
        if self._crew is not None:
            self._crew.disconnect(at_once=True)
        if self.state in (WorkerState.OPENING, WorkerState.WORKING):
            reason = "a lease ended before all that was written under it was acknowledged"
            if slept:
                reason = f"it was stopped for {slept:.0f} s, which is longer than its leases last"
            self._open_failed(ConnectionLost("worker", "copying", reason), None)
        elif self.state is WorkerState.DRAINING:
            self._leave_by = clock.steady  # what was under way will never be finished

    def hear(self) -> None:
        """There may be something to read from the channel: the next wait is to be the last before it is read."""
        self._has_mail = True

    def leave(self, reason: str) -> None:
        """Leave the job: finish what is on the wire, disconnect, say Goodbye. A second call closes at once."""
        if self.state in LEAVING_STATES:
            self._leave_by = self._clock.steady
            return
        self._goodbye = reason
        # What was on a lost connection will never be finished: there is nothing to wait for.
        self._leave_by = self._clock.steady + (0.0 if self.state is WorkerState.LOSING else DRAIN_SECONDS)
        if self._work is not None:
            self._work.drain()
        self.state = WorkerState.DRAINING

    def _next_deadline(self) -> float:
        deadline = min(self._next_tick, self._next_heartbeat)
        if self._work is None:
            return deadline
        due, retry = self._work.earliest_expiry, self._work.deadline()
        if retry is not None and self.state is not WorkerState.LOSING:  # then nothing is tried again
            due = min(due, retry)
        return min(deadline, due - self._clock.stopped_seconds)

    def _look_at_clock(self, now: float) -> None:
        if now >= self._next_tick:
            self._next_tick = now + TICK_SECONDS
            self._channel.check(now)
            if self._crew is not None:
                self._crew.tick(now)
        if now >= self._next_progress and self._work is not None:
            self._next_progress = now + PROGRESS_SECONDS
            self._work.report_progress()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + (self._assign.heartbeat_seconds if self._assign else HEARTBEAT_SECONDS)
            if self._assign is not None:
                self._outbox.append(Alive(self._assign.job, self._assign.epoch, self._clock.true))
                self._outbox.extend(chain.from_iterable(self._unnoted.values()))
        if now >= self._heard_at + COORDINATOR_SILENCE_SECONDS and self.state not in LEAVING_STATES:
            self.error = UserError(f"nothing was heard of the coordinator for {COORDINATOR_SILENCE_SECONDS:g} s")
            self.leave("the coordinator fell silent")

    def _advance(self, now: float) -> None:
        """Move on where it is only a matter of connections being closed."""
        if self.state is WorkerState.LOSING and (self._crew is None or self._crew.closed):
            self._connections_gone()
        if self.state is WorkerState.DRAINING and (self._idle() or now >= self._leave_by):
            if self._crew is not None:
                self._crew.disconnect(at_once=now >= self._leave_by)
            self.state = WorkerState.LEAVING
        if self.state is WorkerState.TURNING and (self._work is None or self._work.at_rest):
            self._turned()
        if self.state is WorkerState.LEAVING:
            if self._crew is not None and not self._crew.closed:
                if now >= self._leave_by:
                    self._crew.disconnect(at_once=True)
                self._crew.pump(now)
                return
            if self._assign is not None:
                self._outbox.append(Goodbye(self._assign.job, self._assign.epoch, self._goodbye))
            self._close_pipes()
            self._part_by = now + CHANNEL_LINGER_SECONDS  # whoever is in a hurry: no connection is open any more
            self.state = WorkerState.PARTING

    def _idle(self) -> bool:
        return self._work is None or self._work.idle

    def _tell_of_pipes(self, work: Work) -> None:
        for remark in work.remarks:
            logs.info(remark)
        work.remarks.clear()
        if self._pipes is not None and self._pipes.limited and not self._has_told_of_pipes:
            self._has_told_of_pipes = True
            logs.info(f"{self._pipes.limited}: the payload of other requests goes through buffers")

    def _close_pipes(self) -> None:
        """Every connection is closed, or the copier's work is over: nothing uses them any more."""
        if self._work is not None:
            self._work.close()
        if self._pipes is not None:
            self._pipes.close()
            self._pipes = None

    # -- messages ------------------------------------------------------------------------------------------------------

    def _collect(self, work: Work) -> None:
        for message in work.outbox:
            if isinstance(message, Leaves | Written | Compared):
                self._unnoted.setdefault(message.lease, []).append(message)
            self._outbox.append(message)
        work.outbox.clear()

    def _send(self) -> None:
        while self._outbox and self._channel.send(self._outbox[0]):
            self._outbox.popleft()

    def _read_channel(self, now: float) -> bool:
        heard = self._has_mail = False
        while messages := self._channel.receive():
            heard = True
            self._heard_at = now
            for message in messages:
                self._handle(message, now)
        return heard

    def _handle(self, message: FromCoordinator, now: float) -> None:
        if isinstance(message, Refused):
            self.error = UserError(f"the coordinator refused this worker: {message.reason}")
            self.leave("refused")
            return
        if isinstance(message, Assign):
            self._assigned(message, now)
            return
        if self._assign is None or (message.job, message.epoch) != (self._assign.job, self._assign.epoch):
            return  # of another job or another life of the coordinator
        if isinstance(message, Stop):
            self._stop(message)
        elif isinstance(message, Noted):
            self._unnoted.pop(message.lease, None)
        elif isinstance(message, AliveToo):
            self._was_heard(message.answers)
        elif isinstance(message, Rate):
            self._rate = message.bytes_per_second
            if (work := self._next_work or self._work) is not None:
                work.limit(self._rate)
        elif self._work is not None and self.state in (WorkerState.WORKING, WorkerState.TURNING):
            self._to_work(self._next_work or self._work, message)  # who leaves takes on nothing more

    def _to_work(self, work: Work, message: FromCoordinator) -> None:
        match message:
            case Lease():
                self._was_heard(max(self._opened_at, message.answers))  # without an Opened nothing is granted
                work.grant(message, self._expiry(message.seconds))
            case Revoke():
                work.revoke(message.lease)
            case Flush():
                work.flush(message.flush)
            case _:
                pass

    def _was_heard(self, said_at: float) -> None:
        """The coordinator has heard what we said then: every lease counts from that moment, if from no later one.

        It does not wait longer for one that leaves than it told it: nothing is renewed then.
        """
        self._heard_of_at = max(self._heard_of_at, min(said_at, self._clock.true))
        if self._work is not None and self._assign is not None and self.state is WorkerState.WORKING:
            self._work.renew(self._clock.true, self._expiry(self._assign.lease_seconds))

    def _expiry(self, seconds: float) -> float:
        """When a lease of so many seconds is over, if the coordinator hears nothing more of us."""
        return self._heard_of_at + seconds * (1.0 - LEASE_EARLY_SHARE)

    def _stop(self, message: Stop) -> None:
        if self.state not in LEAVING_STATES:
            self.leave(message.reason)
        if message.now:
            self._leave_by = self._clock.steady

    # -- connections ---------------------------------------------------------------------------------------------------

    def _assigned(self, message: Assign, now: float) -> None:
        if self._assign is not None and (message.job, message.epoch) != (self._assign.job, self._assign.epoch):
            return
        if self.state in LEAVING_STATES:
            return
        if self._crew is None and self._opened_at and message.expected_source is None:
            return  # more of what we have lost meanwhile: who is to connect anew is told what to find
        self._assign = message
        self._next_heartbeat = min(self._next_heartbeat, now + message.heartbeat_seconds)
        if message.source_connections == 0 or message.destination_connections == 0:
            self.state = WorkerState.STANDING_BY if self._crew is None else self.state
            return
        try:
            if self._crew is None:
                self.state = WorkerState.OPENING
                # Under leases that end nothing is left to the ring to send: it does not look at the clock (link.py).
                is_direct = message.options.data_path != "buffer" or message.lease_seconds < LOCAL_LEASE_SECONDS
                plumbing = self._plumbing if is_direct else None
                self._crew = Crew(self._ring, message, self._opened, self._lost, self._connector, plumbing, self._look)
            self._crew.want(message, now)
            if self._mode != message.options.mode and self.state is WorkerState.WORKING:
                self._turn_to(message)
        except NbdshardError as error:
            self._open_failed(error, None)

    def _opened(self, side: Side, connection: OpenConnection) -> None:
        """A connection is up. With the first on either side the work begins; more join it as they come."""
        crew, assign = self._crew, self._assign
        if crew is None or assign is None or self.state not in _CONNECTING_STATES:
            return
        if self._work is None:
            first = crew.first_pair()
            if first is None:
                return
            looked_at: Side | None = None
            try:
                for looked_at, each in zip(SIDES, first, strict=True):
                    check_agreement(assign, looked_at, each.description)
                looked_at = None  # what does not fit together is the fault of neither
                self._work = self._make_work(assign, first)
            except UserError as error:
                self._open_failed(error, looked_at)
                return
            self.state = WorkerState.WORKING
            for each_side, each in crew.ready():
                self._join(self._work, each_side, each)
        else:
            try:
                source, destination = crew.first_pair() or _bug("no connection is up")
                like = source if side == "source" else destination
                check_likeness(assign, side, connection.description, like.description)
            except (UserError, ConnectionLost) as error:
                self._open_failed(error, side)
                return
            self._join(self._work, side, connection)
        self._opened_at = self._opened_at or self._clock.true
        self._outbox.append(self._report_opened(assign, crew))

    def _make_work(self, assign: Assign, ends: tuple[OpenConnection, OpenConnection]) -> Work:
        """What is to be done between `ends`, as they are known now. Raises UserError where it cannot be."""
        work = self._new_work(assign, ends)
        work.limit(self._rate)
        return work

    def _new_work(self, assign: Assign, ends: tuple[OpenConnection, OpenConnection]) -> Work:
        options, (source, destination) = assign.options, (end.description for end in ends)
        self._mode = options.mode
        if options.mode == "copy":
            shape = CopyShape.of(source, destination, options, splice=may_splice(ends, options.data_path))
            self._pipes = PipePool(self._plumbing, shape.request_size) if shape.splice and self._plumbing else None
            return Copier(shape, assign.job, assign.epoch, self._clock.true, self._pipes, self._make_lane)
        from nbdshard.worker.comparer import Comparer  # a copy does not load it

        shape = CopyShape.of(source, destination, options)
        return Comparer(shape, options, (source, destination), assign.job, assign.epoch, self._clock.true)

    def _turn_to(self, assign: Assign) -> None:
        """All is copied: what was written is to be read back, over the same connections."""
        assert self._work is not None and self._crew is not None
        self._next_work = self._make_work(assign, self._crew.first_pair() or _bug("no connection is up"))
        self._work.drain()  # no lease is left to it, but a lane may still have connections
        self.state = WorkerState.TURNING

    def _turned(self) -> None:
        assert self._next_work is not None and self._crew is not None
        self._close_pipes()
        self._work, self._next_work = self._next_work, None
        self.state = WorkerState.WORKING
        for side, each in self._crew.ready():
            self._join(self._work, side, each)

    def _join(self, work: Work, side: Side, connection: OpenConnection) -> None:
        if side == "source":
            connection.listener = work.add_source(connection)
        else:
            assert self._assign is not None
            connection.listener = work.add_target(connection, self._assign.options.requests)

    def _report_opened(self, assign: Assign, crew: Crew) -> Opened:
        source, destination = crew.first_pair() or _bug("no connection is up")
        return Opened(
            assign.job,
            assign.epoch,
            source.description,
            [destination.description],
            crew.count("source"),
            crew.count("destination"),
        )

    def _lost(self, side: Side, connection: OpenConnection, error: NbdshardError) -> None:
        """A connection failed: one of several that never came up is done without; else the worker has nothing to do."""
        crew = self._crew
        if self.state is WorkerState.DRAINING:
            self._leave_by = self._clock.steady  # what was under way on it will never be finished
        if crew is None or self.state in LEAVING_STATES or self.state is WorkerState.LOSING:
            return
        if crew.can_do_without(connection):
            logs.info(f"one connection less to the {side}: {error}")
            return
        self._open_failed(error, side)

    def _open_failed(self, error: NbdshardError, side: Side | None) -> None:
        """Close all connections. Only then is the coordinator told: until then bytes may still be on their way.

        Softly: a server may not bear a client that vanishes in the middle of its replies (nbdkit 1.32 aborts), and
        after the loss of one server the other is still needed.
        """
        self._failure = report_error(error, side)
        if self._work is not None:
            self._work.drain()
        if self._crew is not None:
            self._crew.disconnect(at_once=False)
        self.state = WorkerState.LOSING

    def _connections_gone(self) -> None:
        assert self._assign is not None and self._failure is not None
        if self._work is not None:
            self._work.abort(self._failure)
            self._collect(self._work)
        self._outbox.append(OpenFailed(self._assign.job, self._assign.epoch, self._failure))
        self._close_pipes()
        self._crew = self._work = self._next_work = self._failure = None
        self.state = WorkerState.STANDING_BY


def _bug(promise: str) -> tuple[OpenConnection, OpenConnection]:
    raise BugError(promise)
