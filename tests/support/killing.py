"""A server that is killed at a random moment, and what must be there when it is started again.

Several clients write, each over a connection of its own and several requests at a time; every sector that is written
says by which request. From a request's being sent to its answer it may have happened or not. When the server is killed,
what a sector may hold afterwards follows from the order of requests alone:

* the last that a flush or FUA covers, or any that was not answered before that one was sent;
* nothing else: nothing that came before, no sector of half a request mixed with another, nothing nobody wrote.

A flush covers what was answered before it was sent. A trim may leave what was there.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nbdshard.common.errors import NbdshardError, RequestError
from nbdshard.common.nbd.client import Done
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.ranges import Range
from support import processes
from support.chains import CHAINS, Chain
from support.nbd_blocking import Connection
from support.served import NAME, Served, serving
from support.waiting import WAIT_SECONDS

SECTOR = 512
ALIGNMENT = 4096  # of what the clients write: no two of them meet within a sector
CLIENTS = 3
BATCH = 6
LENGTHS = (4096, 4096, 16_384, 65_536, 200_704)
ZEROES = 0

PASSING = ("delay", "error", "log", "rate", "retry", "stats")  # layers that keep nothing: the long suite has them


def _keeps(chain: Chain) -> bool:
    """Whether anything is to be there when the server is started again."""
    return "memory:" not in chain.conn and ("cow:" not in chain.conn or "overlay=" in chain.conn)


KEEPING: Mapping[str, Chain] = {name: chain for name, chain in CHAINS.items() if _keeps(chain)}
KEEPING_SHORT: Mapping[str, Chain] = {name: chain for name, chain in KEEPING.items() if not name.startswith(PASSING)}


class Lost(Exception):
    """Something that was flushed is not there."""


@dataclass(eq=False)
class Change:
    """A request that changes something. Times count what was sent and answered."""

    content: int  # its own number, which is in every sector it writes; ZEROES
    may_do_nothing: bool
    connection: int
    begun: int
    ended: int | None = None
    is_durable: bool = False

    def supersedes(self, other: Change) -> bool:
        """`other` cannot be seen any more."""
        came_later = other.ended is not None and other.ended < self.begun
        return self.is_durable and came_later and not self.may_do_nothing


def sector(content: int, number: int) -> bytes:
    """What a request writes to a sector."""
    return struct.pack(">QQ", content, number) * (SECTOR // 16) if content else bytes(SECTOR)


@dataclass
class History:
    """Every change so far, by sector; the first one is what was there at the beginning."""

    size: int
    time: int = 0
    changes: int = 0
    flushes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.begin([ZEROES] * (self.size // SECTOR))

    def begin(self, contents: Sequence[int]) -> None:
        """All of it is known to be this, and durable."""
        self.sectors = [[Change(content, False, -1, self.tick(), self.time, True)] for content in contents]
        self.answered: list[Change] = []  # and not known to be durable

    def tick(self) -> int:
        self.time += 1
        return self.time

    def sent(self, where: Range, connection: int, *, zeroes: bool, trim: bool) -> Change:
        with self.lock:
            self.changes += 1
            change = Change(ZEROES if zeroes else self.changes, trim, connection, self.tick())
            for number in range(where.start // SECTOR, where.end // SECTOR):
                self.sectors[number].append(change)
            return change

    def done(self, change: Change, *, fua: bool) -> None:
        with self.lock:
            change.ended, change.is_durable = self.tick(), fua
            if not fua:
                self.answered.append(change)

    def flush_sent(self) -> int:
        with self.lock:
            return self.tick()

    def flushed(self, begun: int, connection: int | None) -> None:
        """`connection`: the only one that a flush covers; None is all."""
        with self.lock:
            self.flushes += 1
            left = []
            for change in self.answered:
                assert change.ended is not None
                if change.ended < begun and connection in (None, change.connection):
                    change.is_durable = True
                else:
                    left.append(change)
            self.answered = left

    def check(self, found: bytes) -> list[int]:
        """What each sector holds. Raises Lost."""
        contents = []
        for number, changes in enumerate(self.sectors):
            allowed = {each.content for each in changes if not any(other.supersedes(each) for other in changes)}
            data = found[number * SECTOR : (number + 1) * SECTOR]
            content = struct.unpack_from(">Q", data)[0]
            if data != sector(content, number) or content not in allowed:
                told = [(each.content, each.begun, each.ended, each.is_durable) for each in changes]
                raise Lost(f"sector {number} holds {content} ({data[:16].hex()}), allowed are {allowed} of {told}")
            contents.append(content)
        return contents


class _Client:
    """A connection that writes until the server is gone."""

    def __init__(self, served: Served, history: History, number: int, chance: random.Random, killing: _Kill) -> None:
        self.connection = Connection(served.socket, Wishes(NAME))
        self._history, self._number, self._chance, self._killing = history, number, chance, killing
        self._changes: dict[int, tuple[Change, bool]] = {}
        self._flushes: dict[int, int] = {}
        self.error: BaseException | None = None
        self._is_covering = bool(self.connection.export.flags & TransmissionFlag.CAN_MULTI_CONN)

    def run(self) -> None:
        try:
            while True:
                for handle in range(self._chance.randrange(1, BATCH + 1)):
                    self._ask(handle)
                self._settle()
        except OSError:
            pass  # the server is gone
        except NbdshardError as error:
            if not self._killing.is_done.is_set():
                self.error = error
        except BaseException as error:
            self.error = error
        finally:
            if self.error is not None:
                self._killing.is_due.set()  # nobody waits for what does not come
            self.connection.socket.close()

    def _ask(self, handle: int) -> None:
        chance, client, history = self._chance, self.connection.client, self._history
        kind = chance.choice(["write"] * 6 + ["zero", "trim", "flush", "flush"])
        if kind == "flush":
            self._flushes[handle] = history.flush_sent()
            client.flush(handle)
            return
        length = min(chance.choice(LENGTHS), history.size)
        start = chance.randrange(0, history.size - length + 1, ALIGNMENT)
        where, fua = Range.of(start, length), chance.random() < 0.15
        change = history.sent(where, self._number, zeroes=kind != "write", trim=kind == "trim")
        self._changes[handle] = (change, fua)
        match kind:
            case "write":
                numbers = range(where.start // SECTOR, where.end // SECTOR)
                client.write(handle, where, [b"".join(sector(change.content, each) for each in numbers)], fua=fua)
            case "zero":
                client.write_zeroes(handle, where, no_hole=chance.random() < 0.3, fua=fua)
            case _:
                client.trim(handle, where, fua=fua)

    def _settle(self) -> None:
        """Send what is queued, and take every answer as it comes."""
        connection, events = self.connection, list[Done]()
        connection.push(events)
        self._take(events)
        while connection.client.pending:
            count = connection.socket.recvmsg_into(connection.client.receive_target())[0]
            if not count:
                raise ConnectionResetError
            self._take([event for event in connection.client.received(count) if isinstance(event, Done)])

    def _take(self, events: Sequence[Done]) -> None:
        for event in events:
            if isinstance(event.error, RequestError) and event.error.errno_name != "ESHUTDOWN":
                raise event.error
            if event.handle in self._flushes:
                begun = self._flushes.pop(event.handle)
                if event.error is None:
                    self._history.flushed(begun, None if self._is_covering else self._number)
            else:
                change, fua = self._changes.pop(event.handle)
                if event.error is None:
                    self._history.done(change, fua=fua)
            self._killing.answered()


class _Kill:
    """The moment: after so many answers, whoever takes the last of them."""

    def __init__(self, answers: int) -> None:
        self._left = answers
        self._lock = threading.Lock()
        self.is_due = threading.Event()
        self.is_done = threading.Event()

    def answered(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self.is_due.set()


def survives(conn: str, driver: str, size: int, seed: int, *words: str, rounds: int = 2) -> History:
    """Have `nbdshard serve` killed `rounds` times while clients write, and see that what was flushed is there.

    `size`: of the export, which reads as zeroes at first. Raises Lost, with the seed.
    """
    chance, history = random.Random(seed), History(size)
    try:
        for _ in range(rounds):
            _written_until_killed(conn, driver, history, chance, words)
            history.begin(_found(conn, driver, history, words))
    except Lost as lost:
        raise Lost(f"seed {seed}: {lost}") from None
    assert history.flushes, "no flush was answered, so nothing is shown"
    return history


def _written_until_killed(
    conn: str, driver: str, history: History, chance: random.Random, words: Sequence[str]
) -> None:
    with serving(conn, *words, driver=driver) as served:
        kill = _Kill(chance.randrange(20, 400))
        clients = [_Client(served, history, n, random.Random(chance.random()), kill) for n in range(CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        assert kill.is_due.wait(WAIT_SECONDS), served.run.err()
        kill.is_done.set()
        processes.kill_group(served.run.pid)
        served.run.process.wait(WAIT_SECONDS)
        for thread in threads:
            thread.join()
        for client in clients:
            if client.error is not None:
                raise client.error


def _found(conn: str, driver: str, history: History, words: Sequence[str]) -> list[int]:
    """What is there when it is started again, durable from then on."""
    with serving(conn, *words, driver=driver) as served, Connection(served.socket, Wishes(NAME)) as connection:
        found = b"".join(connection.read(where) for where in _pieces(history.size))
        contents = history.check(found)
        connection.client.flush(0)
        (done,) = connection.run()
        assert done.error is None
        return contents


def _pieces(size: int) -> Iterator[Range]:
    return Range(0, size).split(1 << 20)
