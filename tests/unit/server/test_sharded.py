"""Images in chunks: what the objects are, and what a fault of a store does."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common import file_map
from nbdshard.common.errors import UserError
from nbdshard.common.limits import STORE_FILES_OPEN
from nbdshard.common.ranges import Range
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.device import Hole
from nbdshard.server.stores import file as file_store
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import open_volume
from support import processes
from support.waiting import wait_for

CHUNK = 65_536
SIZE = 10 * CHUNK + 1000


_stores: list[FileStore] = []


@pytest.fixture(autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    yield
    for store in _stores:
        store.close()
    _stores.clear()


def backend(folder: Path, size: int | None = SIZE, *, name: str = "disk") -> ShardedBackend:
    store = FileStore(folder)
    _stores.append(store)
    volume = open_volume(store, name, size=size, chunk_bytes=CHUNK if size else None, read_only=False)
    return ShardedBackend(store, volume)


def write(sharded: ShardedBackend, start: int, data: bytes) -> None:
    sharded.write(Range.of(start, len(data)), memoryview(data))


def read(sharded: ShardedBackend, start: int, length: int) -> bytes:
    parts = sharded.read(Range.of(start, length))
    return b"".join(bytes(part.length) if isinstance(part, Hole) else bytes(part) for part in parts)  # type: ignore[arg-type]


def chunks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".chunk")


def test_a_chunk_is_a_file_with_what_was_written(tmp_path: Path) -> None:
    sharded = backend(tmp_path)
    write(sharded, CHUNK - 2, b"abcd")
    assert chunks(tmp_path) == ["disk.0.chunk", "disk.1.chunk"]
    assert (tmp_path / "disk.0.chunk").read_bytes() == bytes(CHUNK - 2) + b"ab"
    assert (tmp_path / "disk.1.chunk").read_bytes() == b"cd"
    assert json.loads((tmp_path / "disk.volume").read_text()) == {"format": 1, "size": SIZE, "chunk_bytes": CHUNK}


@pytest.mark.parametrize("end", [CHUNK, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK - 1])
def test_nbd_rs_4_a_read_over_a_hole_that_ends_with_a_chunk_is_as_long_as_asked(tmp_path: Path, end: int) -> None:
    sharded = backend(tmp_path)
    write(sharded, 10, b"x")
    assert read(sharded, 0, end) == bytes(10) + b"x" + bytes(end - 11)


@pytest.mark.parametrize("end", [CHUNK - 1, CHUNK, CHUNK + 1])
def test_nbd_rs_5_a_chunk_is_stored_to_its_last_byte(tmp_path: Path, end: int) -> None:
    sharded = backend(tmp_path)
    write(sharded, 0, b"y" * end)
    sharded.flush()
    sharded.close()
    assert read(backend(tmp_path), 0, CHUNK + 2) == b"y" * end + bytes(CHUNK + 2 - end)


def test_a_chunk_of_nothing_but_zeroes_is_deleted(tmp_path: Path) -> None:
    sharded = backend(tmp_path)
    write(sharded, 0, b"a" * 3 * CHUNK)
    sharded.zero(Range(CHUNK - 4096, 2 * CHUNK), may_punch=True, fast=True)
    assert chunks(tmp_path) == ["disk.0.chunk", "disk.2.chunk"]
    sharded.trim(Range(0, CHUNK - 4096))
    assert chunks(tmp_path) == ["disk.2.chunk"]
    assert read(sharded, 0, 3 * CHUNK) == bytes(2 * CHUNK) + b"a" * CHUNK
    write(sharded, SIZE - 1, b"z")
    sharded.zero(Range(SIZE - 1000, SIZE), may_punch=True, fast=False)  # the last chunk is short
    assert chunks(tmp_path) == ["disk.2.chunk"]


def test_nbd_rs_6_a_trim_of_a_part_of_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    sharded = backend(tmp_path)
    sharded.trim(Range(100, CHUNK + 5))
    assert chunks(tmp_path) == []


def test_zeroes_that_are_written_are_not_stored(tmp_path: Path) -> None:
    sharded = backend(tmp_path)
    write(sharded, 10, bytes(2 * CHUNK))
    assert chunks(tmp_path) == []
    write(sharded, 0, b"a" * 2 * CHUNK)
    write(sharded, CHUNK, bytes(CHUNK))
    write(sharded, 0, bytes(CHUNK - 4096))
    assert chunks(tmp_path) == ["disk.0.chunk"]
    write(sharded, CHUNK - 4096, bytes(4096))
    assert chunks(tmp_path) == []


@pytest.mark.parametrize("at", [0, 1, 4092, 4093, 5000, 8190, 8191])
def test_data_that_is_nearly_all_zeroes_is_data(tmp_path: Path, at: int) -> None:
    sharded = backend(tmp_path)
    data = bytes(at) + b"x" + bytes(8191 - at)
    write(sharded, 0, data)
    assert read(sharded, 0, 8192) == data


def test_zeroes_that_are_to_take_room_take_it(tmp_path: Path) -> None:
    sharded = backend(tmp_path)
    where = Range(4096, 2 * CHUNK)
    with pytest.raises(OSError, match="zeroes that take room are written") as failed:
        sharded.zero(where, may_punch=False, fast=True)
    assert failed.value.errno == errno.ENOTSUP
    assert chunks(tmp_path) == []
    sharded.zero(where, may_punch=False, fast=False)
    assert [(tmp_path / name).stat().st_blocks * 512 for name in chunks(tmp_path)] == [CHUNK - 4096, CHUNK]
    assert sharded.extents(where) == [(where, 0)]
    assert read(sharded, 0, 2 * CHUNK) == bytes(2 * CHUNK)


def refuse(*_: object) -> None:
    """A file system without holes."""
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("fast", [True, False])
def test_fast_zeroes_are_not_written_where_no_holes_are_punched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(file_store, "zero_file", refuse)
    sharded = backend(tmp_path)
    write(sharded, 0, b"a" * 8192)
    if not fast:
        sharded.zero(Range(0, 4096), may_punch=True, fast=False)
        assert read(sharded, 0, 8192) == bytes(4096) + b"a" * 4096
        return
    with pytest.raises(OSError, match="zeroes are written here") as failed:
        sharded.zero(Range(0, 4096), may_punch=True, fast=True)
    assert failed.value.errno == errno.ENOTSUP


def test_fast_zeroes_that_are_refused_at_the_end_of_a_request_change_nothing_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_store, "zero_file", refuse)
    sharded = backend(tmp_path)
    write(sharded, CHUNK, b"a" * 3 * CHUNK)  # of the first chunk there is nothing: that could be fast
    with pytest.raises(OSError, match="zeroes are written here"):
        sharded.zero(Range(4096, 4 * CHUNK - 4096), may_punch=True, fast=True)
    assert read(sharded, CHUNK, 3 * CHUNK) == b"a" * 3 * CHUNK
    sharded.zero(Range(4096, 3 * CHUNK), may_punch=True, fast=True)
    assert read(sharded, 0, 4 * CHUNK) == bytes(3 * CHUNK) + b"a" * CHUNK


def test_what_is_there_is_told_as_extents(tmp_path: Path) -> None:
    sharded = backend(tmp_path)
    write(sharded, 4 * CHUNK, b"a" * 2 * CHUNK)
    found = sharded.extents(Range(CHUNK, SIZE))
    assert found == [(Range(CHUNK, 4 * CHUNK), 3), (Range(4 * CHUNK, 6 * CHUNK), 0), (Range(6 * CHUNK, SIZE), 3)]


# -- volumes


def test_a_volume_is_found_again_without_its_size(tmp_path: Path) -> None:
    first = backend(tmp_path)
    write(first, 5, b"five")
    first.close()
    again = backend(tmp_path, None)
    assert (again.size, read(again, 5, 4)) == (SIZE, b"five")


def test_chunks_of_nbd_rs_are_read(tmp_path: Path) -> None:
    (tmp_path / "disk.1.chunk").write_bytes(b"one")
    assert read(backend(tmp_path), CHUNK, 4) == b"one\0"


def test_blocks_of_nbd_rs_are_read(tmp_path: Path) -> None:
    (tmp_path / "size").write_text("10000000\n")
    (tmp_path / "block-1").write_bytes(b"one")
    old = backend(tmp_path, None)
    assert (old.size, read(old, 4 << 20, 4)) == (10_000_000, b"one\0")


@pytest.mark.parametrize(
    ("files", "size", "what"),
    [
        ({}, None, "disk: there is no such volume; size= makes a new one"),
        ({}, 0, "a size of 0 bytes"),
        ({"disk.volume": "{}"}, None, "is no description of a volume"),
        ({"disk.volume": "\xff"}, None, "is no description of a volume"),
        ({"disk.volume": '{"format":2,"size":1,"chunk_bytes":65536}'}, None, "a volume of format 2"),
        ({"disk.volume": '{"format":1,"size":1,"chunk_bytes":3}'}, None, "chunks of 3 bytes"),
        ({"disk.volume": '{"format":1,"size":1,"chunk_bytes":65536}'}, SIZE, "and the volume has 1 bytes"),
        ({"size": "many"}, None, "where the image's size in digits is expected"),
    ],
)
def test_a_volume_that_cannot_be_is_told_in_a_line(
    tmp_path: Path, files: dict[str, str], size: int | None, what: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=what):
        backend(tmp_path, size)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_name_that_is_none_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="a name is not empty and has no / in it"):
        backend(tmp_path, name=name)


# -- faults and bounds


def test_a_write_fails_where_one_of_its_parts_does(tmp_path: Path) -> None:
    sharded = backend(tmp_path)
    (tmp_path / "disk.1.chunk").mkdir()
    with pytest.raises(IsADirectoryError):
        write(sharded, CHUNK - 2, b"abcd")
    with pytest.raises(IsADirectoryError):
        sharded.zero(Range(0, 3 * CHUNK), may_punch=True, fast=False)


def test_a_write_back_that_failed_is_never_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = backend(tmp_path)
    write(sharded, 0, b"a")

    def fail(_number: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(file_store.os, "fdatasync", fail)
        with pytest.raises(OSError, match=r"a write-back of disk\.0\.chunk failed"):
            sharded.flush()
    with pytest.raises(OSError, match="a write-back of"):  # the kernel would call it well
        sharded.flush()


def test_a_file_that_is_closed_is_durable_or_known_to_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks are written than files are kept open: nobody would hear of a write-back that fails after that."""
    synced: list[int] = []
    monkeypatch.setattr(file_store.os, "fdatasync", synced.append)
    size = (STORE_FILES_OPEN + 10) * CHUNK
    sharded = backend(tmp_path, size)
    synced.clear()
    for start in range(0, size, CHUNK):
        write(sharded, start, b"a")
    assert len(synced) >= 10
    held = sum(str(tmp_path) in target for target in processes.descriptors("self").values())
    assert held <= STORE_FILES_OPEN + 2  # the directory, and the claim


