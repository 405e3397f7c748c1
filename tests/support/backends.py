"""A backend without a server around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.device import Hole


def content_of(backend: Backend, where: Range) -> bytes:
    """What is there, holes as zeroes."""
    return b"".join(bytes(part.length) if isinstance(part, Hole) else bytes(part) for part in backend.read(where))


class Opened:
    """Backends of CONNs, which a test opens and need not close."""

    def __init__(self) -> None:
        self._open: list[Backend] = []

    def open(self, conn: str) -> Backend:
        """The driver is raw."""
        return self.keep(open_backend(Wanted("disk", "raw", conn)))

    def keep(self, backend: Backend) -> Backend:
        """To be closed with the others."""
        self._open.append(backend)
        return backend

    def close(self, backend: Backend) -> None:
        """Before the test ends."""
        self._open.remove(backend)
        backend.close()

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            while self._open:
                self._open.pop().close()
