"""A process's sockets and its ring, simulated: common.ring's promises, kept as unhelpfully as they allow.

An operation takes effect some time after it was started, and its completion is seen some time after that: so replies
overtake the completion of the send that asked for them. Completions of different descriptors come in any order, counts
are short, a closing descriptor's operations end with a result or without one.

A WATCH is told of changes as epoll(7) tells edges: some time later, several of them at once, with what is true by then,
and nothing a second time unless it changed again. Now and then it is told of something that is true no more.
"""

from __future__ import annotations

import random
import select
from collections import deque
from collections.abc import Callable
from errno import ECANCELED, EPIPE
from itertools import count
from math import inf

from nbdshard.common.errors import BugError
from nbdshard.common.limits import RING_OPERATIONS_MAX
from nbdshard.common.ring import Descriptor, Kind, Operation
from nbdshard.worker.sockets import Address
from simulation.clock import Pace, SimClock
from simulation.network import SimNetwork, Socket

ALWAYS_TOLD = select.EPOLLHUP | select.EPOLLERR
ENDING = select.EPOLLRDHUP | ALWAYS_TOLD
FALSE_ALARMS = 0.1  # of the changes nobody waits for
ENDING_SECONDS_MAX = 3.0  # from the end of a watched connection to its being closed


class SimSystem:
    """The descriptors of one process. Implements `worker.sockets.Connector`; the lowest free number is given out."""

    def __init__(self, network: SimNetwork) -> None:
        self._network = network
        self.open: dict[int, Socket] = {}
        self.pipe_ends: set[int] = set()

    def resolve(self, host: str, port: int) -> list[Address]:
        """Every host has two addresses, the first of which nobody listens at."""
        return [(0, 0, 0, "", f"nobody:{port}"), (0, 0, 0, "", f"{host}:{port}")]

    def begin(self, address: Address) -> int:
        number = self._free_number()
        self.open[number] = self._network.connect(address[4])
        return number

    def _free_number(self) -> int:
        return next(number for number in count(3) if number not in self.open and number not in self.pipe_ends)

    def take_pipe_end(self) -> int:
        number = self._free_number()
        self.pipe_ends.add(number)
        return number

    def error(self, number: int) -> int:
        return self.open[number].error

    def close(self, number: int) -> None:
        self.open.pop(number).close()

    def close_all(self) -> None:
        """The process has ended."""
        for number in list(self.open):
            self.close(number)
        self.pipe_ends.clear()


class _State:
    """What the ring knows about one descriptor."""

    __slots__ = ("at", "busy", "close", "ends", "is_false_alarm", "is_noticed", "polls", "socket", "waiting", "watch")

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.waiting: dict[Kind, deque[Operation]] = {Kind.RECEIVE: deque(), Kind.SEND: deque()}
        self.busy: dict[Kind, bool] = {Kind.RECEIVE: False, Kind.SEND: False}  # a try is scheduled
        self.at: dict[Kind, float] = {}  # when the last completion of the kind is seen: they keep their order
        self.polls: list[Operation] = []
        self.watch: Operation | None = None  # once it has begun
        self.is_noticed = False  # something has changed on the socket since the WATCH was last returned
        self.is_false_alarm = False  # nothing that it waits for
        self.close: Operation | None = None
        self.ends = 0.0


