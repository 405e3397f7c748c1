"""How long a connection may take. Pure."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from nbdshard.common.nbd.hints import Hints


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds. `request` gives way to the server's own hint, unless somebody `is_sure` of it."""

    connect: float
    handshake: float
    request: float
    is_sure: bool = True

    def hinted(self, hints: Hints) -> Timeouts:
        if self.is_sure or hints.request is None:
            return self
        return msgspec.structs.replace(self, request=hints.request)


class Outstanding(NamedTuple):
    """One request: when it must be answered, what it does, in how many seconds, and its length in bytes."""

    deadline: float
    doing: str
    seconds: float
    length: int
