"""Volumes are made, resized, deleted and listed; whatever is interrupted, nothing that was cut off comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volume_changes import create, delete, listed, resize
from nbdshard.server.volumes import open_volume

CHUNK = 65_536
SIZE = 4 * CHUNK
SMALL = CHUNK + 1000


class Crash(Exception):
    """The machine stops."""


class Mortal(FileStore):
    """A store whose machine stops before the change of this number; what was done until then is there."""

    def __init__(self, folder: Path, life: int) -> None:
        super().__init__(folder)
        self.life = life

    def _live(self) -> None:
        if not self.life:
            raise Crash
        self.life -= 1

    def put(self, key: str, data: bytes, *, is_new: bool) -> None:
        self._live()
        super().put(key, data, is_new=is_new)

    def cut(self, key: str, length: int) -> None:
        self._live()
        super().cut(key, length)

    def delete(self, key: str) -> bool:
        self._live()
        return super().delete(key)

    def sync(self) -> None:
        self._live()
        super().sync()


@contextlib.contextmanager
def opened(folder: Path, life: int | None = None) -> Iterator[FileStore]:
    with contextlib.closing(FileStore(folder) if life is None else Mortal(folder, life)) as store:
        yield store


def fill(folder: Path) -> None:
    """A volume "disk" with data everywhere."""
    with opened(folder) as store:
        create(store, "disk", SIZE, CHUNK)
        volume = open_volume(store, "disk", size=None, chunk_bytes=None, read_only=False)
        ShardedBackend(store, volume).write(Range(0, SIZE), memoryview(b"x" * SIZE))
        store.sync()


def content(folder: Path) -> bytes:
    with opened(folder) as store:
        volume = open_volume(store, "disk", size=None, chunk_bytes=None, read_only=True)
        parts = ShardedBackend(store, volume, read_only=True).read(Range(0, volume.size))
        return b"".join(part if isinstance(part, bytes) else bytes(part.length) for part in parts)  # type: ignore[union-attr]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_cut_off_is_gone_also_when_the_volume_grows_again(tmp_path: Path) -> None:
    fill(tmp_path)
    with opened(tmp_path) as store:
        assert resize(store, "disk", SMALL, may_shrink=True) == (SIZE, 2)
    assert names(tmp_path) == ["disk.0.chunk", "disk.1.chunk", "disk.volume"]
    assert content(tmp_path) == b"x" * SMALL
    with opened(tmp_path) as store:
        assert resize(store, "disk", SIZE, may_shrink=False) == (SMALL, 0)
    assert content(tmp_path) == b"x" * SMALL + bytes(SIZE - SMALL)


@pytest.mark.parametrize("life", range(7))
def test_what_is_cut_off_is_gone_wherever_that_was_interrupted(tmp_path: Path, life: int) -> None:
    """The steps of a shrink: the description, the cut of the last chunk, two deletions, a sync."""
    fill(tmp_path)
    with opened(tmp_path, life) as store, contextlib.suppress(Crash):
        resize(store, "disk", SMALL, may_shrink=True)
        assert life >= 5
    if life == 0:
        assert content(tmp_path) == b"x" * SIZE
        return
    assert content(tmp_path) == b"x" * SMALL
    for more in (CHUNK + 2000, SIZE):
        with opened(tmp_path) as store:
            resize(store, "disk", more, may_shrink=False)
    assert content(tmp_path) == b"x" * SMALL + bytes(SIZE - SMALL)


@pytest.mark.parametrize("life", range(8))
def test_a_deletion_that_was_interrupted_can_be_repeated(tmp_path: Path, life: int) -> None:
    fill(tmp_path)
    with opened(tmp_path, life) as store, contextlib.suppress(Crash):
        assert delete(store, "disk") == 4
        assert life >= 7
    if (tmp_path / "disk.volume").exists():
        with opened(tmp_path) as store:
            delete(store, "disk")
    assert names(tmp_path) == []


def test_a_volume_is_not_made_over_another_or_over_chunks_that_are_left(tmp_path: Path) -> None:
    fill(tmp_path)
    with opened(tmp_path) as store:
        with pytest.raises(UserError, match="disk: there is such a volume already"):
            create(store, "disk", SIZE, None)
        (tmp_path / "old.3.chunk").write_bytes(b"x")
        with pytest.raises(UserError, match=r"old: chunks of that name are there already; .*size="):
            create(store, "old", SIZE, None)
        create(store, "new", SIZE, None)


def test_a_volume_of_nbd_rs_is_resized_and_deleted(tmp_path: Path) -> None:
    (tmp_path / "size").write_text("9000000")
    (tmp_path / "block-2").write_bytes(b"y" * 700_000)
    with opened(tmp_path) as store:
        assert resize(store, "any", 8_388_700, may_shrink=True) == (9_000_000, 0)
    assert (tmp_path / "size").read_text() == "8388700"
    assert (tmp_path / "block-2").read_bytes() == b"y" * 92
    with opened(tmp_path) as store:
        assert delete(store, "any") == 1
    assert names(tmp_path) == []


def test_volumes_are_listed_with_the_room_they_take(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "lone.0.chunk").write_bytes(b"z" * 4096)
    (tmp_path / "bad.volume").write_text("{}")
    (tmp_path / "size").write_text("4096")
    (tmp_path / "disk.note.chunk").touch()
    with opened(tmp_path) as store:
        found = {each.name: each for each in listed(store)}
    assert list(found) == [None, "bad", "disk", "lone"]
    assert found["disk"].volume is not None
    assert (found["disk"].volume.size, found["disk"].stored_bytes) == (SIZE, SIZE)
    assert (found["lone"].volume, found["lone"].stored_bytes, found["lone"].problem) == (None, 4096, "")
    assert "is no description of a volume" in found["bad"].problem
    assert found[None].volume is not None


@pytest.mark.parametrize("act", [delete, lambda store, name: resize(store, name, 2 * SIZE, may_shrink=False)])
def test_a_volume_that_somebody_has_open_is_left_alone(tmp_path: Path, act: object) -> None:
    fill(tmp_path)
    before = names(tmp_path)
    with opened(tmp_path) as first:
        open_volume(first, "disk", size=None, chunk_bytes=None, read_only=True)
        with opened(tmp_path) as second, pytest.raises(UserError, match="is in use by another nbdshard serve"):
            act(second, "disk")  # type: ignore[operator]
    assert names(tmp_path) == before
