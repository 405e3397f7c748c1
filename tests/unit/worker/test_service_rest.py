"""worker/service.py between two turns: what it waits for, and what it does not wait for. Real rings and sockets."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nbdshard.common.limits import RETRY_DELAY_SECONDS
from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    Assign,
    EndpointAddress,
    Goodbye,
    Hello,
    JobOptions,
    Lease,
    Stop,
    Wanted,
)
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Operation, Ring, open_ring
from nbdshard.worker import run
from nbdshard.worker.copier import Copier
from nbdshard.worker.life import WorkerState
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.service import Worker
from support.doubles import EIO, REPLY_OFFSET_DATA, Double, Request, Talk, double
from support.images import MIB
from support.scripted import ScriptedChannel
from support.waiting import WAIT_SECONDS, wait_for

LEASE_SECONDS = 86_400.0
BLOCK = 4096
NULL = "null:"


class Scene:
    """A worker, and each of its waits: the state it was in, and how long it was ready to wait."""

    def __init__(self, ring: Ring, channel: ScriptedChannel) -> None:
        self.now = 1000.0
        self.channel = channel
        self.waits: list[tuple[WorkerState, float]] = []
        self.waited: Callable[[], object] = lambda: None  # called after each wait
        self._wait = ring.wait
        ring.wait = self._note_wait  # type: ignore[method-assign]
        hello = Hello(PROTOCOL_VERSION, "a", "machine", "host", 1, ring.name)
        self.worker = Worker(ring, channel, hello, lambda: self.now, plumbing=SystemPlumbing())

    def _note_wait(self, timeout: float) -> list[Operation]:
        self.waits.append((self.worker.state, timeout))
        done = self._wait(min(timeout, 0.02))
        self.waited()
        return done

    def until(self, what: str, condition: Callable[[], object]) -> None:
        wait_for(what, lambda: (self.worker.turn(), condition())[1])

    def begin(self, source: str, target: str, options: JobOptions, length: int) -> None:
        """Up to the grant of a lease of `length` bytes."""
        self.channel.to_worker.append(assignment(source, target, options))
        self.until("a wish", lambda: self.channel.heard(Wanted))
        self.channel.to_worker.append(lease(length))

    def end(self) -> None:
        self.channel.to_worker.append(Stop("job", 1, "the test is over", now=True))
        self.until("a goodbye", lambda: self.channel.heard(Goodbye))


def assignment(source: str, target: str, options: JobOptions) -> Assign:
    one, two = (EndpointAddress(kind="null" if uri == NULL else "nbd", address=uri) for uri in (source, target))
    return Assign("job", 1, one, [two], options, 1, 1, 2.0, LEASE_SECONDS)


def lease(length: int) -> Lease:
    return Lease("job", 1, 1, Range(0, length), LEASE_SECONDS)


@pytest.fixture
def channel() -> Iterator[ScriptedChannel]:
    reader, writer = os.pipe()
    yield ScriptedChannel(reader)
    os.close(reader)
    os.close(writer)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring, _ = open_ring("epoll")
    yield ring
    ring.close()


# -- nothing left to do -----------------------------------------------------------------------------------------------


class Hesitant(Double):
    """Refuses the first READ, and answers no other one until the test lets it."""

    gate: threading.Event
    reads = 0

    def read(self, talk: Talk, request: Request) -> None:
        self.reads += 1
        if self.reads == 1:
            talk.done(request, EIO)
            return
        assert self.gate.wait(WAIT_SECONDS)
        super().read(talk, request)


class Mortal(Double):
    """Can be cut off."""

    last: socket.socket

    def receive_request(self, talk: Talk) -> Request:
        self.last = talk.socket
        return super().receive_request(talk)


def test_a_read_that_is_not_tried_again_keeps_no_worker_awake_that_waits_for_its_connections_to_end(
    ring: Ring, channel: ScriptedChannel
) -> None:
    source, target = Hesitant(bytearray(b"\x5a" * 4 * MIB)), Mortal(bytearray(4 * MIB))
    source.gate = threading.Event()
    options = JobOptions(request_size=MIB, requests=4, queue_size=16 * MIB, sparse_unit=0)
    with double(source) as one, double(target) as two:
        scene = Scene(ring, channel)
        scene.begin(one, two, options, 4 * MIB)
        scene.until("the first read to fail and the next to be asked for", lambda: source.reads == 2)
        target.last.shutdown(socket.SHUT_RDWR)
        scene.until("the loss", lambda: scene.worker.state is WorkerState.LOSING)
        scene.now += RETRY_DELAY_SECONDS  # the read's second try is due, and nobody will make it
        scene.waits.clear()
        for _ in range(3):
            scene.worker.turn()
        assert scene.waits[0][0] is WorkerState.LOSING
        assert all(timeout > 0.0 for state, timeout in scene.waits if state is WorkerState.LOSING)
        source.gate.set()
        scene.end()


# -- something left to do ---------------------------------------------------------------------------------------------


@contextmanager
def many_small_writes(ring: Ring, channel: ScriptedChannel) -> Iterator[Scene]:
    """A worker about to read one request's worth of blocks in turn zero and not, which becomes sixteen writes."""
    source = Double(bytearray((b"\x5a" * BLOCK + bytes(BLOCK)) * 16))
    length = len(source.content)
    options = JobOptions(request_size=length, requests=4, queue_size=MIB, sparse_unit=BLOCK)
    with double(source) as one:
        scene = Scene(ring, channel)
        scene.begin(one, NULL, options, length)
        yield scene
        scene.end()


