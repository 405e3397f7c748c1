"""Where a cache in memory keeps its blocks."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Protocol

from nbdshard.server.layers.cache_blocks import Block


class Slots(Protocol):
    """Room for blocks, by number. Any thread may call `get`, `put` and `zero`; of one block, side by side."""

    def get(self, slot: int, start: int, end: int) -> memoryview | bytes:
        """A copy of these bytes of a slot. Raises OSError."""

    def put(self, slot: int, start: int, data: memoryview) -> None:
        """Copy `data` there. Raises OSError."""

    def zero(self, slot: int, start: int, end: int) -> None:
        """Make these bytes zeroes. Raises OSError."""

    def note(self, changed: Mapping[int, Block | None]) -> None:
        """What a journal has to have of these slots is another (`Block.kept`). Raises OSError."""

    def sign(self, slot: int, start: int, end: int, data: memoryview) -> None:
        """`data` was put there, and a journal will have to have it. Raises OSError."""

    def settle(self) -> None:
        """A flush is about to be answered: a journal must not bring back what was there before. Raises OSError."""

    def keep(self) -> None:
        """Make durable what it holds, where it lasts. Raises OSError."""

    @property
    def lasting(self) -> str:
        """Where what it holds is found again by the next run; "": nowhere."""

    def close(self) -> None:
        """Nothing is asked any more."""


class MemorySlots:
    """`slots` blocks of `block_bytes`. They take memory as they are used."""

    lasting = ""

    def __init__(self, slots: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._memory = mmap.mmap(-1, slots * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._zeroes = memoryview(bytes(block_bytes))

    def get(self, slot: int, start: int, end: int) -> memoryview | bytes:
        first = slot * self._block_bytes
        return self._view[first + start : first + end].tobytes()

    def put(self, slot: int, start: int, data: memoryview) -> None:
        first = slot * self._block_bytes + start
        self._view[first : first + len(data)] = data

    def zero(self, slot: int, start: int, end: int) -> None:
        self.put(slot, start, self._zeroes[: end - start])

    def note(self, changed: Mapping[int, Block | None]) -> None:
        return None

    def sign(self, slot: int, start: int, end: int, data: memoryview) -> None:
        return None

    def settle(self) -> None:
        return None

    def keep(self) -> None:
        return None

    def close(self) -> None:
        self._view.release()
        self._memory.close()
