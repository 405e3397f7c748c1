"""A worker's connections to both sides: opens as many as it is allotted, and knows which are up."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from nbdshard.common.errors import NbdshardError
from nbdshard.common.messages import Assign, Side
from nbdshard.common.ring import Ring
from nbdshard.worker.opening import OpenConnection, make_connection
from nbdshard.worker.pipes import Plumbing
from nbdshard.worker.sockets import SYSTEM_SOCKETS, Connector

SIDES: tuple[Side, Side] = ("source", "destination")


class _Member(msgspec.Struct, eq=False):
    """One connection of the crew."""

    side: Side
    connection: OpenConnection
    ready: bool = False
    gone: bool = False


class Crew:
    """The connections of one worker.

    One to each side is opened first. The others follow when both are up, for a server may advertise more connections
    than it admits: those that do not come up are done without. `opened(side, connection)` is called for each that does,
    `lost(side, connection, error)` for each that fails, before or after.
    """

    def __init__(
        self,
        ring: Ring,
        assign: Assign,
        opened: Callable[[Side, OpenConnection], None],
        lost: Callable[[Side, OpenConnection, NbdshardError], None],
        connector: Connector = SYSTEM_SOCKETS,
        plumbing: Plumbing | None = None,
        look: Callable[[], object] = lambda: None,
    ) -> None:
        self._ring = ring
        self._assign = assign
        self._opened = opened
        self._lost = lost
        self._connector = connector
        self._plumbing = plumbing
        self._look = look
        self._members: list[_Member] = []
        self._connections: list[OpenConnection] = []  # theirs: looked at in every turn
        self._is_ending = False  # nothing is opened any more
        self._now = 0.0

    def want(self, assign: Assign, now: float) -> None:
        """Take over an allotment: open what it allows and we do not have. Raises UserError for a bad address."""
        self._assign = assign
        self._now = now
        if not self._members:
            for side in SIDES:
                self._open(side)
        elif self.first_pair() is not None:
            self._open_rest()

    def _open_rest(self) -> None:
        if self._is_ending:
            return  # whoever was told of the first pair did not like it
        wanted: dict[Side, int] = {
            "source": self._assign.source_connections,
            "destination": self._assign.destination_connections,
        }
        for side in SIDES:
            have = sum(1 for member in self._members if member.side == side)
            for _ in range(wanted[side] - have):
                self._open(side)

    def _open(self, side: Side) -> None:
        assign = self._assign
        address = assign.source if side == "source" else assign.destinations[0]
        connection = make_connection(
            self._ring,
            address,
            "source" if assign.options.mode == "compare" else side,  # nothing is written: both ends are read
            assign.options,
            self._on_ready,
            self._on_lost,
            self._connector,
            self._plumbing,
            self._look,
        )
        self._members.append(_Member(side, connection))
        self._connections.append(connection)
        # One handle more than requests: block status on a source, the flush on a destination.
        connection.start(self._now, assign.options.requests + 1)

    def _on_ready(self, connection: OpenConnection) -> None:
        member = self._member(connection)
        first = self.first_pair() is None
        member.ready = True
        self._opened(member.side, connection)
        if first and self.first_pair() is not None:
            self._open_rest()

    def _on_lost(self, connection: OpenConnection, error: NbdshardError) -> None:
        member = self._member(connection)
        member.gone = True
        self._lost(member.side, connection, error)

    def _member(self, connection: OpenConnection) -> _Member:
        return next(member for member in self._members if member.connection is connection)

    def can_do_without(self, connection: OpenConnection) -> bool:
        """Whether `connection` failed before it was up, while others of its side are."""
        lost = self._member(connection)
        return not lost.ready and self.count(lost.side) > 0

    def first_pair(self) -> tuple[OpenConnection, OpenConnection] | None:
        """A source and a destination connection that are up."""
        firsts = [next((each for of, each in self.ready() if of == side), None) for side in SIDES]
        source, destination = firsts
        return None if source is None or destination is None else (source, destination)

    def ready(self) -> list[tuple[Side, OpenConnection]]:
        """The connections that are up, in the order they were opened."""
        return [(member.side, member.connection) for member in self._members if member.ready and not member.gone]

    def count(self, side: Side) -> int:
        """How many connections to `side` are up."""
        return sum(1 for of, _ in self.ready() if of == side)

    def pump(self, now: float) -> bool:
        """Let the connections send and move what they can; whether one has more to do, so that nobody may wait."""
        self._now = now
        for connection in self._connections:
            if connection.has_work:
                connection.pump(now)
        return any(connection.has_work for connection in self._connections)

    def tick(self, now: float) -> None:
        for member in self._members:
            member.connection.tick(now)

    def disconnect(self, *, at_once: bool) -> None:
        """End every connection, softly (what was asked is awaited) or at once, and open no more."""
        self._is_ending = True
        for member in self._members:
            if at_once:
                member.connection.close()
            else:
                member.connection.disconnect()

    @property
    def closed(self) -> bool:
        return all(member.connection.closed for member in self._members)
