"""A cache in memory in front of a backend that a test holds up, and what goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.cache import Cache
from nbdshard.server.layers.cache_blocks import Geometry
from nbdshard.server.layers.cache_core import CacheCore
from nbdshard.server.layers.cache_slots import MemorySlots
from support.gated import Gated, content_of
from support.waiting import WAIT_SECONDS

BLOCK = 4096
SIZE = 64 * BLOCK
SLOTS = 16
DIRTY_MAX = 14  # of 16, two are left for readers

Value = TypeVar("Value")


@contextmanager
def cached(below: Gated, *, write_back: bool = True, failing_seconds: float = WAIT_SECONDS) -> Iterator[Cache]:
    """A cache of SLOTS blocks, which writes back four at a time."""
    geometry = Geometry(below.size, BLOCK, grain=512, unit=4 * BLOCK, fetch=4 * BLOCK)
    core = CacheCore(geometry, SLOTS)
    cache = Cache(
        below,
        core,
        MemorySlots(SLOTS, BLOCK),
        write_back=write_back,
        fetchers=4,
        writers=2,
        through=BLOCK,
        failing_seconds=failing_seconds,
    )
    try:
        yield cache
    finally:
        cache.close()
    core.validate()


@contextmanager
def elsewhere() -> Iterator[Callable[[Callable[[], Value]], Future[Value]]]:
    """Calls in threads of their own."""
    with ThreadPoolExecutor(16) as pool:
        yield lambda call: pool.submit(call)


def write(cache: Backend, start: int, data: bytes) -> None:
    cache.write(Range.of(start, len(data)), memoryview(data))


def read(cache: Backend, start: int, length: int) -> bytes:
    return content_of(cache.read(Range.of(start, length)))


def fill(cache: Cache) -> None:
    """As much as may be dirty."""
    for number in range(DIRTY_MAX):
        write(cache, number * BLOCK, bytes([number + 1]) * BLOCK)
