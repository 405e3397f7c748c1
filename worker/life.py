"""The states of a worker's life, and what it needs of the world for it. Plain data."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, Protocol

from nbdshard.common.messages import FromCoordinator, FromWorker


class Channel(Protocol):
    """The worker's end of the control channel, as the service needs it (common.channel.WorkerChannel)."""

    @property
    def answered(self) -> bool: ...
    def receive(self) -> list[FromCoordinator]: ...
    def send(self, message: FromWorker) -> bool: ...
    def check(self, now: float) -> None: ...


class WorkerState(Enum):
    """Where a worker is in its life."""

    GREETING = auto()  # said Hello, not yet assigned
    STANDING_BY = auto()  # assigned without connections, or lost those it had
    OPENING = auto()  # connecting to both sides
    WORKING = auto()  # a connection to each side is up
    TURNING = auto()  # all is copied: what is on the wire ends, then what was written is read back
    LOSING = auto()  # a connection was lost: closing the others before anyone is told
    DRAINING = auto()  # finishing what is on the wire
    LEAVING = auto()  # disconnecting
    PARTING = auto()  # every connection is closed; the last messages are being sent
    GONE = auto()


LEAVING_STATES: Final = frozenset({WorkerState.DRAINING, WorkerState.LEAVING, WorkerState.PARTING, WorkerState.GONE})
