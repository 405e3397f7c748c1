"""server/layers/cache.py and cache_opening.py: what passes through a cache, and how one is asked for."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server.chain import Wanted, not_shared, open_backend
from nbdshard.server.layers.around import Operation
from support.caches import BLOCK, SIZE, cached, elsewhere, read, write
from support.gated import Gated, content_of
from support.waiting import wait_for

EMPTY = STATE_HOLE | STATE_ZERO


# -- zeroes, trims, extents


def test_zeroes_over_dirty_data_stay_zeroes() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        write(cache, 0, b"x" * 4 * BLOCK)
        cache.zero(Range(100, 3 * BLOCK + 100), may_punch=True, fast=False)
        assert below.asked(Operation.ZERO) == [Range(BLOCK, 3 * BLOCK)]
        expected = b"x" * 100 + bytes(3 * BLOCK) + b"x" * (BLOCK - 100)
        assert read(cache, 0, 4 * BLOCK) == expected
        cache.flush()
        assert below.content(0, 4 * BLOCK) == expected


def test_zeroes_wait_for_a_write_back_that_they_overlap_and_win() -> None:
    below = Gated(SIZE)
    below.shut(Operation.WRITE)
    with cached(below) as cache, elsewhere() as apart:
        write(cache, 0, b"x" * BLOCK)
        flush = apart(cache.flush)
        below.wait_for(Operation.WRITE, 1)
        zero = apart(lambda: cache.zero(Range(0, BLOCK), may_punch=True, fast=False))
        wait_for("the zeroes to wait", lambda: cache._core._throughs)
        assert not below.asked(Operation.ZERO)
        below.open(Operation.WRITE)
        zero.result()
        flush.result()
        assert below.content(0, BLOCK) == bytes(BLOCK)


def test_fast_zeroes_that_what_is_below_has_not_are_refused_and_leave_what_was_dirty() -> None:
    below = Gated(SIZE)
    below.failing[Operation.ZERO] = errno.EOPNOTSUPP
    with cached(below) as cache:
        write(cache, 0, b"x" * BLOCK)
        with pytest.raises(OSError) as caught:
            cache.zero(Range(0, 2 * BLOCK), may_punch=True, fast=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        cache.flush()
        assert below.content(0, BLOCK) == b"x" * BLOCK


def test_what_is_trimmed_is_not_written_back() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        write(cache, 0, b"x" * 2 * BLOCK)
        cache.trim(Range(0, BLOCK))
        cache.flush()
        assert below.asked(Operation.WRITE) == [Range(BLOCK, 2 * BLOCK)]
        assert read(cache, 0, BLOCK) == bytes(BLOCK)


def test_what_is_trimmed_where_trims_do_nothing_stays_what_it_was() -> None:
    """And does not become what it was before that."""

    class Deaf(Gated):
        def trim(self, where: Range) -> None:
            self.calls.append((Operation.TRIM, where))

    below = Deaf(SIZE)
    below.below.write(Range(0, BLOCK), memoryview(b"o" * BLOCK))
    with cached(below) as cache:
        write(cache, 0, b"x" * BLOCK)
        cache.trim(Range(0, BLOCK))
        assert read(cache, 0, BLOCK) == b"x" * BLOCK
        cache.flush()
        assert below.content(0, BLOCK) == b"x" * BLOCK


def test_a_trim_that_fails_leaves_what_was_dirty() -> None:
    below = Gated(SIZE)
    below.failing[Operation.TRIM] = errno.EIO
    with cached(below) as cache:
        write(cache, 0, b"x" * BLOCK)
        with pytest.raises(OSError, match="this trim fails"):
            cache.trim(Range(0, BLOCK))
        assert read(cache, 0, BLOCK) == b"x" * BLOCK


def test_dirty_data_is_data_where_there_is_a_hole_below() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        write(cache, BLOCK, b"x" * 512)
        found = cache.extents(Range(0, 4 * BLOCK))
        wanted = [(Range(0, BLOCK), EMPTY), (Range(BLOCK, BLOCK + 512), 0), (Range(BLOCK + 512, 4 * BLOCK), EMPTY)]
        assert found == wanted


# -- writing through


def test_a_write_through_is_below_when_it_is_acknowledged_and_what_is_held_is_as_it() -> None:
    below = Gated(SIZE)
    with cached(below, write_back=False) as cache:
        read(cache, 0, BLOCK)
        write(cache, 100, b"x" * 1000)
        assert below.content(100, 1000) == b"x" * 1000
        assert read(cache, 99, 1002) == b"\0" + b"x" * 1000 + b"\0"
        assert len(below.asked(Operation.READ)) == 1


def test_a_write_through_that_fails_leaves_nothing_in_the_cache_that_may_not_be_below() -> None:
    below = Gated(SIZE)
    with cached(below, write_back=False) as cache:
        read(cache, 0, BLOCK)
        below.failing[Operation.WRITE] = errno.EIO
        with pytest.raises(OSError, match="this write fails"):
            write(cache, 0, b"x" * BLOCK)
        read(cache, 0, BLOCK)
        assert len(below.asked(Operation.READ)) == 2


def test_writes_through_to_one_place_come_one_after_the_other() -> None:
    below = Gated(SIZE)
    below.shut(Operation.WRITE)
    with cached(below, write_back=False) as cache, elsewhere() as apart:
        read(cache, 0, BLOCK)
        writes = [apart(lambda value=value: write(cache, 0, bytes([value]) * 1000)) for value in (1, 2, 3)]
        below.wait_for(Operation.WRITE, 1)
        wait_for("the others to wait", lambda: len(cache._core._throughs) == 3)
        assert len(below.asked(Operation.WRITE)) == 1
        below.open(Operation.WRITE)
        for each in writes:
            each.result()
        assert read(cache, 0, 1000) == below.content(0, 1000)


# -- from the command line


def test_one_cache_is_for_all_connections_and_not_for_several_processes() -> None:
    backend = open_backend(Wanted("disk", "raw", "cache:memory:1M"))
    assert backend.flags & TransmissionFlag.CAN_MULTI_CONN
    backend.close()
    assert not_shared(Wanted("disk", "raw", "cache:file:/image")) == ["cache"]


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ("limit=64K", "limit=65536: at least 1 MiB is needed with blocks of 64 KiB"),
        ("block=3000", "block=3000: a power of two from 4 KiB to 4 MiB is expected"),
        ("limit=0", "limit=0: at least 1 MiB is needed"),
        ("dir-limit=1G", "dir-limit= without dir="),
        ("mode=fast", "mode=fast: writeback or writethrough is expected"),
    ],
)
def test_what_makes_no_cache_is_refused(parameters: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        open_backend(Wanted("disk", "raw", f"cache:memory:1M?{parameters}"))


def test_an_export_that_nobody_writes_to_is_cached(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 10_000)
    backend = open_backend(
        Wanted("disk", "raw", f"cache:file:{tmp_path}/image?read-only=yes&dir={tmp_path}/cache&dir-limit=4M")
    )
    assert backend.flags & TransmissionFlag.READ_ONLY
    for _ in range(2):
        assert content_of(backend.read(Range(0, 10_000))) == b"x" * 10_000
    backend.flush()
    backend.close()


def test_an_export_with_the_longest_of_names_has_a_cache_on_disk_and_no_other_has_that(tmp_path: Path) -> None:
    conn, names = f"cache:memory:1M?dir={tmp_path}/cache&dir-limit=4M", ["\1" * 4095 + end for end in "ab"]
    for _ in range(2):
        open_backend(Wanted(names[0], "raw", conn)).close()
    with pytest.raises(UserError, match="each export needs a directory of its own"):
        open_backend(Wanted(names[1], "raw", conn))


def test_threads_end_with_the_cache() -> None:
    before = threading.active_count()
    open_backend(Wanted("disk", "raw", "cache:memory:1M")).close()
    assert threading.active_count() == before
