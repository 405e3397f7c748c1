"""A job in this process and what happens around it, step by step; and what the kernel holds of its connections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nbdshard.coordinator.job import Status
from nbdshard.coordinator.progress import NoDisplay
from support import processes

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
    """Looks at the job in every turn of the coordinator's loop, and does the next of its `steps` when that says so."""

    def __init__(self, steps: Iterator[None]) -> None:
        self._steps = steps
        self.status: Status | None = None

    def due(self) -> float:
        return 0.0

    def show(self, status: Status, now: float) -> None:
        self.status = status
        next(self._steps, None)
