"""A layer that does the same around every call: others inherit from it, and say it once, in `carry_out`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeVar

from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing

Result = TypeVar("Result")


class Operation(Enum):
    """A call of a backend, by the name that parameters, logs and statistics have for it."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"
    CACHE = "cache"
    FLUSH = "flush"
    EXTENTS = "extents"


def names_of(parameter: str) -> frozenset[str]:
    """The names of a parameter that there is for all operations, and for each: "delay", "delay-read", ..."""
    return frozenset({parameter, *(f"{parameter}-{operation.value}" for operation in Operation)})


class Around(Passing):
    """Passes everything on to `below`, through `carry_out`."""

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        """Make `call`, once or several times, or raise an OSError. `where` is None for a flush."""
        return call()

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        return self.carry_out(Operation.READ, where, lambda: self.below.read(where))

    def write(self, where: Range, data: memoryview) -> None:
        self.carry_out(Operation.WRITE, where, lambda: self.below.write(where, data))

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        self.carry_out(Operation.ZERO, where, lambda: self.below.zero(where, may_punch=may_punch, fast=fast))

    def trim(self, where: Range) -> None:
        self.carry_out(Operation.TRIM, where, lambda: self.below.trim(where))

    def cache(self, where: Range) -> None:
        self.carry_out(Operation.CACHE, where, lambda: self.below.cache(where))

    def flush(self) -> None:
        self.carry_out(Operation.FLUSH, None, self.below.flush)

    def extents(self, where: Range) -> Extents:
        return self.carry_out(Operation.EXTENTS, where, lambda: self.below.extents(where))
