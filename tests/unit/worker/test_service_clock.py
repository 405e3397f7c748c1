"""worker/service.py when its process is stopped and goes on: a real ring, and the test's own clock and channel."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    Alive,
    AliveToo,
    Assign,
    Counters,
    DataPath,
    EndpointAddress,
    EndpointDescription,
    Failed,
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
from nbdshard.worker.life import WorkerState
from nbdshard.worker.pipes import Pipe, Plumbing
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.service import Worker
from support.doubles import CMD_READ, CMD_WRITE, Double, Request, Talk, double
from support.hesitant import Hesitates
from support.images import MIB
from support.scripted import ScriptedChannel
from support.waiting import WAIT_SECONDS, wait_for

SIZE = 65_536
OPTIONS = JobOptions(request_size=65_536, requests=4, queue_size=1 << 20, sparse_unit=0)


class Stoppable:
    """A worker on a ring whose next wait with completions can be made to seem to take `stop_for` seconds."""

    def __init__(self, ring: Ring, plumbing: Plumbing | None = None) -> None:
        self.now = 1000.0
        self.stop_for = 0.0
        self.channel = ScriptedChannel()
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

    def let_pass(self, seconds: float) -> None:
        """Time passes, and the worker is there to see it."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.5)
            self.worker.turn()

    @property
    def gave_up(self) -> bool:
        """It said that a lease, or all its connections, are lost."""
        return bool(self.channel.heard(Failed) or self.channel.heard(OpenFailed))

    def end(self) -> None:
        self.channel.to_worker.append(Stop("job", 1, "the test is over", now=True))
        self.until("a goodbye", Goodbye)
        assert self.worker.state is WorkerState.GONE


@contextmanager
def stopped_while_reading(lease_seconds: float, seconds: float) -> Iterator[tuple[Stoppable, Double]]:
    """A worker whose one READ was answered while its process was stopped for `seconds`."""
    source, target = Hesitates(bytearray(b"\x5a" * SIZE), CMD_READ), Double(bytearray(SIZE))
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
        source.released.set()
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
PAYLOAD_MIN = 4096  # bytes moved at once; headers are shorter


