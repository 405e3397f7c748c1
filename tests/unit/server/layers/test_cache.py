"""server/layers/cache.py: reads, writes and write-backs side by side, in front of a backend that waits and fails."""

from __future__ import annotations

import errno
import threading

import pytest

from nbdshard.common.ranges import Range
from nbdshard.server.layers.around import Operation
from support.caches import BLOCK, DIRTY_MAX, SIZE, cached, elsewhere, fill, read, write
from support.gated import Gated, content_of
from support.waiting import wait_for

# -- reading


def test_what_was_read_is_read_once() -> None:
    below = Gated(SIZE)
    below.below.write(Range.of(100, 3), memoryview(b"abc"))
    with cached(below) as cache:
        assert read(cache, 99, 5) == b"\0abc\0"
        assert read(cache, 100, 4000 - 100) == b"abc" + bytes(3897)
        assert below.asked(Operation.READ) == [Range(0, BLOCK)]


def test_a_block_that_many_want_is_fetched_once() -> None:
    below = Gated(SIZE)
    below.below.write(Range.of(0, 3), memoryview(b"abc"))
    below.shut(Operation.READ)
    with cached(below) as cache, elsewhere() as apart:
        found = [apart(lambda: read(cache, 0, 3)) for _ in range(8)]
        wait_for("all to want it", lambda: cache._core._blocks and cache._core._blocks[0].pins == 9)  # and the fetch
        below.open(Operation.READ)
        assert [each.result() for each in found] == [b"abc"] * 8
        assert len(below.asked(Operation.READ)) == 1


def test_a_long_miss_is_fetched_in_several_requests_at_once() -> None:
    below = Gated(SIZE)
    below.shut(Operation.READ)
    with cached(below) as cache, elsewhere() as apart:
        found = apart(lambda: read(cache, BLOCK, 8 * BLOCK))
        below.wait_for(Operation.READ, 3)
        below.open(Operation.READ)
        assert found.result() == bytes(8 * BLOCK)
        wanted = [Range(BLOCK, 4 * BLOCK), Range(4 * BLOCK, 8 * BLOCK), Range(8 * BLOCK, 9 * BLOCK)]
        assert sorted(where for where in below.asked(Operation.READ) if where) == wanted


def test_a_fetch_that_fails_is_an_error_of_who_wanted_it_and_tried_again_by_the_next() -> None:
    below = Gated(SIZE)
    below.failing[Operation.READ] = errno.ETIMEDOUT
    with cached(below) as cache:
        with pytest.raises(OSError, match="this read fails") as caught:
            read(cache, 0, 8 * BLOCK)
        assert caught.value.errno == errno.ETIMEDOUT
        del below.failing[Operation.READ]
        assert read(cache, 0, 8 * BLOCK) == bytes(8 * BLOCK)


def test_more_than_fits_is_read_all_the_same() -> None:
    below = Gated(SIZE)
    for number in range(64):
        below.below.write(Range.of(number * BLOCK, BLOCK), memoryview(bytes([number]) * BLOCK))
    with cached(below) as cache:
        assert read(cache, 0, SIZE) == below.content(0, SIZE)
        assert read(cache, 0, SIZE) == below.content(0, SIZE)


def test_what_is_asked_to_be_cached_is_read_from_the_cache() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        cache.cache(Range(0, SIZE))
        asked = len(below.asked(Operation.READ))
        read(cache, 0, 8 * BLOCK)
        assert len(below.asked(Operation.READ)) == asked
        assert below.asked(Operation.CACHE) == [Range(8 * BLOCK, SIZE)]  # half of the cache is filled


# -- writing back


def test_a_write_is_acknowledged_before_it_is_below_and_is_there_after_a_flush() -> None:
    below = Gated(SIZE)
    below.shut(Operation.WRITE)
    with cached(below) as cache, elsewhere() as apart:
        write(cache, 1000, b"x" * 2000)
        assert read(cache, 999, 2002) == b"\0" + b"x" * 2000 + b"\0"
        flush = apart(cache.flush)
        below.wait_for(Operation.WRITE, 1)
        assert not below.asked(Operation.FLUSH)
        below.open(Operation.WRITE)
        flush.result()
        assert below.content(999, 2002) == b"\0" + b"x" * 2000 + b"\0"
        assert len(below.asked(Operation.FLUSH)) == 1


