"""How long a connection may take. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Timeouts:
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
