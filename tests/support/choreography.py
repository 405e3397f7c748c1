"""A job in this process and what happens around it, step by step; and what the kernel holds of its connections."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from nbdshard.common.channel import CoordinatorChannel
from nbdshard.common.control_url import ControlUrl
from nbdshard.common.machine import machine_id
from nbdshard.common.messages import EndpointAddress, FromWorker, Hello, JobOptions
from nbdshard.common.signals import SignalWatch
from nbdshard.coordinator.job import Job, Outcome, Status
from nbdshard.coordinator.progress import NoDisplay
from nbdshard.coordinator.service import Shell, run_job
from support import processes
from support.command import Run, started
from support.waiting import WAIT_SECONDS

LEASE_SECONDS = 1.5
HEARTBEAT_SECONDS = 0.3
ESTABLISHED = "01"  # /proc/net/tcp: TCP_ESTABLISHED


def sockets(port: int) -> Iterator[tuple[str, bool, int, int]]:
    """Either end of each TCP connection to `port`: its name in proc(5), if it is the server's, its queues in bytes."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(fields[index].rpartition(":")[2], 16) for index in (1, 2))
        if fields[3] == ESTABLISHED and port in (local, remote):
            to_send, to_read = (int(number, 16) for number in fields[4].split(":"))
            yield f"socket:[{fields[9]}]", local == port, to_send, to_read


def on_the_way(port: int, *, to_server: bool) -> int:
    """Bytes in one direction of all connections to `port` that are in the kernel."""
    return sum(to_read if is_server is to_server else to_send for _, is_server, to_send, to_read in sockets(port))


def is_connected(pid: int, port: int) -> bool:
    own = set(processes.descriptors(pid).values())
    return any(name in own for name, *_ in sockets(port))


class Choreography(NoDisplay):
    """Looks at the job in every turn of the coordinator's loop, and does the next of its `steps` when that says so.

    The steps yield the words for what they wait for, so that one that is not reached is named: by `assert_over` when
    the job has ended, by a TimeoutError out of the job when it does not.
    """

    def __init__(self, steps: Iterator[str]) -> None:
        self._steps = steps
        self._awaited = "its first turn"  # "": all steps are done
        self._since = time.monotonic()
        self.status: Status | None = None

    def due(self) -> float:
        return 0.0

    def show(self, status: Status, now: float) -> None:
        self.status = status
        awaited, earlier = next(self._steps, ""), self._awaited
        if awaited != earlier:
            self._awaited, self._since = awaited, time.monotonic()
        elif awaited and time.monotonic() > self._since + WAIT_SECONDS:
            raise TimeoutError(f"waited {WAIT_SECONDS:g} s in vain for {awaited}")

    def assert_over(self) -> None:
        """Every step was done before the job ended."""
        assert not self._awaited, f"the job ended while the test waited for {self._awaited}"


class HearingChannel(CoordinatorChannel):
    """Knows who has said hello."""

    def __init__(self, url: ControlUrl) -> None:
        super().__init__(url)
        self.joined: set[str] = set()

    def receive(self) -> list[tuple[str, FromWorker]]:
        got = super().receive()
        self.joined |= {name for name, message in got if isinstance(message, Hello)}
        return got


class FarWorkers:
    """The place of a coordinator in this process, and workers that the test starts: they count as another machine's."""

    def __init__(self, stack: ExitStack, ring: str) -> None:
        self._stack = stack
        self._ring = ring
        self._channel = HearingChannel(ControlUrl("tcp", "127.0.0.1", 0))
        stack.callback(self._channel.close)
        self._signals = stack.enter_context(SignalWatch())

    def start_one(self) -> Run:
        return self._stack.enter_context(started("worker", "--connect", str(self._channel.url), "--ring", self._ring))

    @property
    def joined(self) -> int:
        """How many workers the coordinator has heard of."""
        return len(self._channel.joined)

    def run_job(
        self,
        source: str,
        destination: str,
        options: JobOptions,
        display: Choreography,
        *,
        connections: int,
        range_size: int,
    ) -> Outcome:
        """How the job ended, after all steps of `display`. Both ends are URIs."""
        job = Job(
            uuid="job",
            epoch=1,
            source=EndpointAddress("nbd", source),
            destinations=(EndpointAddress("nbd", destination),),
            options=options,
            connections=connections,
            workers=2,
            range_size=range_size,
            local_workers=False,
            machine=machine_id(),
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=HEARTBEAT_SECONDS,
        )
        outcome = run_job(job, Shell(self._channel, None, lambda _: None, (), display, self._signals))
        display.assert_over()
        return outcome
