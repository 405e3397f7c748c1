"""server/layers/cache_disk.py and cache_index.py: what a cache on disk holds after a crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Deferred
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.layers import cache_disk
from nbdshard.server.layers.around import Operation
from nbdshard.server.layers.cache import Cache
from nbdshard.server.layers.cache_blocks import Geometry
from nbdshard.server.layers.cache_core import CacheCore
from nbdshard.server.layers.cache_disk import open_folder
from nbdshard.server.layers.cache_index import HEADER_BYTES, Header, record_bytes
from support.caches import read, write
from support.gated import Gated
from support.journals import small_disk

GRAIN = 4096
BLOCK = 4 * GRAIN
SIZE = 64 * BLOCK
SLOTS = 16
HEADER = Header("export 'disk'", SIZE, BLOCK, GRAIN, SLOTS)
RECORD = record_bytes(BLOCK // GRAIN)


@contextmanager
def cached(below: Gated, folder: Path, header: Header = HEADER, *, write_back: bool = True) -> Iterator[Cache]:
    """A cache on disk, in which nothing ages: it writes back for a flush, or for want of room."""
    slots, dirty = open_folder(folder, header)
    found = slots.header
    core = CacheCore(Geometry(below.size, found.block, found.grain, unit=4 * BLOCK, fetch=4 * BLOCK), found.slots)
    core.restore(dirty, 0.0)
    cache = Cache(below, core, slots, write_back=write_back, fetchers=2, writers=2, through=BLOCK, clock=lambda: 0.0)
    try:
        yield cache
    finally:
        cache.close()


def copied(folder: Path, to: Path) -> Path:
    """The directory as it is now: what a process that is killed leaves."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def dirty_one(tmp_path: Path) -> Path:
    """A directory that holds a block and a half that are not below."""
    below = Gated(SIZE)
    below.failing[Operation.WRITE] = errno.EIO
    with cached(below, tmp_path / "cache") as cache:
        write(cache, BLOCK, b"a" * BLOCK)
        write(cache, 5 * BLOCK, b"b" * 2 * GRAIN)
        return copied(tmp_path / "cache", tmp_path / "left")


def another_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_disk, "_boot", lambda: "another start of the machine")


def refused(folder: Path, header: Header = HEADER) -> str:
    with pytest.raises(UserError) as caught:
        open_folder(folder, header)
    return str(caught.value)


def test_what_was_acknowledged_when_it_was_killed_is_there_and_written_back(tmp_path: Path) -> None:
    left, below = dirty_one(tmp_path), Gated(SIZE)
    with cached(below, left) as cache:
        assert read(cache, BLOCK, BLOCK) == b"a" * BLOCK
        assert read(cache, 5 * BLOCK, 3 * GRAIN) == b"b" * 2 * GRAIN + bytes(GRAIN)
        cache.flush()
        assert below.content(BLOCK, BLOCK) == b"a" * BLOCK
        assert below.content(5 * BLOCK, 3 * GRAIN) == b"b" * 2 * GRAIN + bytes(GRAIN)


def test_what_was_flushed_is_not_written_back_again(tmp_path: Path) -> None:
    below = Gated(SIZE)
    with cached(below, tmp_path / "cache") as cache:
        write(cache, 0, b"a" * BLOCK)
        cache.flush()
        left = copied(tmp_path / "cache", tmp_path / "left")
    with cached(Gated(SIZE), left) as cache:
        assert cache.dirty_bytes == 0


def test_what_is_below_and_not_flushed_there_is_written_back_again(tmp_path: Path) -> None:
    below = Gated(SIZE)
    below.failing[Operation.FLUSH] = errno.EIO
    with cached(below, tmp_path / "cache") as cache:
        write(cache, 0, b"a" * BLOCK)
        with pytest.raises(OSError, match="this flush fails"):
            cache.flush()
        assert cache.dirty_bytes == 0
        left = copied(tmp_path / "cache", tmp_path / "left")
        below.failing.clear()
    with cached(Gated(SIZE), left) as cache:
        assert cache.dirty_bytes == BLOCK


