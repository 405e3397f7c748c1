"""What a client reports about its requests."""

from __future__ import annotations

import msgspec

from nbdshard.common.errors import RequestError
from nbdshard.common.ranges import Range


class Sent(msgspec.Struct, frozen=True):
    """The last byte of the request has left."""

    handle: int


class Arriving(msgspec.Struct, frozen=True):
    """The first content of a READ's reply is here or on its way; an error may still follow."""

    handle: int


class Done(msgspec.Struct, frozen=True):
    """The request is answered and its handle free. `extents` (range, flags) only for BLOCK_STATUS."""

    handle: int
    error: RequestError | None = None
    extents: list[tuple[Range, int]] | None = None


Event = Sent | Arriving | Done
