"""From the address of an endpoint to a connection of the right kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nbdshard.common.errors import NbdshardError
from nbdshard.common.messages import EndpointAddress, EndpointDescription, JobOptions, Side
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Ring
from nbdshard.worker.deadlines import Timeouts
from nbdshard.worker.link import NbdLink
from nbdshard.worker.pipes import Plumbing
from nbdshard.worker.ports import Listener, Payload
from nbdshard.worker.sockets import SYSTEM_SOCKETS, Connector


class OpenConnection(Protocol):
    """A `ports.Connection` with its life: what the service needs of every kind of connection."""

    description: EndpointDescription
    listener: Listener | None

    def start(self, now: float, handles: int) -> None: ...
    @property
    def splices(self) -> bool: ...
    def read(self, handle: int, where: Range, into: Payload) -> None: ...
    def write(self, handle: int, where: Range, payload: Payload) -> None: ...
    def zero(self, handle: int, where: Range, *, allocated: bool) -> None: ...
    def extents(self, handle: int, where: Range) -> None: ...
    def flush(self, handle: int) -> None: ...
    @property
    def has_work(self) -> bool: ...
    def pump(self, now: float) -> None: ...
    def tick(self, now: float) -> None: ...
    def disconnect(self) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...


Ready = Callable[[OpenConnection], None]
Lost = Callable[[OpenConnection, NbdshardError], None]


def make_connection(
    ring: Ring,
    address: EndpointAddress,
    side: Side,
    options: JobOptions,
    on_ready: Ready,
    on_lost: Lost,
    connector: Connector = SYSTEM_SOCKETS,
    plumbing: Plumbing | None = None,
    look: Callable[[], object] = lambda: None,
) -> OpenConnection:
    """A connection to `address`, not yet started. Raises UserError for an address no worker can open."""
    match address.kind:
        case "nbd":
            seconds = (options.connect_seconds, options.handshake_seconds, options.request_seconds)
            timeouts = Timeouts(*seconds, is_sure=not options.request_hinted)
            return NbdLink(
                ring, parse_uri(address.address), side, timeouts, on_ready, on_lost, connector, plumbing, look
            )
        case "file":
            # Imported when needed: most copies are between servers, and start-up time counts.
            from nbdshard.worker.files import FileConnection

            return FileConnection(ring, address, side, on_ready, on_lost)
        case "stream":
            from nbdshard.worker.streams import StreamConnection

            return StreamConnection(ring, address, side, on_ready, on_lost)
        case "null":
            from nbdshard.worker.null import NullConnection

            return NullConnection(ring, address, side, on_ready, on_lost)