class Stopping(SystemPlumbing):
    """The process of `stage` is stopped for so many seconds within the first call of `name` that moves payload."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__()
        self.name = name
        self.seconds = seconds
        self.stage: Stoppable | None = None
        self.moved_since = 0  # bytes sent, but for those that are thrown away

    def fill(self, pipe: Pipe, number: int, count: int) -> int:
        return self._over("fill", super().fill(pipe, number, count))

    def receive(self, number: int, buffers: Sequence[memoryview]) -> int:
        return self._over("receive", super().receive(number, buffers))

    def drain(self, pipe: Pipe, number: int, count: int, *, more: bool) -> int:
        moved = super().drain(pipe, number, count, more=more)
        if number != self._null:
            self._moved(moved)
        return self._over("drain", moved)

    def send(self, number: int, pieces: Sequence[bytes | memoryview], *, more: bool) -> int:
        moved = super().send(number, pieces, more=more)
        self._moved(moved)
        return self._over("send", moved)

    def _moved(self, count: int) -> None:
        if self.stage is None:
            self.moved_since += max(0, count)

    def _over(self, name: str, moved: int) -> int:
        if name == self.name and moved > PAYLOAD_MIN and self.stage is not None:
            stage, self.stage, self.moved_since = self.stage, None, 0
            stage.now += self.seconds
        return moved


def filled() -> Double:
    return Double(bytearray(b"\x5a" * LONG))


@contextmanager
def copying(
    ring: Ring,
    plumbing: Plumbing | None,
    source: Double,
    target: Double,
    data_path: DataPath = "auto",
    lease_seconds: float = 10.0,
) -> Iterator[Stoppable]:
    """A worker that is about to read a lease of LONG bytes, in four requests."""
    options = JobOptions(request_size=MIB, requests=4, queue_size=16 * MIB, sparse_unit=0, data_path=data_path)
    with double(source) as one, double(target) as two:
        stage = Stoppable(ring, plumbing)
        ends = EndpointAddress(kind="nbd", address=one), [EndpointAddress(kind="nbd", address=two)]
        stage.channel.to_worker.append(Assign("job", 1, *ends, options, 1, 1, 2.0, lease_seconds))
        stage.until("both sides", Opened)
        stage.until("a wish", Wanted)
        stage.channel.to_worker.append(Lease("job", 1, 1, Range(0, LONG), lease_seconds))
        yield stage
        stage.end()


@pytest.fixture
def epoll() -> Iterator[Ring]:
    ring, _ = open_ring("epoll")
    yield ring
    ring.close()


@pytest.mark.parametrize("name", ["fill", "drain"])
def test_nothing_is_spliced_under_a_lease_that_ended_in_the_middle_of_a_turn(epoll: Ring, name: str) -> None:
    plumbing = Stopping(name, 30.0)
    with copying(epoll, plumbing, filled(), Double(bytearray(LONG)), "splice") as stage:
        plumbing.stage = stage
        (failure,) = stage.until("the worker to give up", OpenFailed)
        assert isinstance(failure, OpenFailed)
        assert "it was stopped for 30 s" in failure.error.text
        assert plumbing.moved_since == 0


@pytest.mark.parametrize(
    ("name", "data_path"), [("fill", "splice"), ("drain", "splice"), ("receive", "buffer"), ("send", "buffer")]
)
def test_a_stop_shorter_than_a_lease_may_be_its_end_all_the_same(epoll: Ring, name: str, data_path: DataPath) -> None:
    """Nothing was heard of the coordinator for some time before."""
    plumbing = Stopping(name, 6.0)
    source = Hesitates(bytearray(b"\x5a" * LONG), CMD_READ)
    with copying(epoll, plumbing, source, Double(bytearray(LONG)), data_path) as stage:
        stage.let_pass(6.0)
        plumbing.stage = stage
        source.released.set()
        wait_for("the stop", lambda: (stage.worker.turn(), plumbing.stage is None)[1])
        wait_for("the end", lambda: (stage.worker.turn(), stage.gave_up)[1])
        assert plumbing.moved_since == 0


class TakesNothing(Double):
    """Takes in no request until `released` is set."""

    def __init__(self, content: bytearray) -> None:
        super().__init__(content)
        self.released = threading.Event()

    def receive_request(self, talk: Talk) -> Request:
        assert self.released.wait(WAIT_SECONDS), "nobody had it take requests"
        return super().receive_request(talk)


@pytest.mark.parametrize("plumbing", [None, SystemPlumbing()], ids=["by the ring", "directly"])
def test_what_is_queued_is_not_sent_any_more_once_its_lease_has_ended(epoll: Ring, plumbing: Plumbing | None) -> None:
    """Nobody was stopped: the server took nothing more, and the coordinator was not heard."""
    target = TakesNothing(bytearray(LONG))
    source = filled()
    with copying(epoll, plumbing, source, target) as stage:
        wait_for("all reads", lambda: (stage.worker.turn(), source.count(CMD_READ) == 4)[1])
        stage.let_pass(8.5)
        assert stage.worker.state is WorkerState.WORKING
        stage.let_pass(0.5)
        (failure,) = stage.until("the worker to give up", OpenFailed)
        assert isinstance(failure, OpenFailed)
        assert "a lease ended before all that was written under it was acknowledged" in failure.error.text
        target.released.set()
    assert target.count(CMD_WRITE) < 4, "the socket had no room for all of them"


# -- when a lease ends -------------------------------------------------------------------------------------------------


@contextmanager
def reading(ring: Ring) -> Iterator[tuple[Stoppable, Hesitates, Double]]:
    """A worker that waits for its source under a lease of 10 s, which it ends a tenth earlier."""
    source, target = Hesitates(bytearray(b"\x5a" * LONG), CMD_READ), Double(bytearray(LONG))
    with copying(ring, SystemPlumbing(), source, target) as stage:
        wait_for("a read", lambda: (stage.worker.turn(), source.count(CMD_READ))[1])
        yield stage, source, target


def test_a_renewal_counts_from_what_it_answers_however_late_it_comes(epoll: Ring) -> None:
    with reading(epoll) as (stage, source, target):
        stage.let_pass(4.0)
        said = [message.at for message in stage.channel.heard(Alive) if isinstance(message, Alive)]
        assert said[-1] >= stage.now - 2.5
        stage.let_pass(4.5)
        stage.channel.to_worker.append(AliveToo("job", 1, said[-1]))
        stage.let_pass(said[-1] + 8.5 - stage.now)
        assert not stage.gave_up
        stage.let_pass(0.5)
        source.released.set()
        stage.until("the lease to fail", Failed)
    assert target.count(CMD_WRITE) == 0


def test_an_answer_that_was_overtaken_takes_nothing_back_and_one_to_nothing_gives_nothing(epoll: Ring) -> None:
    with reading(epoll) as (stage, source, target):
        stage.let_pass(4.0)
        said = [message.at for message in stage.channel.heard(Alive) if isinstance(message, Alive)]
        stage.channel.to_worker += [AliveToo("job", 1, at) for at in (said[-1], said[0], 0.0)]
        stage.let_pass(said[-1] + 8.5 - stage.now)
        assert not stage.gave_up
        source.released.set()
        stage.until("the lease to be written", Written)
    assert target.content == b"\x5a" * LONG


def test_a_lease_that_is_heard_of_after_its_end_is_not_begun(epoll: Ring) -> None:
    with reading(epoll) as (stage, source, target):
        source.released.set()
        stage.until("the first lease to be written", Written)
        writes = target.count(CMD_WRITE)
        stage.let_pass(10.0)
        stage.channel.to_worker.append(Lease("job", 1, 2, Range(0, LONG), 10.0))
        (failure,) = stage.until("the lease to fail", Failed)
        assert isinstance(failure, Failed)
        assert (failure.lease, failure.error.text) == (2, "the lease expired")
        assert target.count(CMD_WRITE) == writes


def test_a_lease_may_tell_itself_what_was_heard(epoll: Ring) -> None:
    with reading(epoll) as (stage, source, target):
        source.released.set()
        stage.until("the first lease to be written", Written)
        stage.let_pass(10.0)
        stage.channel.to_worker.append(Lease("job", 1, 2, Range(0, LONG), 10.0, answers=stage.now - 1.0))
        done = Written("job", 1, 2, Counters(copied=LONG, spliced=LONG))
        wait_for("the second", lambda: (stage.worker.turn(), done in stage.channel.said)[1])
    assert target.content == b"\x5a" * LONG


def test_a_worker_that_leaves_is_given_no_more_time(epoll: Ring) -> None:
    target = TakesNothing(bytearray(LONG))
    source = filled()
    with copying(epoll, SystemPlumbing(), source, target) as stage:
        wait_for("all reads", lambda: (stage.worker.turn(), source.count(CMD_READ) == 4)[1])
        stage.let_pass(8.0)
        stage.worker.leave("asked to")
        stage.channel.to_worker.append(AliveToo("job", 1, stage.now))
        stage.let_pass(1.0)
        stage.until("a goodbye", Goodbye)
        target.released.set()
    assert target.count(CMD_WRITE) < 4


def test_a_lease_that_ends_before_anything_is_written_costs_no_connection(epoll: Ring) -> None:
    source, target = Hesitates(bytearray(b"\x5a" * LONG), CMD_READ), Double(bytearray(LONG))
    with copying(epoll, SystemPlumbing(), source, target) as stage:
        stage.let_pass(11.0)
        source.released.set()
        (failure,) = stage.until("the lease to fail", Failed)
        assert isinstance(failure, Failed)
        assert failure.error.text == "the lease expired"
        assert stage.worker.state is WorkerState.WORKING
    assert target.count(CMD_WRITE) == 0


@pytest.mark.parametrize(("lease_seconds", "is_direct"), [(10.0, True), (86_400.0, False)])
def test_writes_under_leases_that_end_are_not_left_to_the_ring(
    epoll: Ring, lease_seconds: float, is_direct: bool
) -> None:
    plumbing = Stopping("", 0.0)
    target = Double(bytearray(LONG))
    with copying(epoll, plumbing, filled(), target, "buffer", lease_seconds) as stage:
        stage.until("the lease to be written", Written)
    assert target.content == b"\x5a" * LONG
    assert (plumbing.moved_since > LONG) is is_direct


def test_connections_that_were_given_before_the_loss_was_heard_of_are_not_opened() -> None:
    with stopped_while_reading(10.0, 60.0) as (stage, _):
        stage.until("the loss", OpenFailed)
        (opened,) = stage.channel.heard(Opened)
        assert isinstance(opened, Opened)
        first = stage.worker._assign
        assert first is not None
        ends = first.source, first.destinations

        def given(count: int, source: EndpointDescription | None, targets: list[EndpointDescription] | None) -> Assign:
            return Assign("job", 1, *ends, OPTIONS, count, count, 2.0, 10.0, source, targets)

        stage.channel.to_worker.append(given(4, None, None))
        stage.let_pass(1.0)
        assert stage.worker.state is WorkerState.STANDING_BY
        stage.channel.said.clear()
        stage.channel.to_worker.append(given(1, opened.source, opened.destinations))
        stage.until("both sides again", Opened)
        stage.end()
