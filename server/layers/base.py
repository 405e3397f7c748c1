"""A layer that changes nothing: others inherit from it, and say only what they do otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Hole


class Passing:
    """Passes everything on to `below`, which it owns."""

    def __init__(self, below: Backend) -> None:
        self.below = below

    @property
    def size(self) -> int:
        return self.below.size

    @property
    def flags(self) -> TransmissionFlag:
        return self.below.flags

    @property
    def block_size(self) -> int:
        return self.below.block_size

    @property
    def losses(self) -> int:
        return self.below.losses

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        return self.below.read(where)

    def write(self, where: Range, data: memoryview) -> None:
        self.below.write(where, data)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        self.below.zero(where, may_punch=may_punch, fast=fast)

    def trim(self, where: Range) -> None:
        self.below.trim(where)

    def cache(self, where: Range) -> None:
        self.below.cache(where)

    def flush(self) -> None:
        self.below.flush()

    def extents(self, where: Range) -> Extents:
        return self.below.extents(where)

    def close(self) -> None:
        self.below.close()
