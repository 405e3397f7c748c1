"""worker/service.py when its process is stopped and goes on: a real ring, and the test's own clock and channel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    Assign,
    EndpointAddress,
    FromCoordinator,
    FromWorker,
    Goodbye,
    Hello,
    JobOptions,
    Lease,
    Opened,
    OpenFailed,
    Stop,
    Wanted,
    Written,
)
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Operation, Ring, open_ring
from nbdshard.worker.pipes import Pipe, Plumbing
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.service import Worker, WorkerState
from support.doubles import CMD_READ, CMD_WRITE, Double, Request, Talk, double
from support.images import MIB
from support.waiting import wait_for

SIZE = 65_536
OPTIONS = JobOptions(request_size=65_536, requests=4, queue_size=1 << 20, sparse_unit=0)


class GatedSource(Double):
    """Answers a READ when the test lets it."""

    gate: threading.Event

    def read(self, talk: Talk, request: Request) -> None:
        assert self.gate.wait(20)
        super().read(talk, request)


class Channel:
    """The coordinator's words as the test writes them, and all the worker says."""

    def __init__(self) -> None:
        self.to_worker: list[FromCoordinator] = []
        self.said: list[FromWorker] = []
        self.answered = True

    def receive(self) -> list[FromCoordinator]:
        messages, self.to_worker = self.to_worker, []
        return messages

    def send(self, message: FromWorker) -> bool:
        self.said.append(message)
        return True

    def check(self, now: float) -> None: ...

    def heard(self, kind: type[FromWorker]) -> list[FromWorker]:
        return [message for message in self.said if isinstance(message, kind)]


class Stoppable:
    """A worker on a ring whose next wait with completions can be made to seem to take `stop_for` seconds."""

    def __init__(self, ring: Ring, plumbing: Plumbing | None = None) -> None:
        self.now = 1000.0
        self.stop_for = 0.0
        self.channel = Channel()
        self.ring = ring
        self.wait = ring.wait
        ring.wait = self.wait_and_stop  # type: ignore[method-assign]
        hello = Hello(PROTOCOL_VERSION, "a", "machine", "host", 1, ring.name)
        self.worker = Worker(ring, self.channel, hello, lambda: self.now, plumbing=plumbing)

    def wait_and_stop(self, timeout: float) -> list[Operation]:
        done = self.wait(min(timeout, 0.02))
        if done and self.stop_for:
            self.now += self.stop_for
            self.stop_for = 0.0
        return done

    def until(self, what: str, kind: type[FromWorker]) -> list[FromWorker]:
        def turned() -> list[FromWorker]:
            self.worker.turn()
            return self.channel.heard(kind)

        return wait_for(what, turned)

    def end(self) -> None:
        self.channel.to_worker.append(Stop("job", 1, "the test is over", now=True))
        self.until("a goodbye", Goodbye)
        assert self.worker.state is WorkerState.GONE


@contextmanager
def stopped_while_reading(lease_seconds: float, seconds: float) -> Iterator[tuple[Stoppable, Double]]:
    """A worker whose one READ was answered while its process was stopped for `seconds`."""
    gate = threading.Event()
    source, target = GatedSource(bytearray(b"\x5a" * SIZE)), Double(bytearray(SIZE))
    source.gate = gate
    ring, _ = open_ring("epoll")
    with double(source) as one, double(target) as two:
        stage = Stoppable(ring)
        ends = EndpointAddress(kind="nbd", address=one), [EndpointAddress(kind="nbd", address=two)]
        stage.channel.to_worker.append(Assign("job", 1, *ends, OPTIONS, 1, 1, 2.0, lease_seconds))
        stage.until("both sides", Opened)
        stage.until("a wish", Wanted)
        stage.channel.to_worker.append(Lease("job", 1, 1, Range(0, SIZE), lease_seconds))
        while source.count(CMD_READ) == 0:
            stage.worker.turn()
        stage.stop_for = seconds
        gate.set()
        yield stage, target
        stage.end()
    ring.close()


def test_nothing_is_written_under_a_lease_that_ended_while_the_worker_was_stopped() -> None:
    with stopped_while_reading(lease_seconds=10.0, seconds=30.0) as (stage, target):
        (failure,) = stage.until("the worker to give up", OpenFailed)
        assert isinstance(failure, OpenFailed)
        assert "it was stopped for 30 s" in failure.error.text
        assert not stage.channel.heard(Written)
    assert target.count(CMD_WRITE) == 0


def test_a_worker_that_was_stopped_for_long_goes_on_under_a_lease_that_lasts() -> None:
    """Neither the coordinator nor a server was late meanwhile: nobody was there to hear them."""
    with stopped_while_reading(lease_seconds=86_400.0, seconds=3600.0) as (stage, target):
        stage.until("the lease to be written", Written)
        assert stage.worker.error is None
        assert stage.worker.state is WorkerState.WORKING
    assert target.content == b"\x5a" * SIZE


# -- a stop in the middle of a turn ------------------------------------------------------------------------------------

LONG = 4 * MIB


class Stopping(SystemPlumbing):
    """The process is stopped for 30 s within the first call of `name` that moves something."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.stop: Callable[[], None] | None = None
        self.moved_since = 0  # bytes to the destination

    def fill(self, pipe: Pipe, number: int, count: int) -> int:
        return self._over("fill", super().fill(pipe, number, count))

    def drain(self, pipe: Pipe, number: int, count: int, *, more: bool) -> int:
        moved = super().drain(pipe, number, count, more=more)
        if self.stop is None and number != self._null:  # what is thrown away goes there
            self.moved_since += max(0, moved)
        return self._over("drain", moved)

    def _over(self, name: str, moved: int) -> int:
        if name == self.name and moved > 0 and self.stop is not None:
            stop, self.stop = self.stop, None
            stop()
        return moved


@pytest.mark.parametrize("name", ["fill", "drain"])
def test_nothing_is_spliced_under_a_lease_that_ended_in_the_middle_of_a_turn(name: str) -> None:
    source, target = Double(bytearray(b"\x5a" * LONG)), Double(bytearray(LONG))
    options = JobOptions(request_size=MIB, requests=4, queue_size=16 * MIB, sparse_unit=0, data_path="splice")
    plumbing = Stopping(name)
    ring, _ = open_ring("epoll")
    with double(source) as one, double(target) as two:
        stage = Stoppable(ring, plumbing)
        ends = EndpointAddress(kind="nbd", address=one), [EndpointAddress(kind="nbd", address=two)]
        stage.channel.to_worker.append(Assign("job", 1, *ends, options, 1, 1, 2.0, 10.0))
        stage.until("both sides", Opened)
        stage.until("a wish", Wanted)

        def stop() -> None:
            stage.now += 30.0

        plumbing.stop = stop
        stage.channel.to_worker.append(Lease("job", 1, 1, Range(0, LONG), 10.0))
        (failure,) = stage.until("the worker to give up", OpenFailed)
        assert isinstance(failure, OpenFailed)
        assert "it was stopped for 30 s" in failure.error.text
        assert plumbing.moved_since == 0
        stage.end()
    ring.close()