def test_zeroes_and_trims_after_a_write_are_not_undone_by_what_was_left(tmp_path: Path) -> None:
    below = Gated(SIZE)
    below.failing[Operation.WRITE] = errno.EIO
    with cached(below, tmp_path / "cache") as cache:
        write(cache, 0, b"a" * 4 * BLOCK)
        cache.zero(Range(BLOCK, 2 * BLOCK), may_punch=True, fast=False)
        cache.trim(Range(2 * BLOCK, 3 * BLOCK))
        left = copied(tmp_path / "cache", tmp_path / "left")
    below.failing.clear()
    with cached(below, left) as cache:
        assert read(cache, 0, 4 * BLOCK) == b"a" * BLOCK + bytes(2 * BLOCK) + b"a" * BLOCK


def test_a_slot_that_was_given_to_another_block_holds_only_that(tmp_path: Path) -> None:
    below = Gated(SIZE)
    with cached(below, tmp_path / "cache") as cache:
        for number in range(40):
            write(cache, number * BLOCK, bytes([number + 1]) * BLOCK)
        left = copied(tmp_path / "cache", tmp_path / "left")
        cache.flush()
    with cached(below, left) as cache:
        assert read(cache, 0, 40 * BLOCK) == b"".join(bytes([number + 1]) * BLOCK for number in range(40))


def test_at_an_end_that_cannot_write_back_it_is_kept_for_the_next_start(tmp_path: Path) -> None:
    below = Gated(SIZE)
    below.failing[Operation.WRITE] = errno.EIO
    with cached(below, tmp_path / "cache") as cache:
        write(cache, 0, b"a" * BLOCK)
        with pytest.raises(Deferred, match=r"16 KiB cannot be written back: this write fails; kept in .*cache for the"):
            cache.flush()
    below.failing.clear()
    with cached(below, tmp_path / "cache"):
        pass
    assert below.content(0, BLOCK) == b"a" * BLOCK


def test_what_was_left_is_written_back_by_a_cache_that_writes_through(tmp_path: Path) -> None:
    left, below = dirty_one(tmp_path), Gated(SIZE)
    with cached(below, left, write_back=False) as cache:
        write(cache, BLOCK + 10, b"c" * GRAIN)
        expected = b"a" * 10 + b"c" * GRAIN + b"a" * (BLOCK - GRAIN - 10)
        assert read(cache, BLOCK, BLOCK) == expected
        cache.flush()
        assert below.content(BLOCK, BLOCK) == expected


def test_what_was_left_is_read_and_kept_where_nobody_may_write(tmp_path: Path) -> None:
    class ReadOnly(Gated):
        @property
        def flags(self) -> TransmissionFlag:
            return super().flags | TransmissionFlag.READ_ONLY

    left = dirty_one(tmp_path)
    for _ in range(2):
        with cached(ReadOnly(SIZE), left) as cache:
            assert read(cache, BLOCK, BLOCK) == b"a" * BLOCK
            cache.flush()


# -- a crash of the machine


def test_after_a_crash_of_the_machine_what_is_whole_is_kept_and_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left, below = dirty_one(tmp_path), Gated(SIZE)
    content = bytearray((left / "data").read_bytes())
    content[content.index(b"a" * BLOCK) + GRAIN] ^= 1  # in its second grain
    (left / "data").write_bytes(content)
    another_boot(monkeypatch)
    with cached(below, left) as cache:
        assert cache.dirty_bytes == BLOCK + 2 * GRAIN - GRAIN
        assert read(cache, BLOCK, BLOCK) == b"a" * GRAIN + bytes(GRAIN) + b"a" * 2 * GRAIN
    assert "the machine has crashed, and 4 KiB at most of what no flush had covered" in capfd.readouterr().err


def test_a_record_that_is_torn_by_a_crash_of_the_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left = dirty_one(tmp_path)
    tear(left)
    another_boot(monkeypatch)
    with cached(Gated(SIZE), left) as cache:
        assert 0 < cache.dirty_bytes < BLOCK + 2 * GRAIN
    assert "is not whole, and given up" in capfd.readouterr().err


