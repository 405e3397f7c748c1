"""A simulated NBD server: a disk, rules of behaviour, and a session for each connection."""

from __future__ import annotations

import random
from collections.abc import Callable

from simulation.clock import Pace, SimClock
from simulation.disk import Disk
from simulation.network import Socket
from simulation.server_rules import CMD_WRITE, CMD_WRITE_ZEROES, Errors, Full, ServerRules
from simulation.session import Request, Session, Write


class SimServer:
    """Listens at one address. Implements `network.Listener`."""

    def __init__(self, rules: ServerRules, disk: Disk, clock: SimClock, chance: random.Random, pace: Pace) -> None:
        self.rules = rules
        self.disk = disk
        self.errors = Errors(rules, chance)
        self.sessions: list[Session] = []
        self.connections_most = 0
        self.is_down = False  # nobody listens: it has crashed
        self.break_off: Callable[[Session], None] | None = None  # what is done once some session is half-way
        self.deserted = 0  # connections that ended without a word
        self.expected: bytes | None = None  # what every write must bring
        self.reads = self.writes = self.flushes = 0
        self.life = 0
        self.unflushed: list[Write] = []  # of all connections of this life, where that matters
        self._unserved: list[Socket] = []
        self._clock = clock
        self._chance = chance
        self._pace = pace

    @property
    def size(self) -> int:
        return len(self.disk.data)

    def admits(self) -> bool | None:
        if self.is_down:
            return False
        if not self._has_room() and self.rules.when_full is Full.IGNORE:
            return None
        return self._has_room() or self.rules.when_full is not Full.REFUSE

    def accepted(self, socket: Socket) -> None:
        if self._has_room():
            self.sessions.append(Session(self, socket, self._chance))
            self.connections_most = max(self.connections_most, len(self.sessions))
        elif self.rules.when_full is Full.HANG:
            self._unserved.append(socket)
            socket.on_change = lambda: self._watch_unserved(socket)
        else:
            socket.close()

    def approached(self, count: int) -> None:
        """The whole job keeps to one connection where the server does not say that it takes several."""
        if self.rules.is_contested:
            return  # who was given up before it had a lease may still be connected: `check_writer` looks at the rest
        assert self.rules.multi_conn or count <= 1, f"{count} connections to the {self.rules.name}, which takes one"

    def _has_room(self) -> bool:
        return len(self.sessions) < self.rules.connections_max

    def _watch_unserved(self, socket: Socket) -> None:
        """A client that waits in vain may go."""
        if socket.receive(1) == b"" or socket.error:
            socket.close()
            self._unserved.remove(socket)

    @property
    def quiet(self) -> bool:
        """Whether nobody is connected any more."""
        return not self.sessions and not self._unserved

    def left(self, session: Session) -> None:
        if session in self.sessions:
            self.sessions.remove(session)

    def crash(self, back_after: float) -> None:
        """It is gone with everything it had not flushed, and is back after so many seconds."""
        self.is_down = True
        self.life += 1
        self.unflushed = []
        for session in list(self.sessions):
            session.die()
        for socket in self._unserved:
            socket.close()
        self._unserved.clear()
        self.disk.crash(self._chance)
        self._clock.after(back_after, self._come_back)

    def _come_back(self) -> None:
        self.is_down = False

    def lose_some(self) -> None:
        """Write-back failed: some of what is unflushed will never be on the disk, and the next flush does not know."""
        for session in self.sessions:
            session.lose_some()

    def half_way(self, session: Session) -> None:
        """Some of a reply is sent, or some of a write has come."""
        if self.break_off is not None and session in self.sessions and self._chance.random() < 0.3:
            how, self.break_off = self.break_off, None
            how(session)

    def later(self, action: Callable[[], None]) -> None:
        """Something takes its time."""
        self._clock.after(self._pace.seconds(), action)

    def check_writer(self, writer: Session) -> None:
        """The writer's role moves only when its last holder is known gone."""
        writer.has_written = True
        writers = [session for session in self.sessions if session.has_written and not session.is_deserted]
        assert self.rules.multi_conn or len(writers) <= 1, f"{len(writers)} write to a server that takes one writer"

    def check_overlap(self, of: Session, request: Request, story: str) -> None:
        """Two writes to the same bytes at a time leave nobody knows what."""
        start, end = request.offset, request.offset + request.length
        for session in self.sessions:
            if session.is_deserted or (self.rules.is_contested and session is not of):
                continue  # a dead client's writes may still be carried out, and say the same
            for other in session.running:
                if other.command in (CMD_WRITE, CMD_WRITE_ZEROES):
                    first, last = other.offset, other.offset + other.length
                    assert last <= start or end <= first, f"{story} while [{first}, {last}) is under way"
