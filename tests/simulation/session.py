"""One connection of a simulated NBD server: fixed newstyle, written from the specification on struct code of its own.

Requests are carried out some time after they came, in any order, and answered when they are done; the chunks of several
replies mingle. What a client must not do is asserted on the spot.
"""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simulation.network import Socket
from simulation.replies import make_reply
from simulation.server_rules import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    Extents,
    ServerRules,
)

if TYPE_CHECKING:
    from simulation.server import SimServer

OPT_EXPORT_NAME, OPT_ABORT, OPT_GO, OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META, OPT_EXTENDED = 1, 2, 7, 8, 9, 10, 11
REP_ACK, REP_INFO, REP_META = 1, 3, 4
REP_ERR_UNSUP, REP_ERR_INVALID = (1 << 31) + 1, (1 << 31) + 3
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_ZEROES, SEND_DF, MULTI_CONN = 1, 2, 4, 64, 128, 256
FLAG_NO_HOLE, FLAG_PAYLOAD_LEN = 2, 32
CONTEXT_ID = 7
RECEIVE_BYTES = 1 << 18

Need = Generator[int, bytes, None]


@dataclass(slots=True, eq=False)
class Request:
    """One request, from its last byte to its reply."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""
    covers: list[Write] = field(default_factory=list)  # a flush: what was acknowledged before it came


@dataclass(slots=True, eq=False)
class Write:
    """A write or a zeroing that was carried out, until a flush covers it."""

    start: int
    end: int
    acknowledged: bool = False
    is_lost: bool = False  # its write-back failed: no flush brings it to the disk any more


@dataclass(slots=True, eq=False)
class Reply:
    """A reply on its way out: units that must not be torn apart, and what becomes true with the last of them."""

    request: Request
    units: deque[bytes]
    write: Write | None = None


class Session:
    """One client. `closed` once nothing more will happen on the connection."""

    def __init__(self, server: SimServer, socket: Socket, chance: random.Random) -> None:
        self.server = server
        self.structured = self.extended = self.has_context = False
        self.closed = False
        self.has_written = False
        self.running: list[Request] = []  # received and not yet answered whole
        self._socket = socket
        self._chance = chance
        self._buffer = bytearray()
        self._out = bytearray()
        self._replies: list[Reply] = []
        self._unflushed: list[Write] = server.unflushed if server.rules.names_lives else []
        self._answered = 0
        self._leaving = False
        self._incomplete: Request | None = None  # a write whose payload is arriving
        self._is_cut = self._is_dead = False
        self._is_used = False  # something was asked
        self._talk = self._serve()
        self._need = next(self._talk)
        socket.on_change = self._changed
        self._changed()

    @property
    def rules(self) -> ServerRules:
        return self.server.rules

    @property
    def is_deserted(self) -> bool:
        return self._socket.is_deserted

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        if not self.closed:
            self._send()
            self._receive()

    def _receive(self) -> None:
        while not self.closed:
            data = self._socket.receive(RECEIVE_BYTES)
            if data is None:
                return
            if isinstance(data, int) or not data:
                self.close()
                return
            assert not self._leaving, f"{self.rules.name}: something behind the request to disconnect"
            self._buffer += data
            self._parse()

    def _parse(self) -> None:
        while not self.closed and not self._leaving and len(self._buffer) >= self._need:
            piece = bytes(self._buffer[: self._need])
            del self._buffer[: self._need]
            try:
                self._need = self._talk.send(piece)
            except StopIteration:
                assert not self._buffer, f"{self.rules.name}: something behind the request to disconnect"
                self._leaving = True
                self._send()
        if self._incomplete is not None and self._buffer and not self.closed:
            self.server.half_way(self)

    def _put(self, data: bytes) -> None:
        self._out += data
        self._send()

    def _send(self) -> None:
        while not self.closed:
            if not self._out:
                self._next_unit()
            if not self._out:
                if self._leaving and not self.running:
                    self.close()
                return
            count = self._socket.send(memoryview(self._out)[: self._socket.room])
            if count is None:
                return
            if count < 0:
                self.close()
                return
            del self._out[:count]
            if self._out:
                self.server.half_way(self)

    def _next_unit(self) -> None:
        """The next chunk of any reply."""
        if not self._replies:
            return
        reply = self._chance.choice(self._replies)
        self._out += reply.units.popleft()
        if not reply.units:
            self._replies.remove(reply)
            self.running.remove(reply.request)
            if reply.write is not None:
                reply.write.acknowledged = True

    def close(self) -> None:
        """The connection is over; what it had begun may still be carried out."""
        if not self.closed:
            self.closed = True
            self._socket.close()
            if self._incomplete is not None:
                self._check_payload(self._incomplete, bytes(self._buffer))
            if self._is_used and not self._leaving and not self._is_cut:
                self.server.deserted += 1
            self.server.left(self)

    def cut(self) -> None:
        """The network drops it."""
        if not self.closed:
            self._is_cut = True
            self._socket.cut()

    def die(self) -> None:
        """The server has crashed: nothing that it had begun is carried out any more."""
        self._is_dead = True
        self.hang_up()

    def lose_some(self) -> None:
        for write in self._unflushed:
            write.is_lost |= self._chance.random() < 0.5

    def hang_up(self) -> None:
        """The server closes it, in the middle of whatever it does."""
        self._is_cut = True
        self.close()

    # -- the handshake -------------------------------------------------------------------------------------------------

    def _serve(self) -> Need:
        rules = self.rules
        self._out += struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
        (client_flags,) = struct.unpack(">I", (yield 4))
        assert client_flags & 1, "the client does not speak fixed newstyle"
        while True:
            magic, option, length = struct.unpack(">QII", (yield 16))
            assert magic == 0x49484156454F5054, "an option without its magic number"
            data = (yield length) if length else b""
            if option == OPT_EXPORT_NAME:
                self._put(struct.pack(">QH", self.server.size, self._flags()) + bytes(0 if client_flags & 2 else 124))
                break
            if option == OPT_ABORT:
                self._answer(option, REP_ACK)
                return
            if self._option(option, data):
                break
        yield from self._transmission(rules)

    def _option(self, option: int, data: bytes) -> bool:
        """Answer one option; whether the transmission phase begins with it."""
        rules = self.rules
        if option == OPT_STRUCTURED and rules.structured:
            self.structured = True
            self._answer(option, REP_ACK)
        elif option == OPT_EXTENDED and rules.extended:
            self.structured = self.extended = True
            self._answer(option, REP_ACK)
        elif option == OPT_LIST_META and self.structured and rules.names_lives:
            instance = f"{self.server.life:08x}-0000-4000-8000-000000000000"
            if data.endswith(b"x-nbdshard:hints"):
                self._answer(option, REP_META, bytes(4) + f"x-nbdshard:hints;v=1;instance={instance}".encode())
            self._answer(option, REP_ACK)
        elif option == OPT_SET_META and self.structured:
            if b"base:allocation" in data and rules.extents is not Extents.NONE:
                self.has_context = True
                self._answer(option, REP_META, struct.pack(">I", CONTEXT_ID) + b"base:allocation")
            self._answer(option, REP_ACK)
        elif option == OPT_GO and rules.knows_go:
            self._answer(option, REP_INFO, struct.pack(">HQH", 0, self.server.size, self._flags()))
            sizes = (rules.block_minimum, rules.block_preferred, rules.block_maximum)
            self._answer(option, REP_INFO, struct.pack(">HIII", 3, *sizes))
            self._answer(option, REP_ACK)
            return True
        else:
            self._answer(option, REP_ERR_INVALID if option == OPT_SET_META else REP_ERR_UNSUP)
        return False

    def _answer(self, option: int, reply: int, data: bytes = b"") -> None:
        self._put(struct.pack(">QIII", 0x0003E889045565A9, option, reply, len(data)) + data)

    def _flags(self) -> int:
        rules = self.rules
        flags = HAS_FLAGS | (SEND_DF if self.structured else 0)
        flags |= READ_ONLY if rules.read_only else 0
        flags |= SEND_FLUSH if rules.can_flush else 0
        flags |= SEND_ZEROES if rules.can_zero else 0
        return flags | (MULTI_CONN if rules.multi_conn else 0)

    # -- the transmission phase ----------------------------------------------------------------------------------------

    def _transmission(self, rules: ServerRules) -> Need:
        layout = struct.Struct(">IHHQQQ" if self.extended else ">IHHQQI")
        magic_expected = 0x21E41C71 if self.extended else 0x25609513
        while True:
            magic, flags, command, cookie, offset, length = layout.unpack((yield layout.size))
            self._is_used = True
            assert magic == magic_expected, f"a request with magic number {magic:#x}"
            request = Request(command, flags, cookie, offset, length)
            if command == CMD_DISC:
                return
            assert cookie not in {other.cookie for other in self.running}, f"cookie {cookie} is in use"
            self._check(request, rules)
            self.running.append(request)
            self._check_load(rules)
            if command == CMD_WRITE:
                self._incomplete = request
                request.payload = yield length
                self._incomplete = None
                self._check_payload(request, request.payload)
            elif command == CMD_FLUSH:
                request.covers = [write for write in self._unflushed if write.acknowledged]
            if rules.silent_after is None or self._answered < rules.silent_after:
                self._answered += 1
                self.server.later(lambda request=request: self._carry_out(request))  # type: ignore[misc]

    def _check(self, request: Request, rules: ServerRules) -> None:
        """What the specification forbids a client, and what this job's options do."""
        command, start, end = request.command, request.offset, request.offset + request.length
        story = f"{rules.name}: command {command} of [{start}, {end}) with flags {request.flags:#x}"
        if command == CMD_FLUSH:
            assert rules.can_flush and not start and not end, story
            return
        assert start < end <= self.server.size, f"{story} beyond the export"
        minimum = rules.block_minimum if rules.knows_go else 1
        assert start % minimum == 0 and end % minimum == 0, f"{story} off the block size"
        if command in (CMD_READ, CMD_WRITE) and rules.knows_go:
            assert request.length <= rules.block_maximum, f"{story} beyond the maximum block size"
        if command == CMD_WRITE_ZEROES:
            assert rules.can_zero, story
            assert rules.no_hole is not None and bool(request.flags & FLAG_NO_HOLE) == rules.no_hole, story
        assert command in (CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS), story
        assert command != CMD_BLOCK_STATUS or self.has_context, story
        assert command in (CMD_READ, CMD_BLOCK_STATUS) or not rules.read_only, story
        assert bool(request.flags & FLAG_PAYLOAD_LEN) == (self.extended and command == CMD_WRITE), story
        if command in (CMD_WRITE, CMD_WRITE_ZEROES):
            self.server.check_writer(self)
            self.server.check_overlap(self, request, story)

    def _check_payload(self, request: Request, payload: bytes) -> None:
        """All of it, or what came before the connection ended, is the source's: no header is inside, and no rubbish."""
        expected, start = self.server.expected, request.offset
        if expected is None or payload == expected[start : start + len(payload)]:
            return
        wrong = next(at for at, byte in enumerate(payload) if byte != expected[start + at])
        raise AssertionError(
            f"the write of [{start}, {start + request.length}) brings something else than the source has, from {wrong}"
        )

    def _check_load(self, rules: ServerRules) -> None:
        assert len(self.running) <= rules.requests_max, f"{rules.name}: {len(self.running)} requests under way"
        payload = sum(r.length for r in self.running if r.command in (CMD_READ, CMD_WRITE))
        assert payload <= rules.payload_max, f"{rules.name}: {payload} bytes under way"

    def _carry_out(self, request: Request) -> None:
        if self._is_dead or (self.closed and self._chance.random() < 0.5):
            return
        server, write = self.server, None
        start, end = request.offset, request.offset + request.length
        error = server.errors.of(request.command, start, request.length)
        if not error and request.command in (CMD_WRITE, CMD_WRITE_ZEROES):
            write = Write(start, end)
            server.disk.data[start:end] = request.payload or bytes(request.length)
            self._unflushed.append(write)
            server.writes += 1
        elif request.command == CMD_FLUSH:
            server.flushes += 1
            if error and self.rules.flush_failures:
                server.lose_some()
            for covered in request.covers if not error else ():
                if not covered.is_lost:
                    server.disk.settle(covered.start, covered.end)
            self._unflushed[:] = [write for write in self._unflushed if write not in request.covers or error]
        if not self.closed:
            units = make_reply(self, request, error, self._chance)
            if request.command == CMD_READ:
                server.reads += 1
            self._replies.append(Reply(request, deque(units), write))
            self._send()