def test_what_was_flushed_is_not_undone_by_what_the_disk_had_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below, fdatasync = Gated(SIZE), os.fdatasync
    with cached(below, tmp_path / "cache") as cache:
        write(cache, 0, b"a" * BLOCK)
        write(cache, BLOCK, b"a" * BLOCK)
        left = copied(tmp_path / "cache", tmp_path / "left")  # the kernel writes all back, as it does now and then
        write(cache, 0, b"b" * BLOCK)
        cache.zero(Range(BLOCK, 2 * BLOCK), may_punch=True, fast=False)

        def noted(number: int) -> None:
            fdatasync(number)
            name = Path(os.readlink(f"/proc/self/fd/{number}"))
            (left / name.name).write_bytes(name.read_bytes())

        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", noted)
            cache.flush()
    another_boot(monkeypatch)
    with cached(below, left) as cache:
        cache.flush()
    assert below.content(0, 2 * BLOCK) == b"b" * BLOCK + bytes(BLOCK)


def test_after_an_orderly_end_nothing_has_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = Gated(SIZE)
    below.failing[Operation.WRITE] = errno.EIO
    with cached(below, tmp_path / "cache") as cache:
        write(cache, 0, b"a" * BLOCK)
    another_boot(monkeypatch)
    with cached(Gated(SIZE), tmp_path / "cache") as cache:
        assert cache.dirty_bytes == BLOCK


# -- what is refused


