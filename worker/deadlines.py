"""How long a connection may take. Pure."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds; the names of the design's table."""

    connect: float
    handshake: float
    request: float


class Outstanding(NamedTuple):
    """One request: when it must be answered, what it does, in how many seconds, and its length in bytes."""

    deadline: float
    doing: str
    seconds: float
    length: int
