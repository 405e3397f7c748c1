"""What a server offers to its clients: exports by name. Plain data, and where it is looked up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

from nbdshard.common.nbd.constants import BASE_ALLOCATION, TransmissionFlag
from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.hints import NO_HINTS, Hints


class Offer(msgspec.Struct, frozen=True):
    """One export as anybody may have it. `size` in bytes; `flags` include HAS_FLAGS."""

    name: str
    size: int
    flags: TransmissionFlag
    block_sizes: BlockSizes = msgspec.field(default_factory=BlockSizes)
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    description: str = ""
    hints: Hints = NO_HINTS


class Offers(Protocol):
    """All exports of a server. Asked again for every option, so exports may come and go."""

    def find(self, name: str) -> Offer | None:
        """The export called `name`, as it is now; "" is the default one."""

    def listed(self) -> Iterable[Offer]:
        """Those that are told to who asks which there are."""


class NamedOffers:
    """Exports that stay as they are. The first one is the default: who asks for "" gets it."""

    def __init__(self, offers: Iterable[Offer]) -> None:
        self._by_name = {offer.name: offer for offer in offers}

    def find(self, name: str) -> Offer | None:
        offer = self._by_name.get(name)
        if offer is None and not name:
            return next(iter(self._by_name.values()), None)
        return offer

    def listed(self) -> Iterable[Offer]:
        return self._by_name.values()
