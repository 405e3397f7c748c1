"""A directory as a store: what is durable, what is lost, and what both look like while something else goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.ranges import Range
from nbdshard.server.stores import file as file_store
from nbdshard.server.stores.file import FileStore
from support import processes
from support.waiting import wait_for

BYTES = Range(0, 4)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    with contextlib.closing(FileStore(tmp_path)) as found:
        yield found


def write(store: FileStore, key: str) -> None:
    store.write(key, BYTES, memoryview(b"data"))


class LoudLock:
    """A lock that says when somebody has to wait for it."""

    def __init__(self) -> None:
        self.is_wanted = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if self._lock.locked():
            self.is_wanted.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()


def test_a_file_that_is_being_closed_is_waited_for_by_a_sync(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of a lost write-back once: to the one who closes the file, and the sync must hear of it."""
    is_closing, may_fail = threading.Event(), threading.Event()

    def fail(_number: int) -> None:
        monkeypatch.undo()
        is_closing.set()
        assert may_fail.wait(60)
        raise OSError(5, "Input/output error")

    write(store, "one")
    lock = store._files["one"].syncing = LoudLock()  # type: ignore[assignment]
    monkeypatch.setattr(file_store, "STORE_FILES_OPEN", 1)
    monkeypatch.setattr(file_store.os, "fdatasync", fail)
    closing = threading.Thread(target=write, args=(store, "two"))
    closing.start()
    assert is_closing.wait(60)
    told: list[OSError] = []

    def sync() -> None:
        try:
            store.sync()
        except OSError as error:
            told.append(error)

    syncing = threading.Thread(target=sync)
    syncing.start()
    wait_for("the sync to wait, or to end", lambda: lock.is_wanted.is_set() or not syncing.is_alive())
    may_fail.set()
    syncing.join()
    closing.join()
    assert [str(error) for error in told] == ["[Errno 5] a write-back of one failed: Input/output error"]
    assert store.losses == 1


def test_stores_leave_half_of_the_descriptors_to_others(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = FileStore(tmp_path / "other")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, before[1]))
    try:
        for each in (store, other):
            for number in range(30):
                write(each, str(number))
        held = [sum(str(tmp_path) in target for target in processes.descriptors("self").values())]
        other.close()
        for number in range(60):
            write(store, str(number))
        held.append(sum(str(tmp_path) in target for target in processes.descriptors("self").values()))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert held == [2 * 20 + 2, 40 + 1]  # and the directories


def test_a_sync_leaves_clean_files_alone(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "one")
    write(store, "two")
    store.sync()
    synced: list[int] = []
    monkeypatch.setattr(file_store.os, "fdatasync", synced.append)
    write(store, "two")
    store.sync()
    store.sync()
    assert synced == [store._files["two"].number]


