"""Both ends of a real control channel, opened and closed, and what each hears."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from nbdshard.common.channel import CoordinatorChannel, WorkerChannel
from nbdshard.common.control_url import ControlUrl
from nbdshard.common.errors import UserError
from nbdshard.common.keys import CoordinatorKeys, WorkerKeys
from nbdshard.common.messages import PROTOCOL_VERSION, FromCoordinator, FromWorker, Hello
from support.waiting import wait_for

LOOPBACK = ControlUrl("tcp", "127.0.0.1", 0)


def listen(
    stack: contextlib.ExitStack, url: ControlUrl = LOOPBACK, keys: CoordinatorKeys | None = None
) -> CoordinatorChannel:
    channel = CoordinatorChannel(url, keys)
    stack.callback(channel.close, 0)
    return channel


def connect(
    stack: contextlib.ExitStack, to: CoordinatorChannel | str, keys: WorkerKeys | None = None, name: str = ""
) -> WorkerChannel:
    url = to if isinstance(to, str) else str(to.url)
    channel = WorkerChannel(url, time.monotonic(), name=name, keys=keys)
    stack.callback(channel.close, 0)
    return channel


def hello(worker: WorkerChannel) -> Hello:
    return Hello(version=PROTOCOL_VERSION, worker=worker.name, machine="m", host="h", pid=7, ring="epoll")


def heard(coordinator: CoordinatorChannel, count: int = 1) -> list[tuple[str, FromWorker]]:
    """The next `count` messages that the coordinator receives."""
    got: list[tuple[str, FromWorker]] = []

    def enough() -> bool:
        got.extend(coordinator.receive())
        return len(got) >= count

    wait_for(f"{count} messages at the coordinator", enough)
    return got


def told(worker: WorkerChannel, coordinator: CoordinatorChannel | None = None) -> list[FromCoordinator]:
    """The next messages that the worker receives; the coordinator's loop turns meanwhile if it is given."""

    def some() -> list[FromCoordinator]:
        if coordinator is not None:
            coordinator.receive()
        return worker.receive()

    return wait_for("a message at the worker", some)


def error_of(worker: WorkerChannel, turn: Callable[[], object] = lambda: None, late: float = 0.0) -> str:
    """What `check` says is wrong, in the end; `late` seconds are put on the clock."""

    def reason() -> str:
        turn()
        try:
            worker.check(time.monotonic() + late)
        except UserError as error:
            return str(error)
        return ""

    return wait_for("the worker to give up", reason)
