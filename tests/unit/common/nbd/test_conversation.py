"""A client and a small server in one process, made of the same wire formats: both directions, thousands of requests.

The server keeps a disk in memory, answers in any order, cuts its replies at random, and fails what it likes. What it
did when it took a request from its queue is what the client must report in the end.
"""

from __future__ import annotations

from random import Random

import pytest

from nbdshard.common.nbd.client import Client, Done, Sent
from nbdshard.common.nbd.constants import Command, CommandFlag, ReplyType
from nbdshard.common.nbd.wire import (
    EXTENDED_REQUEST,
    REQUEST,
    Request,
    pack_block_status,
    pack_error,
    pack_hole,
    pack_simple_reply,
    unpack_request,
)
from nbdshard.common.ranges import Range
from support.nbd_feeding import an_export, chunk, scatter

SIZE = 1 << 16
HANDLES = 6
REQUESTS = 400


class Server:
    """Requests in by `feed`, replies out by `answer`."""

    def __init__(self, mode: str, random: Random) -> None:
        self.mode = mode
        self.random = random
        self.disk = bytearray(random.randbytes(SIZE))
        self.requests: list[tuple[Request, bytes]] = []
        self.outcomes: dict[int, tuple[bytes | None, bool]] = {}  # cookie -> (what was read, failed)
        self.disconnected = False
        self._input = b""

    def feed(self, data: bytes) -> None:
        self._input += data
        extended = self.mode == "extended"
        size = (EXTENDED_REQUEST if extended else REQUEST).size
        while len(self._input) >= size:
            assert not self.disconnected
            request = unpack_request(self._input, extended=extended)
            length = request.length if request.command == Command.WRITE else 0
            assert bool(request.flags & CommandFlag.PAYLOAD_LEN) == (extended and length > 0)
            if len(self._input) < size + length:
                return
            payload, self._input = self._input[size : size + length], self._input[size + length :]
            if request.command == Command.DISC:
                self.disconnected = True
            else:
                self.requests.append((request, payload))

    def answer(self) -> bytes:
        """The whole reply to one of the requests, chosen at random."""
        request, payload = self.requests.pop(self.random.randrange(len(self.requests)))
        failed = self.random.random() < 0.1
        where = slice(request.offset, request.offset + request.length)
        read: bytes | None = None
        if request.command == Command.READ:
            read = bytes(self.disk[where])
        elif request.command == Command.WRITE and not failed:
            self.disk[where] = payload
        elif request.command == Command.WRITE_ZEROES and not failed:
            self.disk[where] = bytes(request.length)
        self.outcomes[request.cookie] = (read, failed)
        if self.mode == "simple" or (request.command not in (Command.READ, Command.BLOCK_STATUS) and self._simple()):
            return pack_simple_reply(request.cookie, 5 if failed else 0) + (read or b"" if not failed else b"")
        return b"".join(self._chunks(request, read, failed))

    def _simple(self) -> bool:
        return self.mode == "structured" and self.random.random() < 0.5

    def _chunks(self, request: Request, read: bytes | None, failed: bool) -> list[bytes]:
        bodies: list[tuple[int, bytes]] = []
        at = 0
        while read is not None and at < len(read):
            end = min(len(read), at + self.random.choice((1, 512, 5000)) + len(read) // 50)
            start = request.offset + at
            if not any(read[at:end]):
                bodies.append((ReplyType.OFFSET_HOLE, pack_hole(start, end - at)))
            else:
                bodies.append((ReplyType.OFFSET_DATA, start.to_bytes(8, "big") + read[at:end]))
            at = end
        if request.command == Command.BLOCK_STATUS:
            wide = self.mode == "extended"
            payload = pack_block_status(7, [(request.length, 2)], wide=wide)
            bodies.append((ReplyType.BLOCK_STATUS_EXT if wide else ReplyType.BLOCK_STATUS, payload))
        if failed:
            bodies.append((ReplyType.ERROR, pack_error(5, b"no luck")))
        self.random.shuffle(bodies)
        bodies.append((ReplyType.NONE, b""))
        last = len(bodies) - 1
        wide = self.mode == "extended"
        return [
            chunk(int(number == last), kind, request.cookie, payload, extended=wide, offset=request.offset)
            for number, (kind, payload) in enumerate(bodies)
        ]


class Conversation:
    """Both ends, and the two streams between them, each with bytes under way."""

    def __init__(self, mode: str, random: Random) -> None:
        self.random = random
        self.client = Client(an_export(SIZE, mode=mode), "srv", HANDLES)
        self.server = Server(mode, random)
        self.up = b""  # handed out by the client, not yet reported as sent
        self.down = b""
        self.buffers: dict[int, bytearray] = {}
        self.free = list(range(HANDLES))
        self.sent: set[int] = set()
        self.finished = 0

    def queue(self) -> None:
        handle = self.free.pop()
        start = self.random.randrange(SIZE)
        where = Range(start, self.random.randrange(start, min(SIZE, start + 9000)) + 1)
        match self.random.randrange(6):
            case 0 | 1:
                self.buffers[handle] = bytearray(where.length)
                self.client.read(handle, where, memoryview(self.buffers[handle]))
            case 2:
                data = self.random.randbytes(where.length)
                self.client.write(handle, where, [data[:7], memoryview(data)[7:]])
            case 3:
                self.client.write_zeroes(handle, where)
            case 4 if self.client.export.structured:
                self.client.block_status(handle, where)
            case _:
                self.client.flush(handle)

    def send(self) -> None:
        """Some bytes leave; the report may be later than their arrival, so the server may be faster."""
        count = self.random.randrange(1, len(self.up) + 1)
        self.up = self.up[count:]
        self.see(self.client.sent(count))

    def receive(self) -> None:
        pieces = memoryview(self.down)[: self.random.choice((1, 17, 300, 100_000))]
        count = scatter(self.client.receive_target(), pieces)
        self.down = self.down[count:]
        self.see(self.client.received(count))

    def see(self, events: list[object]) -> None:
        for event in events:
            if isinstance(event, Sent):
                self.sent.add(event.handle)
            elif isinstance(event, Done):
                self.check(event)

    def check(self, done: Done) -> None:
        self.sent.remove(done.handle)  # never before its Sent
        read, failed = self.server.outcomes.pop(done.handle)
        assert (done.error is not None) == failed
        buffer = self.buffers.pop(done.handle, None)
        if read is not None and not failed:
            assert buffer == read
        self.free.append(done.handle)
        self.finished += 1

    def hand_out(self) -> None:
        data = b"".join(self.client.data_to_send())
        self.up += data
        self.server.feed(data)

    def step(self, *, more: bool) -> None:
        """One of the things that can happen happens."""
        choices = [self.hand_out]
        if more and self.free:
            choices += [self.queue] * 3
        if self.up:
            choices += [self.send] * 3
        if self.server.requests:
            choices += [self.reply] * 2
        if self.down:
            choices += [self.receive] * 4
        self.random.choice(choices)()

    def reply(self) -> None:
        self.down += self.server.answer()


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_every_request_ends_as_the_server_ended_it(mode: str, seed: int) -> None:
    talk = Conversation(mode, Random(seed))
    while talk.finished < REQUESTS:
        talk.step(more=True)
    while talk.client.pending:
        talk.step(more=False)
    talk.client.disconnect()
    talk.hand_out()
    assert talk.server.disconnected
    assert (talk.client.end_of_stream(), talk.client.pending_handles(), talk.server.outcomes) == ([], [], {})