class SimRing:
    """One worker's ring. `wait` never blocks: it notes until when it would have (`wake_at`) and returns what there is.

    `on_event` is called when a wait would have returned. `is_waiting`: the last wait found nothing, and would go on.
    """

    name = "simulated"

    def __init__(
        self, clock: SimClock, chance: random.Random, pace: Pace, system: SimSystem, on_event: Callable[[], None]
    ) -> None:
        self.wake_at = inf
        self.is_waiting = False
        self.paused_until = -inf
        self.in_flight = 0
        self.calls = 0  # of them on a thread
        self._clock = clock
        self._chance = chance
        self._pace = pace
        self._system = system
        self._on_event = on_event
        self._attached: dict[int, Descriptor] = {}
        self._states: dict[Descriptor, _State] = {}
        self._queue: list[Operation] = []
        self._done: list[Operation] = []
        self._noticed: list[_State] = []  # whose WATCH is to be returned
        self._dead = False

    # -- the contract --------------------------------------------------------------------------------------------------

    def attach(self, number: int, *, is_socket: bool) -> Descriptor:
        if number in self._attached or not is_socket:
            raise BugError(f"descriptor {number} is attached already, or no socket")
        descriptor = Descriptor(number, is_socket)
        self._attached[number] = descriptor
        state = self._states[descriptor] = _State(self._system.open[number])
        state.socket.on_change = lambda: self._try(state)
        state.socket.on_edge = lambda events: self._notice(state, events)
        return descriptor

    def submit(self, operation: Operation) -> None:
        descriptor = operation.descriptor
        if operation.pending or self.in_flight >= RING_OPERATIONS_MAX:
            raise BugError(f"{operation.kind.name} is pending, or too many are")
        if operation.kind in (Kind.READ, Kind.WRITE, Kind.SYNC):
            raise BugError("the simulation has no files")
        if (descriptor is None) != (operation.kind is Kind.CALL):
            raise BugError(f"{operation.kind.name} with descriptor {descriptor}")
        if descriptor is not None:
            if descriptor.closing or self._attached.get(descriptor.number) is not descriptor:
                raise BugError(f"{operation.kind.name} for descriptor {descriptor.number}, which is closing or closed")
            if operation.kind is not Kind.CLOSE and _is_taken(descriptor, operation.kind):
                raise BugError(f"{operation.kind.name} for descriptor {descriptor.number}, which has others pending")
            descriptor.pending += 1
            _mark(descriptor, operation.kind, pending=True)
        if operation.kind in (Kind.RECEIVE, Kind.SEND) and not sum(map(len, operation.buffers)):
            raise BugError(f"{operation.kind.name} of no bytes")
        operation.pending = True
        self.in_flight += 1
        self.calls += operation.kind is Kind.CALL
        self._queue.append(operation)

    def change_watch(self, operation: Operation, mask: int) -> None:
        descriptor = operation.descriptor
        if not operation.pending or operation.kind is not Kind.WATCH or descriptor is None:
            raise BugError("changing a watch that is not pending")
        operation.mask = mask
        state = self._states[descriptor]
        self._notice(state, state.socket.events)

    def cancel(self, operation: Operation) -> None:
        descriptor = operation.descriptor
        if not operation.pending or operation.kind is Kind.CLOSE:
            return
        if operation in self._queue:
            self._queue.remove(operation)
            self._complete(operation, -ECANCELED)
        elif descriptor is not None and self._withdraw(self._states[descriptor], operation):
            self._complete(operation, -ECANCELED)

    def wait(self, timeout: float) -> list[Operation]:
        queue, self._queue = self._queue, []
        for operation in queue:
            self._start(operation)
        done, self._done = self._done, []
        for operation in done:
            self._reap(operation)
        done += self._watched()
        self.is_waiting = not done
        self.wake_at = self._clock.now if done else self._clock.now + timeout
        return self._shuffled(done)

    def wake(self) -> None:
        self.is_waiting = False
        self._on_event()

    def close(self) -> None:
        """The process ends, with or without its will: nothing completes any more."""
        self._dead = True
        self._queue.clear()
        self._done.clear()
        self._noticed.clear()

    @property
    def ready(self) -> bool:
        """Whether `wait` has something to return."""
        return bool(self._done or self._noticed)

    def watched(self, number: int) -> Socket:
        """The socket whose owner makes the system calls: it is watched, and nothing else is under way on it."""
        descriptor = self._attached.get(number)
        if descriptor is None or descriptor.closing or not descriptor.watched:
            raise BugError(f"a system call for descriptor {number}, which is closing, closed or not watched")
        return self._states[descriptor].socket

    # -- operations ----------------------------------------------------------------------------------------------------

    def _start(self, operation: Operation) -> None:
        if operation.kind is Kind.CALL:
            self._clock.after(self._pace.seconds(), lambda: self._call(operation))
            return
        assert operation.descriptor is not None
        state = self._states[operation.descriptor]
        if operation.kind is Kind.CLOSE:
            self._begin_close(state, operation)
        elif operation.kind is Kind.POLL:
            state.polls.append(operation)
            self._try(state)
        elif operation.kind is Kind.WATCH:
            state.watch = operation
            self._notice(state, state.socket.events)
        else:
            state.waiting[operation.kind].append(operation)
            self._try(state)

    def _call(self, operation: Operation) -> None:
        assert operation.function is not None
        try:
            operation.value = operation.function()
        except Exception as error:  # as a thread of the real ring: it is the operation's value
            operation.value = error
            self._complete(operation, -1)
        else:
            self._complete(operation, 0)

    def _try(self, state: _State) -> None:
        """Something may have become possible: let it happen a little later."""
        if self._dead:
            return
        socket = state.socket
        if state.polls and (mask := self._poll(socket)):
            for operation in state.polls:
                self._complete(operation, mask)
            state.polls.clear()
        for kind, possible in ((Kind.RECEIVE, socket.readable), (Kind.SEND, socket.writable)):
            if possible and state.waiting[kind] and not state.busy[kind]:
                state.busy[kind] = True
                self._clock.after(self._pace.seconds(), lambda kind=kind: self._act(state, kind))  # type: ignore[misc]

    @staticmethod
    def _poll(socket: Socket) -> int:
        if socket.error:
            return select.POLLOUT | select.POLLERR | select.POLLHUP
        return select.POLLOUT if socket.writable else 0

    def _act(self, state: _State, kind: Kind) -> None:
        state.busy[kind] = False
        if self._dead or not state.waiting[kind]:
            return
        operation = state.waiting[kind][0]
        result = _receive(state.socket, operation) if kind is Kind.RECEIVE else _send(state.socket, operation)
        if result is not None:
            state.waiting[kind].popleft()
            self._complete(operation, result)
        self._try(state)

    def _notice(self, state: _State, changes: int) -> None:
        """Something has changed on the socket: its WATCH is told a little later, and of all by then at once."""
        watch = state.watch
        if self._dead or watch is None or not changes:
            return
        if changes & ENDING:
            number = watch.descriptor.number if watch.descriptor is not None else -1
            self._clock.after(ENDING_SECONDS_MAX, lambda: self._check_ending(state, number))
        concerns = bool(changes & (watch.mask | ALWAYS_TOLD))
        if not state.is_noticed and (concerns or self._chance.random() < FALSE_ALARMS):
            state.is_noticed = state.is_false_alarm = True
            self._clock.after(self._pace.seconds(), lambda: self._tell(state))
        if concerns:
            state.is_false_alarm = False

    def _check_ending(self, state: _State, number: int) -> None:
        """Who sleeps may overlook the end of a connection; who works may not wait for a time-out to find it."""
        paused = self.paused_until - self._clock.now
        if paused > -ENDING_SECONDS_MAX:
            self._clock.after(paused + 2 * ENDING_SECONDS_MAX, lambda: self._check_ending(state, number))
        else:
            is_known = self._dead or state.socket.closed
            assert is_known, f"descriptor {number} is not closed, though its connection has ended"

    def _tell(self, state: _State) -> None:
        if not self._dead and state.watch is not None:
            self._noticed.append(state)
            self._on_event()

    def _watched(self) -> list[Operation]:
        """The WATCHes to be told of what is true now."""
        told = []
        noticed, self._noticed = self._noticed, []
        for state in noticed:
            watch, state.is_noticed = state.watch, False
            if watch is None:
                continue
            events = state.socket.events & (watch.mask | ALWAYS_TOLD)
            if events and state.is_false_alarm:
                continue  # else it would be the one to find what was overlooked
            watch.result = events or select.EPOLLIN
            told.append(watch)
        return told

    def _complete(self, operation: Operation, result: int) -> None:
        """The effect is there; its completion will be."""
        operation.result = result
        when = self._clock.now + self._pace.seconds()
        if operation.descriptor is not None:
            state = self._states[operation.descriptor]
            when = max(when, state.at.get(operation.kind, 0.0))
            state.at[operation.kind] = when
        self._clock.at(when, lambda: self._seen(operation))

    def _seen(self, operation: Operation) -> None:
        if self._dead:
            return
        self._done.append(operation)
        self._on_event()

    def _reap(self, operation: Operation) -> None:
        operation.pending = False
        self.in_flight -= 1
        self.calls -= operation.kind is Kind.CALL
        descriptor = operation.descriptor
        if descriptor is None:
            return
        descriptor.pending -= 1
        _mark(descriptor, operation.kind, pending=False)
        state = self._states[descriptor]
        if operation.kind is Kind.CLOSE:
            descriptor.closed = True
            del self._states[descriptor]
        elif state.close is not None:
            self._finish_close(state)

    def _shuffled(self, done: list[Operation]) -> list[Operation]:
        """Any order that keeps each descriptor's own."""
        if len(done) < 2:
            return done
        lanes: dict[Descriptor | None, deque[Operation]] = {}
        for operation in done:
            lanes.setdefault(operation.descriptor, deque()).append(operation)
        order = [lane for lane in lanes.values() for _ in lane]
        self._chance.shuffle(order)
        return [lane.popleft() for lane in order]

    # -- the end of a descriptor ---------------------------------------------------------------------------------------

    def _begin_close(self, state: _State, operation: Operation) -> None:
        state.close = operation
        receives = state.waiting[Kind.RECEIVE]
        while receives:
            late = _receive(state.socket, receives[0]) if self._chance.random() < 0.3 else None
            self._complete(receives.popleft(), late or self._chance.choice((0, -ECANCELED)))
        sends = state.waiting[Kind.SEND]
        while sends:
            self._complete(sends.popleft(), self._chance.choice((-EPIPE, -ECANCELED)))
        for poll in state.polls:
            self._complete(poll, self._chance.choice((-ECANCELED, select.POLLOUT | select.POLLHUP)))
        state.polls.clear()
        if state.watch is not None:
            self._complete(state.watch, -ECANCELED)
            state.watch = None
        state.socket.close()
        self._finish_close(state)

    def _finish_close(self, state: _State) -> None:
        """Once every other completion has been reaped, the number is free."""
        operation = state.close
        assert operation is not None and operation.descriptor is not None
        if operation.descriptor.pending == 1:
            state.close = None
            del self._attached[operation.descriptor.number]
            self._system.close(operation.descriptor.number)
            self._complete(operation, 0)

    @staticmethod
    def _withdraw(state: _State, operation: Operation) -> bool:
        """Whether `operation` had not taken effect yet."""
        if state.watch is operation:
            state.watch = None
            return True
        for queue in (state.waiting[Kind.RECEIVE], state.waiting[Kind.SEND], state.polls):
            if operation in queue:
                queue.remove(operation)
                return True
        return False