def test_a_sync_waits_for_what_another_one_has_begun_with(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dirty any more by then, and nothing is durable yet."""
    is_syncing, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    def sync_slowly(_number: int) -> None:
        is_syncing.set()
        assert may_end.wait(60)

    def sync_second() -> None:
        store.sync()
        has_ended.set()

    write(store, "one")
    lock = store._files["one"].syncing = LoudLock()  # type: ignore[assignment]
    monkeypatch.setattr(file_store.os, "fdatasync", sync_slowly)
    threads = [threading.Thread(target=store.sync), threading.Thread(target=sync_second)]
    threads[0].start()
    assert is_syncing.wait(60)
    threads[1].start()
    wait_for("the second to wait, or to end", lambda: lock.is_wanted.is_set() or has_ended.is_set())
    assert not has_ended.is_set()
    may_end.set()
    for thread in threads:
        thread.join()


def test_what_is_written_during_a_sync_is_synced_by_the_next(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def sync_first(number: int, data: memoryview, at: int) -> int:
        store.sync()
        synced.clear()
        return pwrite(number, data, at)

    def count(number: int) -> None:
        synced.append(number)
        fdatasync(number)

    write(store, "one")
    monkeypatch.setattr(file_store.os, "fdatasync", count)
    with monkeypatch.context() as patch:
        patch.setattr(file_store.os, "pwrite", sync_first)
        write(store, "one")
    store.sync()
    assert len(synced) == 1


@pytest.mark.parametrize("change", ["made", "deleted"])
def test_a_directory_that_could_not_be_synced_is_lost_for_good(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "deleted":
        write(store, "one")
        store.sync()
        store.delete("one")
    else:
        write(store, "one")

    def fail(_number: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(file_store.os, "fsync", fail)
        with pytest.raises(OSError, match="a write-back of the directory failed"):
            store.sync()
    with pytest.raises(OSError, match="a write-back of the directory failed"):
        store.sync()
    assert store.losses == 1


def test_a_file_that_was_deleted_is_not_synced(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_number: int) -> None:
        raise AssertionError

    write(store, "one")
    monkeypatch.setattr(file_store.os, "fdatasync", fail)
    assert store.delete("one")
    assert not store.delete("one")
    store.sync()


@pytest.mark.parametrize("call", ["fsync", "link", "rename"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_object_is_put_whole_or_not_at_all(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, before: bytes | None
) -> None:
    if before is not None:
        store.put("note", before, is_new=True)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_store.os, call, fail)
    if (call == "link") is not (before is None) and call != "fsync":
        store.put("note", b"new", is_new=before is None)
        before = b"new"
    else:
        with pytest.raises(OSError, match="No space left"):
            store.put("note", b"new", is_new=before is None)
    assert store.read("note", Range(0, 10)) == before
    assert os.listdir(tmp_path) == ([] if before is None else ["note"])


def test_an_object_that_is_there_is_not_made_again(store: FileStore, tmp_path: Path) -> None:
    store.put("note", b"first", is_new=True)
    with pytest.raises(FileExistsError):
        store.put("note", b"second", is_new=True)
    assert store.read("note", Range(0, 10)) == b"first"
    assert os.listdir(tmp_path) == ["note"]


@pytest.mark.parametrize("is_new", [True, False])
def test_an_object_that_is_put_is_durable_and_then_its_name(
    store: FileStore, tmp_path: Path, is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []

    def fsync(number: int) -> None:
        synced.append((os.path.samestat(os.fstat(number), tmp_path.stat()), (tmp_path / "note").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    store.put("note", b"text", is_new=is_new)
    assert synced == [(False, False), (True, True)]


def test_what_is_written_while_its_file_is_synced_is_for_the_next_sync(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fdatasync(number: int) -> None:
        synced.append(number)
        if len(synced) == 1:
            write(store, "one")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    write(store, "one")
    store.sync()
    store.sync()
    store.sync()
    assert len(synced) == 2


def test_a_directory_that_was_removed_holds_no_zeroes_and_nothing_that_is_durable(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with contextlib.closing(FileStore(folder)) as store:
        write(store, "open")
        (folder / "open").unlink()
        folder.rmdir()
        for call in (
            lambda: store.read("one", BYTES),
            lambda: store.extents("one", BYTES),
            lambda: write(store, "one"),
            store.sync,
        ):
            with pytest.raises(FileNotFoundError, match=f"{folder} was removed"):
                call()


def test_without_descriptors_files_that_nobody_uses_are_closed(store: FileStore) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    write(store, "0")
    highest = max(processes.descriptors("self"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, before[1]))
    try:
        for number in range(1, 20):
            write(store, str(number))
        assert all(store.read(str(number), BYTES) == b"data" for number in range(20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_two_listings_at_once_are_both_whole(store: FileStore) -> None:
    for number in range(100):
        write(store, str(number))
    first, second = store.keys(), store.stored()
    names = [(next(first), next(second)[0]) for _ in range(100)]
    assert len({name for name, _ in names}) == len({name for _, name in names}) == 100
