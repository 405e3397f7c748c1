"""A process's pipes and the calls that splice, simulated: worker.pipes' promises, kept as unhelpfully as they allow.

Counts are short. A pipe is full long before it holds its capacity, as one of Linux is if each of its slots has a small
piece in it; perhaps just when nothing more has arrived. What arrives between two calls was not there for the first one.
Pipes are refused, or small, when the user's share of them is used up.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from errno import EAGAIN, EMFILE

from nbdshard.worker.pipes import SAMPLE_BYTES, SAMPLES_MAX, Pipe
from simulation.network import Socket
from simulation.ring import SimRing, SimSystem

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PipeRules:
    """What pipes are like. Shares are between 0 and 1."""

    full_early_share: float = 0.0  # of the fillings that end before the pipe holds its capacity
    short_share: float = 0.0  # of the calls that move less than they could, or nothing
    pipes_max: int = 1000  # those beyond it cannot be opened
    large_max: int = 1000  # those beyond it hold a page


class SimPipe(Pipe):
    """Bytes in order. `limit`: with how many of them it is full this time."""

    __slots__ = ("content", "limit")

    def __init__(self, read_end: int, write_end: int, capacity: int) -> None:
        super().__init__(read_end, write_end, capacity)
        self.content = bytearray()
        self.limit = capacity

    def put(self, data: bytes) -> None:
        self.content += data
        self.held += len(data)

    def take(self, count: int) -> None:
        del self.content[:count]
        self.held -= count


class SimPlumbing:
    """Implements `worker.pipes.Plumbing` for one process."""

    def __init__(self, system: SimSystem, ring: SimRing, chance: random.Random, rules: PipeRules) -> None:
        self._system = system
        self._ring = ring
        self._chance = chance
        self._rules = rules
        self._pipes: set[SimPipe] = set()
        self._look: SimPipe | None = None
        self._announced: dict[int, Socket] = {}  # where more was to follow at once

    def check(self, free: Iterable[Pipe]) -> None:
        """When the process waits, nothing that was announced is missing, and what is free is empty."""
        for pipe in free:
            assert not self._mine(pipe).content, f"pipe {pipe.read_end} is free, and has something in it"
        missing = [number for number, socket in self._announced.items() if self._system.open.get(number) is socket]
        assert not missing, f"more was to follow at once on {missing}, and nothing did"
        self._announced.clear()

    # -- worker.pipes.Plumbing -----------------------------------------------------------------------------------------

    def open_pipe(self, size: int) -> Pipe | int:
        if len(self._pipes) >= self._rules.pipes_max:
            return -EMFILE
        capacity = size if len(self._pipes) < self._rules.large_max else PAGE_BYTES
        pipe = SimPipe(self._system.take_pipe_end(), self._system.take_pipe_end(), capacity)
        self._pipes.add(pipe)
        return pipe

    def close_pipe(self, pipe: Pipe) -> None:
        mine = self._mine(pipe)
        self._pipes.remove(mine)
        self._system.pipe_ends -= {mine.read_end, mine.write_end}

    def close(self) -> None:
        if self._look is not None:
            self.close_pipe(self._look)
            self._look = None

    def fill(self, pipe: Pipe, number: int, count: int) -> int:
        mine, socket = self._mine(pipe), self._ring.watched(number)
        if not mine.content:
            mine.limit = self._limit(mine.capacity)
        if self._chance.random() < self._rules.full_early_share / 4:
            mine.limit = min(mine.limit, len(mine.content) + max(1, socket.unread))  # just what is here now
        moved, mine.is_full = 0, False
        while moved < count:
            room = mine.limit - len(mine.content)
            if room <= 0 or self._comes_too_late(socket):
                mine.is_full = room <= 0 and socket.unread > 0
                return moved or -EAGAIN
            data = socket.receive(self._perhaps_less(min(count - moved, room)))
            if data is None:
                return moved or -EAGAIN
            if isinstance(data, int):
                return moved or data
            if not data:
                return moved
            mine.put(data)
            moved += len(data)
        return moved

    def drain(self, pipe: Pipe, number: int, count: int, *, more: bool) -> int:
        mine = self._mine(pipe)
        sent = self._send(number, bytes(mine.content[:count]), more=more)
        if sent > 0:
            mine.take(sent)
        return sent

    def peek(self, pipe: Pipe, buffer: memoryview) -> int:
        mine = self._mine(pipe)
        look = self._look_pipe(mine.capacity)
        if isinstance(look, int):
            return look
        count = min(len(mine.content), self._limit(look.capacity))
        if self._chance.random() < self._rules.short_share:
            count = self._chance.randint(0, count)
        buffer[:count] = mine.content[:count]
        return count or -EAGAIN

    def sample(self, pipe: Pipe, unit: int) -> bytes:
        mine = self._mine(pipe)
        units, rest = divmod(len(mine.content), unit)
        assert 0 < units <= SAMPLES_MAX and not rest, f"a pipe with {len(mine.content)} bytes by units of {unit}"
        if isinstance(self._look_pipe(mine.capacity), int) or self._chance.random() < self._rules.short_share:
            return b""
        within = self._chance.randint(0, unit - SAMPLE_BYTES)
        places = range(within, len(mine.content), unit)
        return b"".join(mine.content[place : place + SAMPLE_BYTES] for place in places)

    def read(self, pipe: Pipe, buffer: memoryview) -> int:
        mine = self._mine(pipe)
        count = self._perhaps_less(min(len(buffer), len(mine.content)))
        buffer[:count] = mine.content[:count]
        mine.take(count)
        return count or -EAGAIN

    def discard(self, pipe: Pipe) -> int:
        mine = self._mine(pipe)
        if self._chance.random() < self._rules.short_share:
            return -EMFILE
        count = len(mine.content)
        mine.take(count)
        return count

    def receive(self, number: int, buffers: Sequence[memoryview]) -> int:
        socket = self._ring.watched(number)
        wanted = sum(map(len, buffers))
        assert wanted, "receiving no bytes"
        data = None if self._comes_too_late(socket) else socket.receive(wanted)
        if data is None:
            return -EAGAIN
        if isinstance(data, int):
            return data
        if len(data) < wanted and socket.unread:
            socket.arrive_again()  # a short count says that there was no more
        at = 0
        for buffer in buffers:
            piece = data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return len(data)

    def send(self, number: int, pieces: Sequence[bytes | memoryview], *, more: bool) -> int:
        return self._send(number, b"".join(pieces), more=more)

    def _look_pipe(self, capacity: int) -> SimPipe | int:
        """Where `peek` and `sample` tee to."""
        if self._look is None:
            opened = self.open_pipe(capacity)
            if isinstance(opened, int):
                return opened
            self._look = self._mine(opened)
        return self._look

    # -- chance --------------------------------------------------------------------------------------------------------

    def _send(self, number: int, data: bytes, *, more: bool) -> int:
        socket = self._ring.watched(number)
        self._announced.pop(number, None)
        assert data, "sending no bytes"
        if self._chance.random() < self._rules.short_share / 4:
            return -EAGAIN  # though there is room: for want of memory, say
        sent = socket.send(data)
        if sent is None:
            return -EAGAIN
        if more and sent == len(data):
            self._announced[number] = socket
        return sent

    def _limit(self, capacity: int) -> int:
        if self._chance.random() < self._rules.full_early_share:
            return self._chance.randint(1, capacity)
        return capacity

    def _perhaps_less(self, count: int) -> int:
        if count > 1 and self._chance.random() < self._rules.short_share:
            return self._chance.randint(1, count)
        return count

    def _comes_too_late(self, socket: Socket) -> bool:
        """Whether what is unread only arrives after this call."""
        if not socket.unread or self._chance.random() >= self._rules.short_share / 4:
            return False
        socket.arrive_again()
        return True

    def _mine(self, pipe: Pipe) -> SimPipe:
        assert isinstance(pipe, SimPipe)
        assert pipe in self._pipes, f"pipe {pipe.read_end} is closed"
        assert pipe.held == len(pipe.content), f"pipe {pipe.read_end} holds {len(pipe.content)} bytes, not {pipe.held}"
        return pipe
