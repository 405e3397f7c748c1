"""A network of byte streams: what is sent arrives later, in pieces of any size; connections end, or are cut.

What a socket of Linux does, as far as one end can tell: short counts both ways, backpressure, the end of the stream
behind what was sent; ECONNRESET when the peer closed with something unread, or had closed when something came for it.
"""

from __future__ import annotations

import random
import select
from collections.abc import Callable
from dataclasses import dataclass
from errno import ECONNREFUSED, ECONNRESET, EPIPE
from typing import Protocol

from simulation.clock import Pace, SimClock

FAILED_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
ENDED_EVENTS = select.EPOLLIN | select.EPOLLRDHUP


@dataclass(frozen=True, slots=True)
class Weather:
    """What the network is like."""

    pace: Pace
    capacity: int  # bytes on their way in one direction, like a socket buffer
    split_share: float  # of sends and receives that move less than they could


class Pipe:
    """One direction: `write` at one end, `read` at the other. `None` means that it would block."""

    def __init__(self, clock: SimClock, chance: random.Random, weather: Weather) -> None:
        self._clock = clock
        self._chance = chance
        self._weather = weather
        self._here = bytearray()  # arrived and not read
        self._under_way = 0
        self._last_arrival = 0.0
        self.ended = False  # the end of the stream has arrived
        self.shut = False  # nothing more may be written
        self.read_closed = False  # nobody will read any more
        self.on_arrival: Callable[[], None] = _nothing
        self.on_end: Callable[[], None] = _nothing
        self.on_room: Callable[[], None] = _nothing
        self.on_waste: Callable[[], None] = _nothing  # something arrived where nobody reads

    @property
    def readable(self) -> bool:
        return bool(self._here) or self.ended

    @property
    def room(self) -> int:
        return self._weather.capacity - len(self._here) - self._under_way

    @property
    def is_roomy(self) -> bool:
        """Whether poll(2) calls it writable: a third of a socket's buffer has to be free for that, or there about."""
        return self.shut or 3 * self.room >= self._weather.capacity

    @property
    def unread(self) -> int:
        return len(self._here)

    def write(self, data: bytes | memoryview) -> int | None:
        """Take over some bytes from the front of `data`; how many, or None where there is no room."""
        count = min(len(data), self.room)
        if count <= 0:
            return None
        count = self._perhaps_less(count)
        self._send(bytes(data[:count]))
        return count

    def _perhaps_less(self, count: int) -> int:
        if count > 1 and self._chance.random() < self._weather.split_share:
            return self._chance.randint(1, count)
        return count

    def _send(self, data: bytes) -> None:
        self._under_way += len(data)
        self._later(lambda: self._arrive(data))

    def _later(self, action: Callable[[], None]) -> None:
        """Behind everything that is under way."""
        self._last_arrival = max(self._last_arrival, self._clock.now + self._weather.pace.seconds())
        self._clock.at(self._last_arrival, action)

    def _arrive(self, data: bytes) -> None:
        self._under_way -= len(data)
        if self.read_closed:
            self.on_waste()
            return
        self._here += data
        self.on_arrival()

    def read(self, limit: int) -> bytes | None:
        """Up to `limit` bytes that have arrived; b"" at the end of the stream, None while there is nothing."""
        if not self._here:
            return b"" if self.ended else None
        count = self._perhaps_less(min(limit, len(self._here)))
        data = bytes(self._here[:count])
        del self._here[:count]
        self.on_room()
        return data

    def end(self) -> None:
        """The writer is done: the end of the stream arrives behind what is under way."""
        if not self.shut:
            self.shut = True
            self._later(self._arrive_end)

    def _arrive_end(self) -> None:
        self.ended = True
        self.on_end()


