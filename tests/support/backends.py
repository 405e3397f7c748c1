"""A backend without a server around it."""

from __future__ import annotations

from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Hole


def content_of(backend: Backend, where: Range) -> bytes:
    """What is there, holes as zeroes."""
    return b"".join(bytes(part.length) if isinstance(part, Hole) else bytes(part) for part in backend.read(where))
