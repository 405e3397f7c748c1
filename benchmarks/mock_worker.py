"""A worker that copies nothing: it speaks the control protocol and answers every lease at once. Pure.

So a job with such workers costs what the coordinator costs, and nothing else.
"""

from __future__ import annotations

from nbdshard.common.limits import LEASES_PER_WORKER
from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    Assign,
    Counters,
    EndpointDescription,
    Flush,
    Flushed,
    FromCoordinator,
    FromWorker,
    Goodbye,
    Hello,
    Lease,
    Opened,
    Stop,
    Wanted,
    Written,
)


def mock_disk(size: int) -> EndpointDescription:
    """A server that takes any number of connections, and flushes."""
    return EndpointDescription("mock", size, can_multi_conn=True, can_flush=True, can_zero=True)


class MockWorker:
    """One worker. Send what `hello` and `answers` return; it is over when `gone`."""

    def __init__(self, name: str, machine: str, disk: EndpointDescription) -> None:
        """`disk`: what it claims to have found at either end."""
        self._name = name
        self._machine = machine
        self._disk = disk
        self._written: list[int] = []
        self.gone = False

    def hello(self) -> Hello:
        """The first message. The process id is made up: nobody looks for it."""
        return Hello(PROTOCOL_VERSION, self._name, self._machine, "mock", 1, "epoll")

    def answers(self, message: FromCoordinator) -> list[FromWorker]:
        """What a worker says to `message` that has copied a range in no time."""
        match message:
            case Assign(job=job, epoch=epoch, source_connections=sources, destination_connections=destinations):
                if not sources or not destinations:
                    return []  # it stands by
                return [
                    Opened(job, epoch, self._disk, [self._disk], sources, destinations),
                    Wanted(job, epoch, LEASES_PER_WORKER),
                ]
            case Lease(job=job, epoch=epoch, lease=lease, range=where):
                self._written.append(lease)
                # One wish for each lease that ended, as the copier sends it: an old wish is replaced by a newer one.
                return [Written(job, epoch, lease, Counters(copied=where.length)), Wanted(job, epoch, 1)]
            case Flush(job=job, epoch=epoch, flush=flush):
                leases, self._written = self._written, []
                return [Flushed(job, epoch, flush, leases, durable=True)]
            case Stop(job=job, epoch=epoch):
                self.gone = True
                return [Goodbye(job, epoch, "stopped by the coordinator")]
            case _:
                return []