def tear(folder: Path) -> None:
    """The first record of the index that says something."""
    data = bytearray((folder / "index").read_bytes())
    first = next(at for at in range(HEADER_BYTES, len(data), RECORD) if any(data[at : at + RECORD]))
    data[first + RECORD // 4] ^= 1
    (folder / "index").write_bytes(data)


def test_a_damaged_index_is_refused_with_a_way_on(tmp_path: Path) -> None:
    left = dirty_one(tmp_path)
    tear(left)
    assert refused(left).startswith(f"{left}/index: is damaged at record ")
    assert refused(left).endswith(f"; removing {left} gives up what was not written back")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (b"something else", "is damaged: it does not begin like the index of a cache"),
        (b"nbdshard cache 1\n00000000\n{}", "is damaged: its checksum is wrong"),
        (b"nbdshard cache 9\n00000000\n{}", "a cache of format 9; this nbdshard knows format 1"),
        (b"nbdshard cache 1\na3 wrong\n", "is damaged"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, damage: bytes, line: str) -> None:
    left = dirty_one(tmp_path)
    data = (left / "index").read_bytes()
    (left / "index").write_bytes(damage.ljust(HEADER_BYTES, b"\0") + data[HEADER_BYTES:])
    assert line in refused(left)


def test_data_without_an_index_is_refused(tmp_path: Path) -> None:
    left = dirty_one(tmp_path)
    (left / "index").unlink()
    assert (
        refused(left)
        == f"{left}: has data of a cache, and no index; removing {left} gives up what was not written back"
    )


def test_an_index_without_data_is_refused(tmp_path: Path) -> None:
    left = dirty_one(tmp_path)
    (left / "data").unlink()
    assert refused(left) == f"{left}: cannot be used: No such file or directory"


def test_a_cache_of_another_export_is_refused(tmp_path: Path) -> None:
    left = dirty_one(tmp_path)
    other = Header("export 'other'", SIZE, BLOCK, GRAIN, SLOTS)
    assert refused(left, other) == f"{left}: is the cache of export 'disk'; each export needs a directory of its own"


def test_an_image_of_another_size_is_refused_while_something_is_not_written_back(tmp_path: Path) -> None:
    left = dirty_one(tmp_path)
    shorter = Header("export 'disk'", SIZE // 2, BLOCK, GRAIN, SLOTS)
    assert f"not written back to an image of {SIZE} bytes, which now has {SIZE // 2}" in refused(left, shorter)


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    with cached(Gated(SIZE), tmp_path / "cache"):
        assert "is in use by another nbdshard serve" in refused(tmp_path / "cache")


def test_a_disk_without_room_for_it_is_refused_at_the_start(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=4096) as folder:
        large = Header("export 'disk'", SIZE, BLOCK, GRAIN, slots=1024)
        assert f"{folder}/cache: has no room for 16 MiB" in refused(folder / "cache", large)
        open_folder(folder / "cache", HEADER)[0].close()


def test_a_small_disk_has_no_larger_cache(tmp_path: Path) -> None:
    open_backend(Wanted("disk", "raw", f"cache:memory:8M?dir={tmp_path}/cache")).close()
    assert os.path.getsize(tmp_path / "cache/data") == 8 << 20


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert refused(tmp_path / "cache") == f"{tmp_path}/cache: cannot be used: File exists"


# -- another cut


def test_another_size_of_the_cache_is_taken_when_all_is_written_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    left, below = dirty_one(tmp_path), Gated(SIZE)
    larger = Header("export 'disk'", SIZE, 2 * BLOCK, GRAIN, 2 * SLOTS)
    with cached(below, left, larger) as cache:
        assert read(cache, BLOCK, BLOCK) == b"a" * BLOCK
        cache.flush()
    assert "keeps its size and its blocks until it is written back" in capfd.readouterr().err
    with cached(below, left, larger) as cache:
        assert os.path.getsize(left / "data") == 2 * SLOTS * 2 * BLOCK
        assert read(cache, BLOCK, BLOCK) == b"a" * BLOCK


# -- disks that fail


@pytest.fixture
def failing_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The calls in it fail for the index of a cache, but for its header."""
    calls: set[str] = set()
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def fail(call: str, number: int) -> None:
        if call in calls and os.readlink(f"/proc/self/fd/{number}").endswith("/index"):
            raise OSError(errno.EIO, "Input/output error")

    def failing_pwrite(number: int, data: bytes, where: int) -> int:
        if where >= HEADER_BYTES:
            fail("pwrite", number)
        return pwrite(number, data, where)

    def failing_fdatasync(number: int) -> None:
        fail("fdatasync", number)
        fdatasync(number)

    monkeypatch.setattr(os, "pwrite", failing_pwrite)
    monkeypatch.setattr(os, "fdatasync", failing_fdatasync)
    yield calls
    calls.clear()


def test_an_index_that_cannot_be_written_fails_flushes_until_it_can(
    tmp_path: Path, failing_index: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    below = Gated(SIZE)
    with cached(below, tmp_path / "cache") as cache:
        failing_index.add("pwrite")
        write(cache, 0, b"a" * BLOCK)
        write(cache, BLOCK, b"a" * BLOCK)
        with pytest.raises(
            OSError, match="cache/index: cannot be written, and after a crash may undo what was flushed"
        ):
            cache.flush()
        assert below.content(0, 2 * BLOCK) == b"a" * 2 * BLOCK
        failing_index.clear()
        cache.flush()
    assert capfd.readouterr().err.count("would not survive the end of this server") == 1


def test_a_slot_that_got_another_block_while_the_index_could_not_be_written_is_not_taken_for_the_old_one(
    tmp_path: Path, failing_index: set[str]
) -> None:
    below = Gated(SIZE)
    with cached(below, tmp_path / "cache") as cache:
        write(cache, 0, b"a" * BLOCK)
        failing_index.add("pwrite")
        for number in range(1, 40):
            write(cache, number * BLOCK, b"b" * BLOCK)
        assert below.content(0, BLOCK) == b"a" * BLOCK
        left = copied(tmp_path / "cache", tmp_path / "left")
        failing_index.clear()
    with cached(below, left) as cache:
        assert read(cache, 0, BLOCK) == b"a" * BLOCK


def test_an_index_that_could_once_not_be_synced_fails_every_flush(tmp_path: Path, failing_index: set[str]) -> None:
    told = "cannot be written, and after a crash may undo what was flushed"

    def served() -> None:
        with cached(Gated(SIZE), tmp_path / "cache") as cache:
            write(cache, 0, b"a" * BLOCK)
            failing_index.add("fdatasync")
            for _ in range(2):
                with pytest.raises(OSError, match=told):
                    cache.flush()
                failing_index.clear()

    with pytest.raises(OSError, match=told):  # the end tells it, too
        served()


def test_a_cache_whose_data_cannot_be_read_writes_nothing_wrong_below(tmp_path: Path) -> None:
    left, below = dirty_one(tmp_path), Gated(SIZE)
    os.truncate(left / "data", 0)
    with cached(below, left) as cache, pytest.raises(OSError, match="has become shorter"):
        cache.flush()
    assert not below.asked(Operation.WRITE)
