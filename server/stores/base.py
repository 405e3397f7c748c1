"""What a driver asks of a store. Blocking calls, which any thread may make at any time; an error is an OSError.

A driver sees to it that no two calls that change something are under way for one key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range


class Store(Protocol):
    """Objects by key: names without a slash."""

    @property
    def losses(self) -> int:
        """How often something that was written may have been lost, as `Backend.losses`."""

    def read(self, key: str, where: Range) -> bytes | memoryview | None:
        """What of `where` the object has, which may end before; None where there is no object."""

    def write(self, key: str, where: Range, data: memoryview) -> None:
        """Put `data` there, making the object where there is none, with zeroes in front. Durable after `sync`."""

    def put(self, key: str, data: bytes, *, is_new: bool) -> None:
        """Make the object these bytes, whole or not at all, and durable. Raises FileExistsError where `is_new` and it
        is there."""

    def zero(self, key: str, where: Range, *, fast: bool = False) -> bool:
        """Make it read as zeroes; whether the object is there and has anything but zeroes left.

        `fast`: fail with ENOTSUP rather than be as slow as a write.
        """

    def cut(self, key: str, length: int) -> None:
        """Forget what the object has beyond `length` bytes. Durable after `sync`."""

    def delete(self, key: str) -> bool:
        """Remove the object; whether there was one. Durable after `sync`."""

    def sync(self) -> None:
        """Make durable whatever was done before. What is lost for good is told every time."""

    def extents(self, key: str, where: Range) -> Extents | None:
        """What is known of an object's data and holes from the start of `where` on; None where there is no object."""

    @property
    def can_list(self) -> bool:
        """Whether `keys` leaves out nothing that was there before."""

    def keys(self) -> Iterator[str]:
        """Those of all objects that are there all the while, in no order."""

    def stored(self) -> Iterator[tuple[str, int]]:
        """Keys, as `keys`, and how many bytes of room each object takes."""

    def claim(self, key: str, *, alone: bool) -> None:
        """Until `close` nobody else claims `key`, an object that is there and stands for others; or nobody `alone`.

        Raises UserError where somebody has it.
        """

    def close(self) -> None:
        """Nothing is asked any more."""