def test_whole_sectors_are_written_without_asking_what_was_there() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        write(cache, 512, b"a" * 1024)
        cache.flush()
        assert not below.asked(Operation.READ)
        assert below.asked(Operation.WRITE) == [Range(512, 1536)]


def test_neighbours_are_written_back_together_and_no_farther_than_a_unit() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        for number in (3, 0, 2, 1, 4):
            write(cache, number * BLOCK, bytes([number + 1]) * BLOCK)
        cache.flush()
        written = sorted(where for where in below.asked(Operation.WRITE) if where)
        assert written == [Range(0, 4 * BLOCK), Range(4 * BLOCK, 5 * BLOCK)]


def test_pieces_of_a_chunk_are_written_back_as_one_where_chunks_are_written_whole() -> None:
    below = Gated(SIZE, block_size=4 * BLOCK)
    below.below.write(Range(0, SIZE), memoryview(b"-" * SIZE))
    with cached(below) as cache:
        for at in (0, BLOCK + 512, 3 * BLOCK):
            write(cache, at, b"x" * 512)
        cache.flush()
        assert below.asked(Operation.WRITE) == [Range(0, 3 * BLOCK + 512)]
        expected = bytearray(b"-" * 4 * BLOCK)
        for at in (0, BLOCK + 512, 3 * BLOCK):
            expected[at : at + 512] = b"x" * 512
        assert below.content(0, 4 * BLOCK) == expected


def test_what_is_written_during_its_write_back_is_written_again() -> None:
    below = Gated(SIZE)
    below.shut(Operation.WRITE)
    with cached(below) as cache, elsewhere() as apart:
        write(cache, 0, b"a" * BLOCK)
        first = apart(cache.flush)
        below.wait_for(Operation.WRITE, 1)
        write(cache, 0, b"b" * 512)
        second = apart(cache.flush)
        below.open(Operation.WRITE)
        first.result()
        second.result()
        assert below.content(0, BLOCK) == b"b" * 512 + b"a" * (BLOCK - 512)


def test_partial_writes_of_one_block_by_many_are_all_there() -> None:
    below = Gated(SIZE)
    with cached(below) as cache, elsewhere() as apart:
        writes = [apart(lambda at=at: write(cache, at, bytes([at % 251 + 1]) * 100)) for at in range(50, 8050, 100)]
        for each in writes:
            each.result()
        cache.flush()
        expected = bytes(50) + b"".join(bytes([at % 251 + 1]) * 100 for at in range(50, 8050, 100))
        assert below.content(0, 8050) == expected


def test_a_full_cache_makes_writers_wait_and_holds_no_more_than_it_may() -> None:
    below = Gated(SIZE)
    below.shut(Operation.WRITE)
    with cached(below) as cache, elsewhere() as apart:
        fill(cache)
        late = [apart(lambda at=at: write(cache, at * BLOCK, b"z" * BLOCK)) for at in range(20, 30)]
        wait_for("all to wait for room", lambda: cache._core.waiting == 10)
        assert cache._core.claimed == DIRTY_MAX
        assert not any(each.done() for each in late)
        below.open(Operation.WRITE)
        for each in late:
            each.result()
        cache.flush()
        assert below.content(20 * BLOCK, 10 * BLOCK) == b"z" * 10 * BLOCK


def test_a_read_that_misses_does_not_wait_for_write_backs() -> None:
    below = Gated(SIZE)
    below.below.write(Range.of(40 * BLOCK, 3), memoryview(b"abc"))
    below.shut(Operation.WRITE)
    with cached(below) as cache, elsewhere() as apart:
        fill(cache)
        flush = apart(cache.flush)
        below.wait_for(Operation.WRITE, 2)
        assert read(cache, 40 * BLOCK, 20 * BLOCK) == b"abc" + bytes(20 * BLOCK - 3)  # far more than there is room for
        assert read(cache, 0, BLOCK) == b"\1" * BLOCK
        below.open(Operation.WRITE)
        flush.result()


def test_a_write_of_part_of_a_sector_with_everything_dirty_ends_when_there_is_room() -> None:
    below = Gated(SIZE)
    below.below.write(Range.of(40 * BLOCK, 10), memoryview(b"0123456789"))
    below.shut(Operation.WRITE)
    with cached(below) as cache, elsewhere() as apart:
        fill(cache)
        late = apart(lambda: write(cache, 40 * BLOCK + 3, b"xy"))
        wait_for("it to wait for room", lambda: cache._core.waiting == 1)
        below.open(Operation.WRITE)
        late.result()
        cache.flush()
        assert below.content(40 * BLOCK, 10) == b"012xy56789"


