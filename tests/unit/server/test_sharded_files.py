"""Chunks that are files: what is moved to and from them without a look, and what is done at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.ranges import Range
from nbdshard.server.backends import prompt_files, sharded_files
from nbdshard.server.backends.base import Direct, Place, Prompt
from nbdshard.server.backends.sharded_files import ShardedFiles
from nbdshard.server.stores import file as file_store
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import open_volume
from support.backends import content_of

CHUNK = 65_536
SIZE = 4 * CHUNK
PAGE = 4096
FIRST = Range(0, 2 * PAGE)


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[ShardedFiles]:
    store = FileStore(tmp_path)
    volume = open_volume(store, "disk", size=SIZE, chunk_bytes=CHUNK, read_only=False)
    with contextlib.closing(ShardedFiles(store, volume)) as found:
        yield found


def fill(sharded: ShardedFiles, where: Range) -> None:
    sharded.write(where, memoryview(b"x" * where.length))


def chunks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".chunk")


def test_it_is_prompt_and_direct(sharded: ShardedFiles) -> None:
    assert isinstance(sharded, Prompt)
    assert isinstance(sharded, Direct)


def test_only_what_is_in_one_file_is_direct(sharded: ShardedFiles) -> None:
    assert sharded.is_direct(FIRST, to_write=True)
    assert not sharded.is_direct(FIRST, to_write=False)  # it is not open: others can look for it meanwhile
    fill(sharded, FIRST)
    for to_write in (False, True):
        assert sharded.is_direct(FIRST, to_write=to_write)
        assert sharded.is_direct(Range(0, CHUNK), to_write=to_write)
        assert not sharded.is_direct(Range(0, CHUNK + 1), to_write=to_write)
        assert not sharded.is_direct(Range(CHUNK - 1, CHUNK + 1), to_write=to_write)


def test_nothing_is_direct_for_which_another_file_had_to_be_closed(
    sharded: ShardedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_store, "STORE_FILES_OPEN", 1)
    fill(sharded, FIRST)
    assert sharded.is_direct(FIRST, to_write=True)
    assert not sharded.is_direct(Range(CHUNK, CHUNK + PAGE), to_write=True)


def test_a_chunk_that_is_not_there_is_written_to_a_place_and_not_read_from_one(
    sharded: ShardedFiles, tmp_path: Path
) -> None:
    with sharded.reading(FIRST) as place:
        assert place is None
    assert chunks(tmp_path) == []
    with sharded.writing(FIRST, is_all=True) as made:
        put(made, b"y" * FIRST.length)
    assert content_of(sharded, Range(0, 3 * PAGE)) == b"y" * FIRST.length + bytes(PAGE)


def test_a_place_to_read_from_is_of_all_that_is_asked_or_none(sharded: ShardedFiles) -> None:
    fill(sharded, Range(CHUNK, CHUNK + PAGE))
    with sharded.reading(Range(CHUNK + 10, CHUNK + PAGE)) as place:
        assert place is not None
        assert os.pread(place.number, PAGE - 10, place.offset) == b"x" * (PAGE - 10)
        sharded.trim(Range(CHUNK, 2 * CHUNK))  # the file is kept for the reader, and then gone
        assert os.fstat(place.number).st_nlink == 0
    for where in (Range(CHUNK, CHUNK + PAGE), Range(0, 1)):
        with sharded.reading(where) as place:
            assert place is None
    fill(sharded, FIRST)
    with sharded.reading(Range(0, FIRST.end + 1)) as place:
        assert place is None


def put(place: Place, data: bytes, at: int = 0) -> None:
    assert os.pwrite(place.number, data, place.offset + at) == len(data)


def test_what_is_written_to_a_place_is_there_and_synced_by_a_flush(
    sharded: ShardedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(sharded, FIRST)
    sharded.flush()
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with sharded.writing(Range(PAGE, 3 * PAGE), is_all=True) as place:
        put(place, b"y" * PAGE)
    with sharded.writing(Range(PAGE, 3 * PAGE), is_all=True) as place:
        put(place, b"z" * PAGE, at=PAGE)
        sharded.flush()
    sharded.flush()
    assert synced == [place.number, place.number]
    assert content_of(sharded, Range(0, 3 * PAGE)) == b"x" * PAGE + b"y" * PAGE + b"z" * PAGE


def test_a_write_to_a_place_that_fails_is_synced_too(sharded: ShardedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    places: list[Place] = []

    def write_and_fail() -> None:
        with sharded.writing(FIRST, is_all=True) as place:
            places.append(place)
            put(place, b"y")
            raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        write_and_fail()
    sharded.flush()
    assert synced == [places[0].number]


def test_zeroes_that_were_written_to_a_place_are_not_kept(sharded: ShardedFiles, tmp_path: Path) -> None:
    fill(sharded, Range(0, CHUNK))
    with sharded.writing(Range(0, CHUNK // 2), is_all=True) as place:
        put(place, bytes(CHUNK // 2))
    assert (tmp_path / "disk.0.chunk").stat().st_blocks * 512 == CHUNK // 2
    with sharded.writing(Range(CHUNK // 2, CHUNK), is_all=True) as place:
        put(place, bytes(CHUNK // 2))
    assert chunks(tmp_path) == []


def test_what_is_not_all_there_is_not_looked_at(sharded: ShardedFiles, tmp_path: Path) -> None:
    fill(sharded, FIRST)
    with sharded.writing(FIRST, is_all=False) as place:
        put(place, bytes(FIRST.length))
    assert chunks(tmp_path) == ["disk.0.chunk"]
    with sharded.writing(FIRST, is_all=True) as place:
        pass
    assert chunks(tmp_path) == []


def test_a_chunk_that_is_deleted_between_two_pieces_is_there_again(sharded: ShardedFiles) -> None:
    fill(sharded, FIRST)
    assert sharded.extents(Range(0, SIZE))[0][1] == 0  # from now on it is known which chunks there are
    with sharded.writing(FIRST, is_all=False) as place:
        put(place, b"y" * PAGE)
    sharded.trim(Range(0, CHUNK))
    with sharded.writing(FIRST, is_all=True) as place:
        put(place, b"z" * PAGE, at=PAGE)
    assert content_of(sharded, Range(0, 3 * PAGE)) == bytes(PAGE) + b"z" * PAGE + bytes(PAGE)
    assert sharded.extents(Range(0, SIZE))[0][0].end <= 2 * PAGE


@pytest.mark.parametrize(("place", "call"), [(FileStore, "take_to_write"), (sharded_files, "is_zero_part")])
def test_a_chunk_whose_file_makes_trouble_is_free_for_others(
    sharded: ShardedFiles, monkeypatch: pytest.MonkeyPatch, place: object, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "trouble")

    with monkeypatch.context() as patch:
        patch.setattr(place, call, fail)
        with pytest.raises(OSError, match="trouble"), sharded.writing(FIRST, is_all=True):
            pass
    assert sharded._locks._taken == {}
    fill(sharded, FIRST)


@pytest.mark.parametrize("at", [0, 1, CHUNK // 2, CHUNK - 1])
def test_one_byte_of_data_among_zeroes_is_kept(sharded: ShardedFiles, at: int) -> None:
    data = bytes(at) + b"x" + bytes(CHUNK - 1 - at)
    with sharded.writing(Range(0, CHUNK), is_all=True) as place:
        put(place, data)
    assert content_of(sharded, Range(0, CHUNK)) == data


def test_what_would_have_to_be_waited_for_is_not_done_now(
    sharded: ShardedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = memoryview(b"y" * 100)
    assert sharded.read_now(FIRST) is None  # not open, and perhaps not there
    assert not sharded.write_now(FIRST, memoryview(b"y" * FIRST.length))
    fill(sharded, FIRST)
    assert sharded.read_now(Range(0, FIRST.end + 1)) is None  # the file ends before
    assert sharded.read_now(Range(CHUNK - 1, CHUNK + 1)) is None
    assert not sharded.write_now(Range(CHUNK - 50, CHUNK + 50), data)
    found = sharded.read_now(FIRST)
    assert found is not None
    assert b"".join(found) == b"x" * FIRST.length
    assert sharded.write_now(Range(10, 110), data)
    monkeypatch.setattr(prompt_files, "is_at_hand", lambda *_: False)
    sharded._files._prompt._is_in_memory = sharded._files._prompt._can_ask = False
    assert sharded.read_now(FIRST) is None
    assert not sharded.write_now(Range(10, 110), data)
    assert sharded.write_now(Range(0, PAGE), memoryview(b"z" * PAGE))  # a whole page is not read first
    assert content_of(sharded, Range(0, PAGE + 10)) == b"z" * PAGE + b"x" * 10
