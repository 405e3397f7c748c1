"""worker/page_cache.py: what is left in the page cache after a copy, as the kernel tells it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.common import file_calls
from nbdshard.common.limits import (
    CACHE_HINTS_MAX,
    CACHE_LOOK_AHEAD_BYTES,
    CACHE_RUNS_MAX,
    CACHE_WINDOW_BYTES,
    MIB,
)
from nbdshard.common.ranges import Range
from nbdshard.worker import page_cache
from nbdshard.worker.page_cache import PageCache
from support.local_driver import RINGS, driver, file_address

SIZE = 40 * MIB
Pending = list[tuple[Callable[[], None], Callable[[object], None]]]


def cached_mib(path: Path) -> float:
    number = os.open(path, os.O_RDONLY)
    try:
        return file_calls.cached_bytes(number, Range(0, SIZE)) / MIB
    finally:
        os.close(number)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file on a real disk, with nothing of it in the cache."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        for n in range(SIZE // MIB):
            file.write(bytes([n]) * MIB)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_mib(path) > 1:
        pytest.skip("this file system keeps what it is asked to drop (tmpfs does)")
    return path


@pytest.mark.parametrize("ring", RINGS)
def test_a_source_that_was_not_cached_is_not_cached_afterwards(cold: Path, ring: str) -> None:
    with driver(ring, file_address(cold), "source") as source:
        source.open()
        for n in range(SIZE // MIB):
            assert source.read(n * MIB, MIB) == bytes([n]) * MIB
        source.leave()
    assert cached_mib(cold) < 1


@pytest.mark.parametrize("ring", RINGS)
def test_a_source_that_was_cached_stays_so(cold: Path, ring: str) -> None:
    cold.read_bytes()
    before = cached_mib(cold)
    assert before > 39  # the kernel takes pages back when it needs them
    with driver(ring, file_address(cold), "source") as source:
        source.open()
        for n in range(SIZE // MIB):
            source.read(n * MIB, MIB)
        source.leave()
    assert cached_mib(cold) > before - 1


@pytest.mark.parametrize("ring", RINGS)
def test_a_destination_is_not_cached_once_it_was_flushed(cold: Path, ring: str) -> None:
    with driver(ring, file_address(cold), "destination") as destination:
        destination.open()
        for n in range(SIZE // MIB):
            assert destination.write(n * MIB, b"\xff" * MIB).error is None
        assert destination.flush().error is None
        destination.leave()
    assert cached_mib(cold) < 1
    assert cold.read_bytes() == b"\xff" * SIZE


def test_mincore_says_what_cachestat_says(cold: Path) -> None:
    number = os.open(cold, os.O_RDWR)
    try:
        os.pread(number, MIB, 3 * MIB)
        for where in (Range(0, SIZE), Range(3 * MIB, 4 * MIB), Range(3 * MIB + 5000, 3 * MIB + 5001)):
            try:
                expected = file_calls._cachestat(number, where)
            except OSError:
                pytest.skip("this kernel has no cachestat")
            assert file_calls._mincore(number, where) == expected
    finally:
        os.close(number)


# -- the rules, with the kernel's part played by the test -------------------------------------------------------------


class Kernel:
    """Takes the hints of one PageCache; `run` carries out those that are under way."""

    def __init__(self) -> None:
        self.warm: set[int] = set()  # windows somebody else has cached
        self.looked: list[int] = []
        self.dropped: list[Range] = []
        self.written_back: list[Range] = []
        self.pending: Pending = []
        self.fails = False

    def cached_bytes(self, number: int, where: Range) -> int:
        if self.fails:
            raise OSError(errno.ENOSYS, "Function not implemented")
        index = where.start // CACHE_WINDOW_BYTES
        self.looked.append(index)
        return where.length if index in self.warm else 0

    def drop_pages(self, number: int, where: Range) -> None:
        if self.fails:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.dropped.append(where)

    def start_write_back(self, number: int, where: Range) -> None:
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")
        self.written_back.append(where)

    def call(self, function: Callable[[], None], then: Callable[[object], None]) -> None:
        self.pending.append((function, then))

    def run(self) -> None:
        pending, self.pending = self.pending, []
        for function, then in pending:
            function()
            then(None)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    fake = Kernel()
    for name in ("cached_bytes", "drop_pages", "start_write_back"):
        monkeypatch.setattr(page_cache, name, getattr(fake, name))
    yield fake
    assert not fake.pending


def window(index: int) -> Range:
    return Range.of(index * CACHE_WINDOW_BYTES, CACHE_WINDOW_BYTES)


def test_each_window_is_looked_at_once_and_well_before_it_is_read(kernel: Kernel) -> None:
    cache = PageCache(0, kernel.call)
    ahead = CACHE_LOOK_AHEAD_BYTES // CACHE_WINDOW_BYTES
    cache.before_read(Range.of(0, MIB))
    assert kernel.looked == list(range(ahead + 1))
    cache.before_read(Range.of(MIB, MIB))
    cache.before_read(Range.of(CACHE_WINDOW_BYTES, MIB))
    assert kernel.looked == list(range(ahead + 2))


def test_only_windows_nobody_had_cached_are_dropped(kernel: Kernel) -> None:
    kernel.warm = {1}
    cache = PageCache(0, kernel.call)
    for index in range(4):
        cache.before_read(window(index))
        cache.after_read(window(index))
        kernel.run()
    assert kernel.dropped == [window(0), window(2), window(3)]


def test_what_is_read_is_dropped_a_window_at_a_time(kernel: Kernel) -> None:
    cache = PageCache(0, kernel.call)
    cache.before_read(Range(0, 2 * CACHE_WINDOW_BYTES))
    half = CACHE_WINDOW_BYTES // 2
    cache.after_read(Range.of(0, half))
    assert not cache.busy
    cache.after_read(Range.of(CACHE_WINDOW_BYTES, half))
    assert cache.busy
    kernel.run()
    assert not cache.busy
    assert kernel.dropped == [Range.of(0, half), Range.of(CACHE_WINDOW_BYTES, half)]


def test_at_the_end_what_readahead_left_is_dropped_too(kernel: Kernel) -> None:
    kernel.warm = {2}
    cache = PageCache(0, kernel.call)
    cache.before_read(Range.of(0, MIB))
    cache.finish()
    kernel.run()
    last = (MIB + CACHE_LOOK_AHEAD_BYTES) // CACHE_WINDOW_BYTES
    assert kernel.dropped == [
        Range(0, 2 * CACHE_WINDOW_BYTES),
        Range(3 * CACHE_WINDOW_BYTES, (last + 1) * CACHE_WINDOW_BYTES),
    ]
    cache.finish()
    assert not cache.busy


def test_written_windows_are_written_back_at_once_and_dropped_later(kernel: Kernel) -> None:
    cache = PageCache(0, kernel.call)
    for index in range(4):
        cache.after_write(window(index))
        kernel.run()
    assert kernel.written_back == [window(0), window(1), window(2), window(3)]
    assert kernel.dropped == [window(0), window(1)]


def test_few_hints_are_under_way_at_once_and_what_waits_is_bounded(kernel: Kernel) -> None:
    cache = PageCache(0, kernel.call)
    for index in range(0, 4000, 2):
        cache.after_write(window(index))
        assert len(kernel.pending) <= CACHE_HINTS_MAX
    assert len(cache._written) <= CACHE_RUNS_MAX
    kernel.run()
    cache.after_write(window(4000))
    kernel.run()
    assert window(4000) in kernel.written_back  # it goes on as soon as the kernel keeps up again


def test_hints_that_fail_are_no_matter(kernel: Kernel) -> None:
    kernel.fails = True
    cache = PageCache(0, kernel.call)
    for index in range(8):
        cache.before_read(window(index))
        cache.after_read(window(index))
        cache.after_write(window(index))
        kernel.run()
    cache.after_sync()
    cache.finish()
    kernel.run()
    assert not cache.busy
