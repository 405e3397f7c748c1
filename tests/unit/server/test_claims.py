"""One writer, or readers: of a file, a device and a volume, in one process and in several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.server import claims
from nbdshard.server.backends.file import FileBackend
from nbdshard.server.claims import claim, inherit
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import open_volume
from support.devices import loop_device

IN_USE = "is in use by another nbdshard serve; a writer has it alone"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_a_writer_has_a_file_alone(image: Path, first: bool, second: bool) -> None:
    held = claim(image, alone=first)
    with pytest.raises(UserError, match=IN_USE):
        claim(image, alone=second)
    held.close()
    claim(image, alone=second).close()


def test_readers_share_a_file(image: Path) -> None:
    with contextlib.closing(claim(image, alone=False)), contextlib.closing(claim(image, alone=False)):
        pass


def test_another_name_is_no_way_round(image: Path) -> None:
    os.link(image, image.with_name("hard"))
    image.with_name("soft").symlink_to(image)
    with contextlib.closing(FileBackend(image)):
        for name in ("hard", "soft"):
            with pytest.raises(UserError, match=IN_USE):
                FileBackend(image.with_name(name))


def in_a_child(body: Callable[[], bool]) -> bool:
    """Whether `body` says yes in a process forked from here."""
    pid = os.fork()
    if not pid:
        code = 2
        try:
            code = 0 if body() else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) != 2
    return not os.waitstatus_to_exitcode(status)


def can_claim(path: Path) -> bool:
    try:
        claim(path, alone=True)
    except UserError:
        return False
    return True


def test_processes_of_one_server_have_the_claims_of_their_parent_once_each(image: Path) -> None:
    def be_a_process() -> bool:
        if can_claim(image):
            return False
        inherit()
        FileBackend(image)
        return not can_claim(image)  # a second export of it would be a second writer

    with contextlib.closing(FileBackend(image)):
        assert in_a_child(be_a_process)
        assert in_a_child(be_a_process)
        assert not can_claim(image)


def test_a_claim_holds_while_a_process_that_was_forked_has_it(image: Path) -> None:
    held = claim(image, alone=True)
    wait, go = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(go)
        os.read(wait, 1)
        os._exit(0)
    try:
        held.close()
        assert not can_claim(image)
    finally:
        os.close(go)
        os.close(wait)
        os.waitpid(pid, 0)
    claim(image, alone=True).close()


def test_a_file_that_was_replaced_while_it_was_locked_is_not_what_is_claimed(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = image.with_name("other")
    other.write_bytes(b"other")
    lock = claims.fcntl.flock

    def replace(number: int, how: int) -> None:
        if other.exists():
            other.rename(image)
        lock(number, how)

    monkeypatch.setattr(claims.fcntl, "flock", replace)
    held = claim(image, alone=True)
    facts = image.stat()
    assert held.identity == (facts.st_dev, facts.st_ino)
    held.close()


def test_a_device_has_one_writer_whoever_that_is(image: Path) -> None:
    os.truncate(image, 1 << 20)
    with loop_device(image) as device:
        held = claim(Path(device), alone=True)
        with pytest.raises(UserError, match="is mounted or in use by another program; unmount it first"):
            FileBackend(Path(device))
        FileBackend(Path(device), read_only=True).close()  # as for a disk that is mounted
        assert in_a_child(lambda: inherit() is None and can_claim(Path(device)))
        held.close()
        FileBackend(Path(device)).close()


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_volume_has_one_writer(tmp_path: Path, first: bool, second: bool) -> None:
    """`first`, `second`: whether they only read."""
    FileStore(tmp_path).close()
    stores = [FileStore(tmp_path, read_only=read_only) for read_only in (False, first, second)]
    open_volume(stores[0], "disk", size=1 << 20, chunk_bytes=None, read_only=False)
    stores[0].close()
    open_volume(stores[1], "disk", size=None, chunk_bytes=None, read_only=first)
    with pytest.raises(UserError, match=IN_USE):
        open_volume(stores[2], "disk", size=None, chunk_bytes=None, read_only=second)
    open_volume(stores[2], "another", size=1 << 20, chunk_bytes=None, read_only=second)
    stores[1].close()
    stores[2].close()


def test_a_description_that_is_written_anew_takes_the_claim_along(tmp_path: Path) -> None:
    with contextlib.closing(FileStore(tmp_path)) as store, contextlib.closing(FileStore(tmp_path)) as other:
        open_volume(store, "disk", size=1 << 20, chunk_bytes=None, read_only=False)
        store.put("disk.volume", (tmp_path / "disk.volume").read_bytes(), is_new=False)
        with pytest.raises(UserError, match=IN_USE):
            other.claim("disk.volume", alone=False)
