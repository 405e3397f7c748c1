"""What a client reports about its requests."""

from __future__ import annotations

from dataclasses import dataclass

from nbdshard.common.errors import RequestError
from nbdshard.common.ranges import Range


@dataclass(frozen=True, slots=True)
class Sent:
    """The last byte of the request has left."""

    handle: int


@dataclass(frozen=True, slots=True)
class Arriving:
    """The first content of a READ's reply is here or on its way; an error may still follow."""

    handle: int


@dataclass(frozen=True, slots=True)
class Done:
    """The request is answered and its handle free. `extents` (range, flags) only for BLOCK_STATUS."""

    handle: int
    error: RequestError | None = None
    extents: list[tuple[Range, int]] | None = None


Event = Sent | Arriving | Done