class Socket:
    """One end of a connection. `on_change` is called whenever a receive, send or poll may do better than before.

    `on_edge` is called with what has changed, as events of epoll(7).
    """

    def __init__(self, clock: SimClock, pace: Pace) -> None:
        self._clock = clock
        self._pace = pace
        self._inbound: Pipe | None = None
        self._outbound: Pipe | None = None
        self._peer: Socket | None = None
        self.error = 0  # the errno that ended it
        self.closed = False
        self.on_change: Callable[[], None] = _nothing
        self.on_edge: Callable[[int], None] = _ignore

    @property
    def connected(self) -> bool:
        return self._outbound is not None

    @property
    def is_deserted(self) -> bool:
        """Whether the other end was closed: what nobody at this end can know yet, but a check may."""
        return self._peer is not None and self._peer.closed

    @property
    def readable(self) -> bool:
        return self.error != 0 or (self._inbound is not None and self._inbound.readable)

    @property
    def writable(self) -> bool:
        return self.error != 0 or (self._outbound is not None and (self._outbound.room > 0 or self._outbound.shut))

    @property
    def room(self) -> int:
        """How many bytes a send could take at most."""
        return self._outbound.room if self._outbound is not None else 0

    @property
    def unread(self) -> int:
        """How many bytes have arrived and were not received."""
        return self._inbound.unread if self._inbound is not None else 0

    @property
    def events(self) -> int:
        """What is true now, as events of epoll(7)."""
        if self.error:
            return FAILED_EVENTS
        if self._inbound is None or self._outbound is None:
            return 0
        events = select.EPOLLIN if self._inbound.readable else 0
        events |= select.EPOLLOUT if self._outbound.is_roomy else 0
        if self._inbound.ended:
            events |= select.EPOLLRDHUP | (select.EPOLLHUP if self._outbound.shut else 0)
        return events

    def receive(self, limit: int) -> bytes | int | None:
        """Bytes, b"" at the end, -errno, or None where it would block."""
        if self._inbound is None:
            return -self.error or None
        if self.error:
            return -self.error
        return self._inbound.read(limit)

    def send(self, data: bytes | memoryview) -> int | None:
        """How many bytes were taken, -errno, or None where it would block."""
        if self._outbound is None:
            return -self.error or None
        if self.error or self._outbound.shut:
            return -(self.error or EPIPE)
        return self._outbound.write(data)

    def close(self) -> None:
        """Both directions; the peer hears the end, or a reset if there was something unread."""
        if self.closed:
            return
        self.closed = True
        if self._inbound is None or self._outbound is None:
            return
        unread = self._inbound.unread
        self._inbound.read_closed = True
        if unread and not self.error:
            self._reset_peer()
        self._outbound.end()

    def cut(self) -> None:
        """Something on the way has dropped the connection: both ends find out, each in its time."""
        self._reset_peer()
        self._clock.after(self._pace.seconds(), lambda: self._reset(ECONNRESET))

    def _reset_peer(self) -> None:
        peer = self._peer
        if peer is not None:
            self._clock.after(self._pace.seconds(), lambda: peer._reset(ECONNRESET))

    def _reset(self, error: int) -> None:
        if not self.error and not self.closed:
            self.error = error
            self._changed(FAILED_EVENTS)

    def refuse(self, error: int) -> None:
        """Connecting has failed."""
        self.error = error
        self._changed(FAILED_EVENTS)

    def arrive_again(self) -> None:
        """What is unread has in fact only just arrived: the last receive could not have it."""
        self._clock.after(self._pace.seconds(), lambda: self._changed(select.EPOLLIN))

    def _join(self, inbound: Pipe, outbound: Pipe, peer: Socket) -> None:
        self._inbound, self._outbound, self._peer = inbound, outbound, peer
        inbound.on_arrival = lambda: self._changed(select.EPOLLIN)
        inbound.on_end = lambda: self._changed(ENDED_EVENTS)
        outbound.on_room = lambda: self._changed(select.EPOLLOUT if outbound.is_roomy else 0)
        inbound.on_waste = self._reset_peer
        self._changed(select.EPOLLOUT)

    def _changed(self, events: int) -> None:
        if not self.closed:
            self.on_change()
            self.on_edge(events)


class Listener(Protocol):
    """A server's listening socket."""

    def admits(self) -> bool | None:
        """Whether a connection is taken; otherwise it is refused, or (None) never answered."""

    def accepted(self, socket: Socket) -> None:
        """A client has connected; `socket` is the server's end."""

    def approached(self, count: int) -> None:
        """A client has begun to connect: `count` of them now hold a socket on its way here, or connected."""


class SimNetwork:
    """Addresses and who listens at them."""

    def __init__(self, clock: SimClock, chance: random.Random, weather: Weather) -> None:
        self._clock = clock
        self._chance = chance
        self._weather = weather
        self._listeners: dict[str, Listener] = {}
        self._clients: dict[str, list[Socket]] = {}

    def listen(self, address: str, listener: Listener) -> None:
        self._listeners[address] = listener

    def connect(self, address: str) -> Socket:
        """A socket on its way to `address`: `connected`, or with an `error`, some time later."""
        socket = Socket(self._clock, self._weather.pace)
        clients = [client for client in self._clients.get(address, []) if not client.closed]
        self._clients[address] = [*clients, socket]
        if address in self._listeners:
            self._listeners[address].approached(len(clients) + 1)
        self._clock.after(self._weather.pace.seconds(), lambda: self._arrive(address, socket))
        return socket

    def _arrive(self, address: str, socket: Socket) -> None:
        listener = self._listeners.get(address)
        answer = listener is not None and listener.admits()
        if listener is None or not answer:
            if answer is not None:
                socket.refuse(ECONNREFUSED)
            return
        there = Socket(self._clock, self._weather.pace)
        to_server = Pipe(self._clock, self._chance, self._weather)
        to_client = Pipe(self._clock, self._chance, self._weather)
        there._join(to_server, to_client, socket)
        socket._join(to_client, to_server, there)
        if socket.closed:  # while it was connecting
            to_client.read_closed = True
            to_server.end()
        listener.accepted(there)


def _nothing() -> None:
    return None


def _ignore(_: int) -> None:
    return None