def test_a_worker_that_drains_does_not_wait_while_its_copier_can_give_up_more(
    ring: Ring, channel: ScriptedChannel
) -> None:
    with many_small_writes(ring, channel) as scene:
        scene.waited = scene.worker.hear  # so that each turn is over when its first wait is
        copier = scene.worker._work
        assert isinstance(copier, Copier)
        scene.until("writes that wait for others", lambda: any(target.waiting for target in copier.targets))
        scene.worker.leave("asked to")
        scene.until("the end", lambda: scene.worker.state is WorkerState.GONE)
        assert [timeout for state, timeout in scene.waits if state is WorkerState.DRAINING] == [0.0]


# -- somebody else ----------------------------------------------------------------------------------------------------


class Fountain(Double):
    """Has more to read than anybody will."""

    def inform(self, talk: Talk, option: int) -> None:
        content, self.content = self.content, FarEnd()
        super().inform(talk, option)
        self.content = content

    def answer(self, talk: Talk, request: Request) -> None:
        if request.length > len(self.content):
            self.send_extents(talk, request, [(request.length, 0)])
            return
        payload = struct.pack(">Q", request.offset) + bytes(self.content[: request.length])
        talk.chunk(request, REPLY_OFFSET_DATA, payload)


class FarEnd(bytearray):
    """As far as anybody can tell."""

    def __len__(self) -> int:
        return 1 << 40


SIGNAL_AFTER = 50  # waits
STREAM = JobOptions(request_size=MIB, requests=16, queue_size=16 * MIB, sparse_unit=0)


def test_what_is_heard_while_data_moves_is_not_left_until_it_has_moved(ring: Ring, channel: ScriptedChannel) -> None:
    with double(Fountain(bytearray(b"\x5a" * MIB))) as source:
        scene = Scene(ring, channel)
        scene.begin(source, NULL, STREAM, 1 << 30)
        for _ in range(20):
            waits = len(scene.waits)
            scene.waited = lambda: len(scene.waits) % 7 == 0 and scene.worker.hear()
            scene.worker.turn()
            assert len(scene.waits) - waits <= 7
        scene.waited = lambda: None
        scene.end()


def test_a_signal_is_not_left_until_the_data_has_moved(ring: Ring, channel: ScriptedChannel) -> None:
    wait, waits, turns = ring.wait, 0, [0, 0]  # the turn that each wait belongs to, counting both from 1

    def wait_and_be_signalled(timeout: float) -> list[Operation]:
        nonlocal waits
        if not channel.heard(Wanted):
            return wait(min(timeout, 0.02))
        waits += 1
        if waits == 1:
            channel.to_worker.append(lease(1 << 30))
            return wait(0.0)
        done = wait(timeout)
        turns.append(channel.reads)
        if waits == SIGNAL_AFTER:
            channel.to_worker.append(Stop("job", 1, "the test is over", now=True))
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    ring.wait = wait_and_be_signalled  # type: ignore[method-assign]
    with double(Fountain(bytearray(b"\x5a" * MIB))) as source:
        channel.to_worker.append(assignment(source, NULL, STREAM))
        run._work(ring, channel)  # type: ignore[arg-type]  # it has all that is needed of a channel
    assert turns[SIGNAL_AFTER] < turns[SIGNAL_AFTER + 1], "the next wait belongs to another turn"
