"""Requests over millions of chunks: what is there is looked at, and nothing that comes or goes meanwhile is missed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends import sharded as sharded_module
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import open_volume

CHUNK = 65_536
SIZE = 4 << 40
WHOLE = Range(0, SIZE)
HOLE = 3


class Watched(FileStore):
    """Counts what is asked of it, and stops in the middle of a listing while `may_go_on` is clear."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.calls = 0
        self.listings = 0
        self.is_listing = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.fails = False

    def keys(self) -> Iterator[str]:
        self.listings += 1
        for key in list(super().keys()):
            yield key
            self.is_listing.set()
            assert self.may_go_on.wait(60)
            if self.fails:
                raise OSError(5, "Input/output error")

    def zero(self, key: str, where: Range, *, fast: bool = False) -> bool:
        self.calls += 1
        return super().zero(key, where, fast=fast)

    def delete(self, key: str) -> bool:
        self.calls += 1
        return super().delete(key)

    def extents(self, key: str, where: Range) -> Extents | None:
        self.calls += 1
        return super().extents(key, where)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Watched]:
    with contextlib.closing(Watched(tmp_path)) as found:
        yield found


@pytest.fixture
def sharded(store: Watched) -> ShardedBackend:
    """4 TiB with three chunks in them."""
    volume = open_volume(store, "disk", size=SIZE, chunk_bytes=CHUNK, read_only=False)
    found = ShardedBackend(store, volume)
    for start in (5 * CHUNK, SIZE // 2, SIZE - CHUNK):
        found.write(Range.of(start, CHUNK), memoryview(b"a" * CHUNK))
    return found


def data(start: int) -> tuple[Range, int]:
    return Range.of(start, CHUNK), 0


def test_extents_of_everything_cost_what_is_there(store: Watched, sharded: ShardedBackend) -> None:
    first, middle, last = 5 * CHUNK, SIZE // 2, SIZE - CHUNK
    assert sharded.extents(WHOLE) == [
        (Range(0, first), HOLE),
        data(first),
        (Range(first + CHUNK, middle), HOLE),
        data(middle),
        (Range(middle + CHUNK, last), HOLE),
        data(last),
    ]
    assert (store.calls, store.listings) == (3, 1)


def test_a_trim_of_everything_costs_what_is_there(store: Watched, sharded: ShardedBackend) -> None:
    sharded.trim(Range(4096, SIZE - 4096))
    assert store.calls <= 2 * 3
    assert sharded.extents(WHOLE) == [(Range(0, SIZE - 4096), HOLE), (Range(SIZE - 4096, SIZE), 0)]
    sharded.zero(WHOLE, may_punch=True, fast=True)
    assert sharded.extents(WHOLE) == [(WHOLE, HOLE)]
    assert store.listings == 1
    sharded.flush()


def test_an_answer_with_many_extents_is_short(sharded: ShardedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_module, "EXTENTS_TOLD_MAX", 4)
    found = sharded.extents(WHOLE)
    assert len(found) == 4
    assert found[-1] == data(SIZE // 2)


def test_what_comes_and_goes_while_it_is_listed_is_known(store: Watched, sharded: ShardedBackend) -> None:
    store.may_go_on.clear()
    answers: list[Extents] = []
    asking = threading.Thread(target=lambda: answers.append(sharded.extents(WHOLE)))
    asking.start()
    assert store.is_listing.wait(60)
    sharded.trim(Range.of(5 * CHUNK, CHUNK))  # others are not held up
    sharded.write(Range.of(SIZE // 4, CHUNK), memoryview(b"b" * CHUNK))
    store.may_go_on.set()
    asking.join()
    expected = [data(SIZE // 4), data(SIZE // 2), data(SIZE - CHUNK)]
    assert [extent for extent in answers[0] if extent[1] != HOLE] == expected
    sharded.trim(WHOLE)
    assert sharded.extents(WHOLE) == [(WHOLE, HOLE)]
    assert store.listings == 1


def test_a_listing_that_fails_is_an_error_and_made_again(store: Watched, sharded: ShardedBackend) -> None:
    store.fails = True
    with pytest.raises(OSError, match="Input/output error"):
        sharded.trim(WHOLE)
    store.fails = False
    sharded.trim(WHOLE)
    assert sharded.extents(WHOLE) == [(WHOLE, HOLE)]
