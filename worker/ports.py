"""What the copier sees of the world: connections it queues requests on, and how it hears of their outcome.

The shells implement `Connection` (an NBD link, a local file, a stream, `null:`); so do the simulations. Its methods
only queue, or send at once what can be sent: they never block and never call back. Later the connection tells its
`Listener`, for every request exactly one `done`, and before it `sent`, when the last byte of the request has left. A
handle is an index into that connection's own vector, chosen by the copier, and free again from `done` on.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from nbdshard.common.errors import RequestError
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.nbd import extents
from nbdshard.common.ranges import Range
from nbdshard.worker.piped import PipedPayload

Payload: TypeAlias = memoryview | PipedPayload  # in memory, or spliced
Extents: TypeAlias = extents.Extents


class Listener(Protocol):
    """The copier's half of one connection."""

    def sent(self, handle: int) -> None:
        """The last byte of the request is out."""

    def arriving(self, handle: int) -> None:
        """The first payload of a read is here."""

    def done(self, handle: int, error: RequestError | None, count: int, extents: Extents | None) -> None:
        """The request is complete. `count`: bytes read, shorter than asked only at the end of a stream."""


class Connection(Protocol):
    """One NBD connection, local file, stream or `null:`, in the part of the source or of a destination."""

    description: EndpointDescription

    @property
    def splices(self) -> bool:
        """Whether payload may be spliced; else it has to be in memory."""

    def read(self, handle: int, where: Range, into: Payload) -> None:
        """Read `where` into `into` (exactly as long). A stream may complete short, at its end."""

    def write(self, handle: int, where: Range, payload: Payload) -> None:
        """Write `payload` (exactly as long) at `where`; it must not change until `done`.

        What was spliced is gone then, also after an error.
        """

    def zero(self, handle: int, where: Range, *, allocated: bool) -> None:
        """Make `where` read as zeroes; `allocated`: leave no hole (NO_HOLE)."""

    def extents(self, handle: int, where: Range) -> None:
        """Ask base:allocation of `where`; `done` carries at least one extent, from the start of `where` on."""

    def flush(self, handle: int) -> None:
        """Make everything `done` before on this connection durable."""