def test_writes_to_one_chunk_from_many_threads_are_all_there(tmp_path: Path) -> None:
    sharded = backend(tmp_path)

    def run(first: int) -> None:
        for start in range(first, CHUNK, 8):
            write(sharded, start, bytes([first + 1]))

    threads = [threading.Thread(target=run, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(sharded, 0, CHUNK) == bytes(range(1, 9)) * (CHUNK // 8)


def test_a_chunk_that_is_about_to_be_deleted_takes_no_write_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = backend(tmp_path)
    write(sharded, 0, b"x")
    is_empty, may_go_on, zero = threading.Event(), threading.Event(), FileStore.zero

    def paused(store: FileStore, key: str, where: Range, *, fast: bool = False) -> bool:
        has_data = zero(store, key, where, fast=fast)
        is_empty.set()
        assert may_go_on.wait(60)
        return has_data

    monkeypatch.setattr(FileStore, "zero", paused)
    clearing = threading.Thread(target=write, args=(sharded, 0, b"\0"))
    writing = threading.Thread(target=write, args=(sharded, 10, b"y"))
    clearing.start()
    assert is_empty.wait(60)
    writing.start()
    wait_for("the write to wait", lambda: not writing.is_alive() or sharded._locks._taken[0].wanted > 1)
    may_go_on.set()
    clearing.join()
    writing.join()
    assert read(sharded, 0, 20) == bytes(10) + b"y" + bytes(9)


def test_a_chunk_that_comes_and_goes_while_it_is_read_is_a_file_whenever_it_is_there(tmp_path: Path) -> None:
    """A reader must not bring a file that is being deleted back among those that are open."""
    sharded = backend(tmp_path)
    is_enough = threading.Event()

    def look() -> None:
        while not is_enough.is_set():
            read(sharded, 0, 10)

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(150):
            write(sharded, 0, b"x")
            sharded.flush()
            assert chunks(tmp_path) == ["disk.0.chunk"]
            sharded.trim(Range(0, CHUNK))
    finally:
        is_enough.set()
        for reader in readers:
            reader.join()


def test_more_extents_than_a_map_tells_are_not_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_map, "FILE_EXTENTS_MAX", 2)
    sharded = backend(tmp_path)
    for at in (0, CHUNK // 2, CHUNK - 1):
        write(sharded, at, b"x")
    found = sharded.extents(Range(0, CHUNK))
    assert found[-1] == (Range(CHUNK // 2, CHUNK), 0)
