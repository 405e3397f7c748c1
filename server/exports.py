"""The exports of one server: what is offered, and the backend behind each."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

import msgspec

from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.hints import NO_HINTS, Hints
from nbdshard.server.backends.base import Backend
from nbdshard.server.budget import Budget
from nbdshard.server.crew import Crew
from nbdshard.server.offers import Offer


class Exported(msgspec.Struct, frozen=True):
    """A backend as an export, and what its clients are advised; the `instance` is added here."""

    backend: Backend
    hints: Hints = NO_HINTS
    description: str = ""


class Exports:
    """Exports by name; the first one is also the default. `life`: a uuid of this start of the server."""

    def __init__(self, exports: Mapping[str, Exported], life: uuid.UUID) -> None:
        self._exports = dict(exports)
        self._life = life
        self._crews = {name: Crew() for name in self._exports}
        self.budget = Budget()  # of the connections to all of them

    def find(self, name: str) -> Offer | None:
        """The export called `name`, as it is now: its `instance` is another one after a loss below."""
        if name not in self._exports and not name:
            name = next(iter(self._exports), "")
        exported = self._exports.get(name)
        return None if exported is None else self._offer(name, exported)

    def listed(self) -> Iterable[Offer]:
        """All of them."""
        return [self._offer(name, exported) for name, exported in self._exports.items()]

    def backend(self, name: str) -> Backend:
        """What is behind the export `name`, as it was offered."""
        return self._exports[name].backend

    def crew(self, name: str) -> Crew:
        """Who carries out what is asked of the export `name`."""
        return self._crews[name]

    def backends(self) -> Mapping[str, Backend]:
        """Of all exports, by name."""
        return {name: exported.backend for name, exported in self._exports.items()}

    def _offer(self, name: str, exported: Exported) -> Offer:
        backend = exported.backend
        preferred = min(max(backend.block_size, 512), 1 << 20)
        losses = backend.losses
        instance = str(uuid.uuid5(self._life, str(losses)) if losses else self._life)
        return Offer(
            name,
            backend.size,
            backend.flags,
            BlockSizes(preferred=preferred),
            description=exported.description,
            hints=msgspec.structs.replace(exported.hints, instance=instance),
        )
