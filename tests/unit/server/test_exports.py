"""server/exports.py"""

from __future__ import annotations

import uuid

from nbdshard.common.nbd.hints import Hints
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.exports import Exported, Exports
from nbdshard.server.layers.base import Passing

LIFE = uuid.UUID("11111111-2222-4333-8444-555555555555")


class Losing(Passing):
    lost = 0

    @property
    def losses(self) -> int:
        return self.below.losses + self.lost


def instance_of(exports: Exports, name: str) -> str:
    offer = exports.find(name)
    assert offer is not None
    return offer.hints.instance


def test_the_first_export_is_the_default_one_and_others_are_not_there() -> None:
    exports = Exports({"a": Exported(MemoryBackend(1024)), "b": Exported(MemoryBackend(2048))}, LIFE)
    offer = exports.find("")
    assert offer is not None and (offer.name, offer.size) == ("a", 1024)
    assert exports.find("c") is None
    assert [offer.name for offer in exports.listed()] == ["a", "b"]


def test_hints_are_per_export_and_its_instance_is_the_servers_life() -> None:
    exports = Exports({"a": Exported(MemoryBackend(1024), Hints(loss=120.0)), "b": Exported(MemoryBackend(1))}, LIFE)
    found = exports.find("a")
    assert found is not None and found.hints == Hints(loss=120.0, instance=str(LIFE))
    assert instance_of(exports, "b") == str(LIFE)


def test_a_loss_below_makes_another_instance_of_that_export() -> None:
    losing = Losing(MemoryBackend(1024))
    exports = Exports({"a": Exported(losing), "b": Exported(MemoryBackend(1))}, LIFE)
    seen = [instance_of(exports, "a")]
    for _ in range(3):
        losing.lost += 1
        seen.append(instance_of(exports, "a"))
    assert len(set(seen)) == 4
    assert instance_of(exports, "a") == seen[-1]
    assert instance_of(exports, "b") == str(LIFE)