def _is_taken(descriptor: Descriptor, kind: Kind) -> bool:
    """Whether what is pending for `descriptor` leaves no room for an operation of this kind."""
    if kind is Kind.WATCH:
        return descriptor.pending > 0
    if descriptor.watched:
        return True
    return (descriptor.receiving and kind is Kind.RECEIVE) or (descriptor.sending and kind is Kind.SEND)


def _mark(descriptor: Descriptor, kind: Kind, *, pending: bool) -> None:
    match kind:
        case Kind.RECEIVE:
            descriptor.receiving = pending
        case Kind.SEND:
            descriptor.sending = pending
        case Kind.WATCH:
            descriptor.watched = pending
        case Kind.CLOSE:
            descriptor.closing = True
        case _:
            pass


def _receive(socket: Socket, operation: Operation) -> int | None:
    """readv(2): bytes into the operation's buffers, in order."""
    data = socket.receive(sum(map(len, operation.buffers)))
    if data is None or isinstance(data, int):
        return data
    at = 0
    for buffer in operation.buffers:
        assert isinstance(buffer, memoryview)
        piece = data[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        at += len(piece)
    return len(data)


def _send(socket: Socket, operation: Operation) -> int | None:
    """writev(2): what is in the buffers now, as far as there may be room for it."""
    pieces, left = [], max(1, socket.room)
    for buffer in operation.buffers:
        pieces.append(buffer[:left])
        left -= len(pieces[-1])
        if left <= 0:
            break
    return socket.send(b"".join(pieces))