# -- for a connection's own thread


def test_what_is_held_is_read_without_waiting_and_nothing_else() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        read(cache, 0, BLOCK)
        asked = len(below.calls)
        assert content_of(cache.read_now(Range(10, BLOCK)) or ()) == bytes(BLOCK - 10)
        assert cache.read_now(Range(10, BLOCK + 1)) is None
        assert len(below.calls) == asked


def test_what_there_is_room_for_is_written_without_waiting_and_else_nothing_of_it() -> None:
    below = Gated(SIZE)
    below.shut(Operation.WRITE)
    with cached(below) as cache:
        data = memoryview(b"x" * DIRTY_MAX * BLOCK)
        assert not cache.write_now(Range.of(0, len(data) + BLOCK), memoryview(b"x" * (len(data) + BLOCK)))
        assert cache.dirty_bytes == 0
        assert not cache.write_now(Range(100, 200), data[:100])  # the rest of the sector is not known
        assert cache.write_now(Range.of(0, len(data)), data)
        assert read(cache, 0, len(data)) == data
        below.open(Operation.WRITE)


# -- a layer below that fails


def test_every_flush_fails_until_it_has_been_written_back_and_nothing_is_lost() -> None:
    below = Gated(SIZE)
    below.failing[Operation.WRITE] = errno.ENOSPC
    with cached(below) as cache:
        write(cache, 0, b"x" * BLOCK)
        for _ in range(3):
            with pytest.raises(OSError, match="4 KiB cannot be written back: this write fails") as caught:
                cache.flush()
            assert caught.value.errno == errno.ENOSPC
        assert not below.asked(Operation.FLUSH)
        assert read(cache, 0, BLOCK) == b"x" * BLOCK
        below.failing.clear()
        cache.flush()
        assert below.content(0, BLOCK) == b"x" * BLOCK
        assert cache.losses == 0


def test_a_flush_that_fails_below_fails_here() -> None:
    below = Gated(SIZE)
    below.failing[Operation.FLUSH] = errno.EIO
    with cached(below) as cache:
        write(cache, 0, b"x")
        with pytest.raises(OSError, match="this flush fails"):
            cache.flush()
        below.failing.clear()


def test_a_full_cache_that_cannot_be_written_back_refuses_writes_and_takes_them_again_later() -> None:
    below = Gated(SIZE)
    below.failing[Operation.WRITE] = errno.EIO
    with cached(below, failing_seconds=0.1) as cache:
        fill(cache)
        with pytest.raises(OSError, match="the cache is full, and cannot be written back: this write fails"):
            write(cache, 40 * BLOCK, b"y" * BLOCK)
        below.failing.clear()
        write(cache, 40 * BLOCK, b"y" * BLOCK)
        cache.flush()
        assert below.content(40 * BLOCK, BLOCK) == b"y" * BLOCK
        assert below.content(0, BLOCK) == b"\1" * BLOCK


def test_what_is_lost_below_is_lost_here() -> None:
    below = Gated(SIZE)
    with cached(below) as cache:
        below.lost = 2
        assert cache.losses == 2


def test_what_cannot_be_written_back_at_the_end_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    below = Gated(SIZE)
    below.failing[Operation.WRITE] = errno.EIO
    with cached(below) as cache:
        write(cache, 0, b"x" * BLOCK)
    assert "what was written is lost: 4 KiB cannot be written back: this write fails" in capfd.readouterr().err


def test_a_bug_of_a_layer_below_is_an_error_of_the_flush(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Gated):
        def write(self, where: Range, data: memoryview) -> None:
            raise ValueError("broken")

    with cached(Broken(SIZE)) as cache:
        write(cache, 0, b"x" * BLOCK)
        with pytest.raises(OSError, match="an internal error"):
            cache.flush()
    assert "ValueError: broken" in capfd.readouterr().err


def test_a_read_for_which_there_are_no_further_threads_is_carried_out_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    below = Gated(SIZE)
    below.below.write(Range(0, SIZE), memoryview(b"x" * SIZE))
    with cached(below) as cache:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refused)
            assert read(cache, 0, 16 * BLOCK) == b"x" * 16 * BLOCK
        assert read(cache, 0, 16 * BLOCK) == b"x" * 16 * BLOCK
