"""The worker process: ring, channel and signals put together around `service.Worker`."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from nbdshard.common import logs
from nbdshard.common.channel import WorkerChannel
from nbdshard.common.machine import machine_id
from nbdshard.common.messages import PROTOCOL_VERSION, Hello
from nbdshard.common.ring import Kind, Operation, Ring
from nbdshard.common.ring.choose import open_ring
from nbdshard.worker.lane import Lane
from nbdshard.worker.life import WorkerState
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.service import Worker
from nbdshard.worker.shape import CopyShape, ZeroPolicy

if TYPE_CHECKING:
    from nbdshard.common.keys import WorkerKeys


def run_worker(connect: str, *, ring: str = "auto", name: str = "", keys: WorkerKeys | None = None) -> int:
    """Work for the coordinator at `connect` until it says stop. Returns 0.

    Raises UserError when the ring that was asked for is refused, or the coordinator does not answer, or turns this
    worker away; ProtocolError when it sends what no coordinator would.
    """
    the_ring, why = open_ring(ring)
    logs.info(why)
    try:
        channel = WorkerChannel(connect, _seconds(), name=name, keys=keys)
        try:
            _work(the_ring, channel)
        finally:
            channel.close()
    finally:
        the_ring.close()
    return 0


def _work(ring: Ring, channel: WorkerChannel) -> None:
    def wake() -> None:
        worker.hear()  # or its loop would only look at what the ring has
        ring.wake()

    def make_lane(shape: CopyShape) -> Lane:
        return Lane(
            shape.request_size,
            shape.sparse_unit,
            shape.requests,
            shape.queue_size,
            _seconds,
            wake,
            SystemPlumbing(),
            varies=shape.request_size_varies,
            zeroes=shape.zero_policy is ZeroPolicy.REQUEST,
        )

    hello = _hello(ring, channel)
    worker = Worker(ring, channel, hello, _seconds, plumbing=SystemPlumbing(), make_lane=make_lane)
    _watch(ring, channel.descriptor, worker.hear)
    stops = 0

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stops
        stops += 1
        worker.hear()  # or it would go on for as long as data moves
        ring.wake()

    handled = 0
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while worker.state is not WorkerState.GONE:
            if stops > handled:
                handled += 1
                worker.leave("stopped by a signal")
            worker.turn()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if worker.error is not None:
        raise worker.error


# The monotonic clock, with the time in which the machine was suspended: leases end all the same.
_seconds = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


def _watch(ring: Ring, number: int, readable: Callable[[], None]) -> None:
    """Make the ring's wait return, and call `readable`, whenever the channel's descriptor is readable."""
    descriptor = ring.attach(os.dup(number), is_socket=False)  # ZeroMQ closes its own

    def again(operation: Operation) -> None:
        readable()
        if operation.result >= 0:
            ring.submit(operation)

    ring.submit(Operation(Kind.POLL, descriptor, mask=select.POLLIN, owner=again))


def _hello(ring: Ring, channel: WorkerChannel) -> Hello:
    return Hello(PROTOCOL_VERSION, channel.name, machine_id(), socket.gethostname(), os.getpid(), ring.name)
