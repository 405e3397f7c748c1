"""worker/service.py when all is copied, and what was written is to be read back over the same connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from msgspec.structs import replace

from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    Assign,
    Compared,
    Counters,
    EndpointAddress,
    Failed,
    FromCoordinator,
    FromWorker,
    Goodbye,
    Hello,
    JobOptions,
    Lease,
    Noted,
    Opened,
    OpenFailed,
    Revoke,
    Stop,
    Wanted,
    Written,
)
from nbdshard.common.ranges import Range
from nbdshard.common.ring import open_ring
from nbdshard.worker.life import WorkerState
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.service import Worker
from support.doubles import CMD_BLOCK_STATUS, CMD_READ, CMD_WRITE, Double, Request, Talk, double
from support.hesitant import Hesitates
from support.images import random_bytes
from support.scripted import ScriptedChannel
from support.sides import RINGS
from support.waiting import wait_for

SIZE = 65_536
CONTENT = b"\5" * SIZE
OPTIONS = JobOptions(request_size=65_536, requests=4, queue_size=1 << 20, sparse_unit=0)


class Breaks(Hesitates):
    """Hangs up at the first READ that it may answer."""

    broken = False

    def read(self, talk: Talk, request: Request) -> None:
        if not self.broken:
            self.broken = True
            talk.hang_up()
        super().read(talk, request)


class Stage:
    """A worker between two doubles; its clock moves with every turn."""

    def __init__(self, ring: str, source: str, target: str, options: JobOptions) -> None:
        self.now = 1000.0
        self.channel = ScriptedChannel()
        self.ring = open_ring(ring)[0]  # type: ignore[arg-type]
        hello = Hello(PROTOCOL_VERSION, "a", "machine", "host", 1, ring)
        self.plumbing = SystemPlumbing()
        self.worker = Worker(self.ring, self.channel, hello, lambda: self.now, plumbing=self.plumbing)
        ends = [EndpointAddress(kind="nbd", address=address) for address in (source, target)]
        self.assign = Assign("job", 1, ends[0], [ends[1]], options, 1, 1, 2.0, 86_400.0)
        self.read_back = replace(self.assign, options=replace(options, mode="read-back"))

    def tell(self, *messages: FromCoordinator) -> None:
        self.channel.to_worker += messages

    def turn(self) -> None:
        self.now += 0.1
        self.worker.turn()

    def hear(self, kind: type[FromWorker], count: int = 1) -> list[FromWorker]:
        """All of `kind` that was said, once there are `count`."""

        def said() -> list[FromWorker]:
            self.turn()
            found = self.channel.heard(kind)
            return found if len(found) >= count else []

        return wait_for(f"{count} {kind.__name__}", said)

    def end(self) -> None:
        self.tell(Stop("job", 1, "the test is over", now=True))
        self.hear(Goodbye)
        self.ring.close()


def lease(number: int) -> Lease:
    return Lease("job", 1, number, Range(0, SIZE), 86_400.0)


@contextmanager
def staged(ring: str, source: Double, target: Double, options: JobOptions = OPTIONS) -> Iterator[Stage]:
    with double(source) as one, double(target) as two:
        stage = Stage(ring, one, two, options)
        stage.tell(stage.assign)
        stage.hear(Opened)
        stage.hear(Wanted)
        yield stage
        stage.end()


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("path", ["auto", "buffer"])
def test_what_was_written_is_read_back_over_the_same_connections(ring: str, path: str) -> None:
    data = random_bytes(SIZE)
    source, target = Double(bytearray(data)), Double(bytearray(SIZE))
    with staged(ring, source, target, replace(OPTIONS, data_path=path)) as stage:
        stage.tell(lease(1))
        stage.hear(Written)
        stage.tell(Noted("job", 1, 1), stage.read_back, lease(2))  # a lease may come with the change
        (compared,) = stage.hear(Compared)
        assert compared == Compared("job", 1, 2, Counters(compared=SIZE))
        target.content[1000] ^= 1
        stage.tell(Noted("job", 1, 2), lease(3))
        found = stage.hear(Compared, 2)[-1]
        assert found == Compared("job", 1, 3, Counters(compared=SIZE), 512, (Range(512, 1024),))
        assert len(stage.hear(Opened)) == 1
    assert {request.connection for request in target.requests} == {
        request.connection for request in target.requests[:1]
    }
    assert target.count(CMD_READ) == 2
    assert source.count(CMD_READ) == 3
    assert target.count(CMD_WRITE) == 1


@contextmanager
def turning(ring: str, source: Hesitates, *, gives_up: bool = False) -> Iterator[tuple[Stage, Double]]:
    """A worker that is to compare, and was given lease 2 for it, while its source has not answered what it was asked
    for lease 1. `gives_up`: of that lease nothing else is under way."""
    (asked,) = source.waits_with
    target = Double(bytearray(CONTENT))
    with staged(ring, source, target) as stage:
        stage.tell(lease(1))
        wait_for("the source to be asked", lambda: stage.turn() or source.count(asked))
        if gives_up:
            stage.tell(Revoke("job", 1, 1))
            stage.hear(Failed)
        stage.tell(stage.read_back, lease(2))
        stage.turn()
        assert stage.worker.state is WorkerState.TURNING
        yield stage, target


def assert_compared(stage: Stage, number: int) -> None:
    """That lease alone was compared, and all of it."""
    assert stage.hear(Compared) == [Compared("job", 1, number, Counters(compared=SIZE))]


@pytest.mark.parametrize("ring", RINGS)
def test_the_change_waits_for_what_is_on_the_wire_and_leases_wait_with_it(ring: str) -> None:
    source = Hesitates(bytearray(CONTENT), CMD_READ)
    with turning(ring, source) as (stage, target):
        assert target.count(CMD_READ) == 0
        source.released.set()
        assert_compared(stage, 2)
        assert stage.worker.state is WorkerState.WORKING
    assert target.count(CMD_WRITE) == 0  # what was being copied is given up


@pytest.mark.parametrize("ring", RINGS)
def test_an_answer_about_block_status_for_a_lease_that_was_given_up_is_waited_for(ring: str) -> None:
    source = Hesitates(bytearray(CONTENT), CMD_BLOCK_STATUS)
    with turning(ring, source, gives_up=True) as (stage, _):
        source.released.set()
        assert_compared(stage, 2)


@pytest.mark.parametrize("ring", RINGS)
def test_connections_that_are_lost_meanwhile_are_opened_anew_and_compared_over(ring: str) -> None:
    source = Breaks(bytearray(CONTENT), CMD_READ)
    with turning(ring, source) as (stage, target):
        source.released.set()
        stage.hear(OpenFailed)
        (opened,) = stage.hear(Opened)
        assert isinstance(opened, Opened)
        stage.tell(replace(stage.read_back, expected_source=opened.source, expected_destinations=opened.destinations))
        stage.hear(Opened, 2)
        stage.tell(lease(3))
        assert_compared(stage, 3)
    assert target.count(CMD_WRITE) == 0
