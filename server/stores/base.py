"""What a driver asks of a store. Blocking calls, which any thread may make at any time; an error is an OSError.

A driver sees to it that no two calls that write are under way for one key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range


class Store(Protocol):
    """Objects by key: names without a slash."""

    @property
    def losses(self) -> int:
        """How often something that was written may have been lost, as `Backend.losses`."""

    def read(self, key: str, where: Range) -> bytes | None:
        """What of `where` the object has, which may end before; None where there is no object."""

    def write(self, key: str, where: Range, data: memoryview) -> None:
        """Put `data` there, making the object where there is none, with zeroes in front. Durable after `sync`."""

    def zero(self, key: str, where: Range) -> bool:
        """Make it read as zeroes; whether the object, which is there, has anything but zeroes left."""

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none. Durable after `sync`."""

    def sync(self, keys: Collection[str]) -> None:
        """Make durable what was done to these keys before."""

    def extents(self, key: str, where: Range) -> Extents | None:
        """What is known of an object's data and holes from the start of `where` on; None where there is no object."""

    def keys(self) -> Iterator[str]:
        """Those of all objects, in no order."""

    def close(self) -> None:
        """Nothing is asked any more."""
