"""What the copier sees of the world: connections it queues requests on. The shells implement it; so do the simulations.

Methods only queue: they never block, never call back, and report later through the copier's events (`sent`,
`arriving`, `completed`, `lost`). A handle is an index into that connection's own vector, chosen by the copier, and
free again once `completed` was reported for it.
"""

from __future__ import annotations

from typing import Protocol

from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ranges import Range


class Connection(Protocol):
    """One NBD connection, local file, stream or `null:`, in the part of the source or of a destination."""

    description: EndpointDescription

    def read(self, handle: int, where: Range, buffer: memoryview) -> None:
        """Read `where` into `buffer` (exactly as long). A stream may complete short, at its end."""

    def write(self, handle: int, where: Range, buffer: memoryview) -> None:
        """Write `buffer` (exactly as long) at `where`; it must not change until `completed`."""

    def zero(self, handle: int, where: Range, *, allocated: bool) -> None:
        """Make `where` read as zeroes; `allocated`: leave no hole (NO_HOLE)."""

    def extents(self, handle: int, where: Range) -> None:
        """Ask base:allocation of `where`; completes with a list of (Range, flags) from the start of `where` on."""

    def flush(self, handle: int) -> None:
        """Make everything completed before on this connection durable."""
