"""The exports of one server: what is offered, and the backend behind each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.hints import Hints
from nbdshard.server.backends.base import Backend
from nbdshard.server.offers import NamedOffers, Offer


class Exports(NamedOffers):
    """`backends` by the names of their exports; the first is the default one. All of them give the same `hints`."""

    def __init__(self, backends: Mapping[str, Backend], hints: Hints) -> None:
        super().__init__(_offer(name, backend, hints) for name, backend in backends.items())
        self._backends = dict(backends)

    def backend(self, name: str) -> Backend:
        """What is behind the export `name`, as it was offered."""
        return self._backends[name]

    def backends(self) -> Iterable[Backend]:
        return self._backends.values()


def _offer(name: str, backend: Backend, hints: Hints) -> Offer:
    preferred = min(max(backend.block_size, 512), 1 << 20)
    return Offer(name, backend.size, backend.flags, BlockSizes(preferred=preferred), hints=hints)
