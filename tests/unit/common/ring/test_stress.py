"""Everything at once, at random, against a model of what each stream and file must hold.

Connections whose both ends are in the ring send to each other, in pieces of any size; operations are cancelled and
descriptors closed at any moment, and their numbers used again at once; files are written and read beside them, with
buffers and through pipes.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from nbdshard.common.ring import Descriptor, Operation
from support.loops import Loop, call, close, poll, read, receive, send, splice_in, splice_out, sync, write
from support.pipe_states import Pipe

CONNECTIONS = 12
PIPES = 8
STEPS = 15_000
PERIOD = 1 << 16
BLOCKS, BLOCK = 32, 4096
GONE = {-errno.EPIPE, -errno.ECONNRESET}


@dataclass(eq=False)
class End:
    """One end of a connection: what it has sent and received so far, and what is under way."""

    descriptor: Descriptor
    pattern: bytes  # what it sends, over and over
    peer: End | None = None
    sent: int = 0
    received: int = 0
    buffer: bytearray = field(default_factory=lambda: bytearray(1 << 17))
    under_way: set[Operation] = field(default_factory=set)

    def outgoing(self, length: int) -> bytes:
        start = self.sent % PERIOD
        return (self.pattern * (2 + length // PERIOD))[start : start + length]


class World:
    def __init__(self, loop: Loop, rng: random.Random, disk: Descriptor) -> None:
        self.loop = loop
        self.rng = rng
        self.disk = disk
        self.ends: list[End] = []
        self.then: dict[Operation, Callable[[Operation], None]] = {}
        self.blocks = [bytes(BLOCK)] * BLOCKS
        self.busy_blocks: set[int] = set()
        self.idle_pipes = [Pipe() for _ in range(PIPES)]
        self.closing_time = False
        self.moved = 0
        self.ended: list[End] = []  # those that received their peer's end
        for _ in range(CONNECTIONS):
            self.connect()

    def connect(self) -> None:
        pair = [End(self.loop.attach(side), self.rng.randbytes(PERIOD)) for side in socket.socketpair()]
        pair[0].peer, pair[1].peer = pair[1], pair[0]
        self.ends += pair

    def submit(self, operation: Operation, then: Callable[[Operation], None]) -> None:
        self.then[operation] = then
        self.loop.submit(operation)

    def turn(self, seconds: float) -> None:
        for operation in self.loop.turn(seconds):
            self.then.pop(operation)(operation)

    def pieces(self, view: memoryview) -> list[memoryview]:
        """`view` cut at random places."""
        cuts = sorted({0, len(view), *(self.rng.randrange(len(view) + 1) for _ in range(self.rng.randrange(4)))})
        return [view[start:stop] for start, stop in pairwise(cuts)]

    # -- steps

    def send(self, end: End) -> None:
        if end.descriptor.sending:
            return
        payload = memoryview(end.outgoing(self.rng.choice([1, 100, 5000, 100_000])))

        def sent(operation: Operation) -> None:
            end.under_way.discard(operation)
            closing = end.descriptor.closing or (end.peer is not None and end.peer.descriptor.closing)
            assert (
                operation.result > 0 or operation.result == -errno.ECANCELED or (operation.result in GONE and closing)
            )
            end.sent += max(0, operation.result)

        operation = send(end.descriptor, *self.pieces(payload))
        end.under_way.add(operation)
        self.submit(operation, sent)

    def receive(self, end: End) -> None:
        if end.descriptor.receiving:
            return
        length = self.rng.choice([1, 100, 5000, 100_000])
        view = memoryview(end.buffer)[:length]
        peer = end.peer
        assert peer is not None

        def received(operation: Operation) -> None:
            end.under_way.discard(operation)
            result = operation.result
            if result > 0:
                start = end.received % PERIOD
                expected = (peer.pattern * (2 + result // PERIOD))[start : start + result]
                assert view[:result] == expected, "bytes of another stream, or of another place in it"
                end.received += result
                self.moved += result
            elif result == 0:
                assert end.descriptor.closing or peer.descriptor.closing
                if not end.descriptor.closing:
                    self.ended.append(end)
            else:
                assert result == -errno.ECANCELED or (result in GONE and peer.descriptor.closing)
            if peer.descriptor.closed and not end.descriptor.closing:
                if result > 0 or result == -errno.ECANCELED:
                    self.bereave(end)
                else:
                    self.close(end)

        operation = receive(end.descriptor, *self.pieces(view))
        end.under_way.add(operation)
        self.submit(operation, received)

    def bereave(self, end: End) -> None:
        """The peer of `end` has gone: read what it left, up to its end, or do not care."""
        if end.descriptor.closing:
            return
        if self.closing_time or self.rng.random() < 0.3:
            self.close(end)
        else:
            self.receive(end)

    def poll(self, end: End) -> None:
        mask = self.rng.choice([select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT])

        def came_true(operation: Operation) -> None:
            end.under_way.discard(operation)
            ended = select.POLLHUP | select.POLLERR
            assert operation.result == -errno.ECANCELED or operation.result & (mask | ended)

        operation = poll(end.descriptor, mask)
        end.under_way.add(operation)
        self.submit(operation, came_true)

    def cancel(self, end: End) -> None:
        for operation in sorted(end.under_way, key=lambda one: one.slot)[:2]:
            self.loop.ring.cancel(operation)

    def close(self, end: End) -> None:
        """End a connection, one end after the other, and begin another on the numbers that become free."""

        def closed(operation: Operation) -> None:
            assert operation.result == 0
            assert not end.under_way
            assert end.descriptor.closed
            self.ends.remove(end)
            assert end.peer is not None
            if not end.peer.descriptor.closing:
                self.bereave(end.peer)
            elif end.peer.descriptor.closed and not self.closing_time:
                self.connect()

        self.submit(close(end.descriptor), closed)

    def write(self) -> None:
        index = self.rng.randrange(BLOCKS)
        if index in self.busy_blocks:
            return
        self.busy_blocks.add(index)
        content = self.rng.randbytes(BLOCK)

        def written(operation: Operation) -> None:
            assert operation.result == BLOCK
            self.blocks[index] = content
            self.busy_blocks.discard(index)

        self.submit(write(self.disk, index * BLOCK, *self.pieces(memoryview(content))), written)

    def read(self) -> None:
        index = self.rng.randrange(BLOCKS)
        if index in self.busy_blocks:
            return
        self.busy_blocks.add(index)
        buffer = bytearray(BLOCK)

        def been_read(operation: Operation) -> None:
            assert operation.result == BLOCK
            assert buffer == self.blocks[index]
            self.busy_blocks.discard(index)

        self.submit(read(self.disk, index * BLOCK, *self.pieces(memoryview(buffer))), been_read)

    def splice_from_disk(self) -> None:
        index = self.rng.randrange(BLOCKS)
        if index in self.busy_blocks or not self.idle_pipes:
            return
        self.busy_blocks.add(index)
        pipe = self.idle_pipes.pop()

        def spliced(operation: Operation) -> None:
            assert operation.result == BLOCK
            assert pipe.drain() == self.blocks[index]
            self.busy_blocks.discard(index)
            self.idle_pipes.append(pipe)

        self.submit(splice_in(pipe.writing, self.disk, index * BLOCK, BLOCK), spliced)

    def splice_to_disk(self) -> None:
        index = self.rng.randrange(BLOCKS)
        if index in self.busy_blocks or not self.idle_pipes:
            return
        self.busy_blocks.add(index)
        pipe = self.idle_pipes.pop()
        content = self.rng.randbytes(BLOCK)
        os.write(pipe.writing, content)

        def spliced(operation: Operation) -> None:
            assert operation.result == BLOCK
            assert pipe.content == 0
            self.blocks[index] = content
            self.busy_blocks.discard(index)
            self.idle_pipes.append(pipe)

        self.submit(splice_out(pipe.reading, self.disk, index * BLOCK, BLOCK), spliced)

    def call(self) -> None:
        token = object()

        def returned(operation: Operation) -> None:
            assert operation.value is token

        self.submit(call(lambda: token), returned)

    def sync(self) -> None:
        def synced(operation: Operation) -> None:
            assert operation.result == 0

        self.submit(sync(self.disk), synced)

    def step(self) -> None:
        open_ends = [end for end in self.ends if not end.descriptor.closing]
        end = self.rng.choice(open_ends) if open_ends else None
        dice = self.rng.random()
        if end is not None and dice < 0.35:
            self.send(end)
        elif end is not None and dice < 0.70:
            self.receive(end)
        elif end is not None and dice < 0.76:
            self.poll(end)
        elif end is not None and dice < 0.80:
            self.cancel(end)
        elif end is not None and dice < 0.81:
            self.close(end)
        elif dice < 0.88:
            files = [self.write, self.read, self.splice_from_disk, self.splice_to_disk, self.sync]
            self.rng.choice([*files, self.call])()
        else:
            self.turn(self.rng.choice([0, 0, 0.001]))

    def finish(self) -> None:
        """Close everything and wait for the rest."""
        self.closing_time = True
        for end in list(self.ends):
            if not end.descriptor.closing:
                self.close(end)
        for _ in range(1000):
            if not self.then:
                break
            self.turn(0.05)


@pytest.mark.parametrize("offset", range(6))
def test_any_mixture_completes_each_operation_once_and_moves_each_byte_to_its_place(
    loop: Loop, tmp_path: Path, seed: int, offset: int
) -> None:
    (tmp_path / "disk").write_bytes(bytes(BLOCKS * BLOCK))
    world = World(loop, random.Random(seed * 1000 + offset), loop.file(tmp_path / "disk", os.O_RDWR))
    for _ in range(STEPS):
        world.step()
    assert world.moved > 1 << 20
    world.finish()
    assert not loop.pending
    assert len(world.idle_pipes) == PIPES
    for pipe in world.idle_pipes:
        pipe.close()
    assert world.ended
    for end in world.ended:
        assert end.peer is not None
        assert end.received == end.peer.sent, "the end came before all that was sent"
    assert (tmp_path / "disk").read_bytes() == b"".join(world.blocks)
