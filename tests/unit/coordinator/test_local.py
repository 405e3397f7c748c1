"""Local files and devices: what is refused, what is touched, and when."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.coordinator import local
from nbdshard.coordinator.local import LocalEnd, Sort

KIB = 1024


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    """Keeps ends until the test is over."""
    with contextlib.ExitStack() as stack:
        yield stack


def source(stack: contextlib.ExitStack, path: Path) -> LocalEnd:
    end = local.open_source(str(path))
    stack.callback(end.close)
    return end


def destination(stack: contextlib.ExitStack, path: Path, of: LocalEnd | None = None) -> LocalEnd:
    end = local.open_destination(str(path), of)
    stack.callback(end.close)
    return end


def identity(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_dev}:{facts.st_ino}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"\x5a" * 5000)
    return path


def test_a_source_file_is_described_by_path_size_and_inode(image: Path, opened: contextlib.ExitStack) -> None:
    end = source(opened, image)
    assert (end.sort, end.size) == (Sort.REGULAR, 5000)
    assert (end.address.kind, end.address.address) == ("file", str(image))
    assert end.address.identity == identity(image)


def test_a_relative_path_is_made_absolute_for_the_workers(
    image: Path, opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    assert source(opened, Path("image")).address.address == str(image)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("none", "none: cannot be opened as the source: No such file or directory"),
        ("folder", "folder: the source is a directory"),
        ("fifo", "fifo: the source is neither a file nor a block device; for a pipe write '-'"),
        ("image/below", "image/below: cannot be opened as the source: Not a directory"),
    ],
)
def test_a_source_that_is_no_file_is_refused_without_waiting(image: Path, name: str, what: str) -> None:
    (image.parent / "folder").mkdir()
    os.mkfifo(image.parent / "fifo")
    with pytest.raises(UserError) as caught:
        local.open_source(str(image.parent / name))
    assert what in str(caught.value)


def test_a_character_device_is_no_source() -> None:
    with pytest.raises(UserError, match="/dev/zero: the source is neither a file nor a block device"):
        local.open_source("/dev/zero")


def test_a_missing_destination_is_created_empty_with_the_umasks_mode(
    tmp_path: Path, opened: contextlib.ExitStack
) -> None:
    before = os.umask(0o027)
    try:
        end = destination(opened, tmp_path / "new")
    finally:
        os.umask(before)
    facts = (tmp_path / "new").stat()
    assert (facts.st_size, facts.st_mode & 0o777) == (0, 0o640)
    assert (end.created, end.grows) == (True, True)


def test_an_existing_destination_stays_as_it_is_until_it_is_prepared(image: Path, opened: contextlib.ExitStack) -> None:
    end = destination(opened, image)
    assert image.read_bytes() == b"\x5a" * 5000
    end.prepare(3000)
    assert image.read_bytes() == bytes(3000)


def test_preparing_makes_a_larger_file_that_reads_as_zeroes_and_takes_no_room(
    image: Path, opened: contextlib.ExitStack
) -> None:
    destination(opened, image).prepare(8 << 20)
    assert image.stat().st_size == 8 << 20
    assert image.stat().st_blocks * 512 < 64 * KIB
    assert image.read_bytes() == bytes(8 << 20)


def test_a_size_the_file_system_cannot_hold_is_told(tmp_path: Path, opened: contextlib.ExitStack) -> None:
    end = destination(opened, tmp_path / "new")
    with pytest.raises(UserError, match=r"new: cannot be given 9223372036854775807 bytes: "):
        end.prepare((1 << 63) - 1)


def test_a_file_created_in_vain_is_removed_and_one_that_was_there_is_not(
    image: Path, tmp_path: Path, opened: contextlib.ExitStack
) -> None:
    new, old = destination(opened, tmp_path / "new"), destination(opened, image)
    new.discard()
    old.discard()
    assert not (tmp_path / "new").exists()
    assert image.read_bytes() == b"\x5a" * 5000


def test_a_file_that_took_the_place_of_ours_is_not_removed(tmp_path: Path, opened: contextlib.ExitStack) -> None:
    end = destination(opened, tmp_path / "new")
    (tmp_path / "other").write_text("precious")
    os.replace(tmp_path / "other", tmp_path / "new")
    end.discard()
    assert (tmp_path / "new").read_text() == "precious"


def test_a_file_that_is_gone_already_is_no_error(
    tmp_path: Path, opened: contextlib.ExitStack, capfd: pytest.CaptureFixture[str]
) -> None:
    end = destination(opened, tmp_path / "new")
    (tmp_path / "new").unlink()
    end.discard()
    assert "cannot be removed again: No such file or directory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("folder", "folder: the destination is a directory"),
        ("none/new", "none/new: cannot be opened as the destination: No such file or directory"),
        ("fifo", "fifo: the destination is neither a file nor a block device; for a pipe write '-'"),
    ],
)
def test_a_destination_that_cannot_be_a_file_is_refused_without_waiting(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError) as caught:
        local.open_destination(str(tmp_path / name), None)
    assert what in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder"]


def test_a_destination_is_never_created_through_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(UserError, match="link: cannot be opened as the destination: File exists"):
        local.open_destination(str(tmp_path / "link"), None)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("how", ["same path", "dot", "symbolic link", "hard link"])
def test_a_destination_that_is_the_source_by_any_name_is_refused_untouched(
    image: Path, opened: contextlib.ExitStack, how: str
) -> None:
    other = image.parent / "other"
    if how == "symbolic link":
        other.symlink_to(image)
    elif how == "hard link":
        other.hardlink_to(image)
    path = {"same path": str(image), "dot": f"{image.parent}/./image"}.get(how, str(other))
    with pytest.raises(UserError, match="source and destination are the same"):
        local.open_destination(path, source(opened, image))
    assert image.read_bytes() == b"\x5a" * 5000


def test_two_copies_of_one_content_are_not_the_same(image: Path, opened: contextlib.ExitStack) -> None:
    shutil.copy(image, image.parent / "twin")
    assert destination(opened, image.parent / "twin", source(opened, image)).size == 5000


# -- standard streams --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def standing_in(number: int, descriptor: int) -> Iterator[None]:
    """`descriptor` in the place of the standard stream `number`."""
    keep = os.dup(number)
    os.dup2(descriptor, number)
    try:
        yield
    finally:
        os.dup2(keep, number)
        os.close(keep)


@contextlib.contextmanager
def open_file(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_pipe_is_a_stream_known_by_its_descriptor() -> None:
    read_end, write_end = os.pipe()
    try:
        with standing_in(0, read_end):
            end = local.standard_input()
        assert (end.sort, end.size) == (Sort.STREAM, None)
        assert (end.address.kind, end.address.address) == ("stream", "0")
        with standing_in(1, write_end):
            end = local.standard_output(None)
        assert (end.sort, end.address.address, end.grows) == (Sort.STREAM, "1", True)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_terminal_is_neither_read_nor_written() -> None:
    control, terminal = os.openpty()
    try:
        with standing_in(0, terminal), pytest.raises(UserError, match="standard input is a terminal"):
            local.standard_input()
        with standing_in(1, terminal), pytest.raises(UserError, match="standard output is a terminal"):
            local.standard_output(None)
    finally:
        os.close(control)
        os.close(terminal)


def test_a_file_redirected_to_standard_input_is_that_file(image: Path, opened: contextlib.ExitStack) -> None:
    with open_file(image, os.O_RDONLY) as descriptor, standing_in(0, descriptor):
        end = local.standard_input()
    opened.callback(end.close)
    assert (end.sort, end.size, end.address.address) == (Sort.REGULAR, 5000, str(image))


def test_a_file_that_was_read_from_already_is_a_stream(image: Path) -> None:
    with open_file(image, os.O_RDONLY) as descriptor, standing_in(0, descriptor):
        os.read(0, 100)
        assert local.standard_input().sort is Sort.STREAM


def test_a_file_without_a_name_is_a_stream(image: Path) -> None:
    with open_file(image, os.O_RDONLY) as descriptor, standing_in(0, descriptor):
        image.unlink()
        assert local.standard_input().sort is Sort.STREAM


def test_a_file_redirected_from_standard_output_is_that_file(tmp_path: Path, opened: contextlib.ExitStack) -> None:
    with open_file(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor, standing_in(1, descriptor):
        end = local.standard_output(None)
    opened.callback(end.close)
    assert (end.sort, end.address.address, end.created) == (Sort.REGULAR, str(tmp_path / "out"), False)


def test_a_file_opened_for_appending_is_a_stream(tmp_path: Path) -> None:
    with open_file(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor, standing_in(1, descriptor):
        assert local.standard_output(None).sort is Sort.STREAM


def test_a_source_that_is_also_appended_to_is_refused(image: Path, opened: contextlib.ExitStack) -> None:
    first = source(opened, image)
    with (
        open_file(image, os.O_WRONLY | os.O_APPEND) as descriptor,
        standing_in(1, descriptor),
        pytest.raises(UserError, match="source and destination are the same"),
    ):
        local.standard_output(first)


@pytest.mark.parametrize(
    ("number", "flags", "line"),
    [(0, os.O_WRONLY, "-: standard input is closed"), (1, os.O_RDONLY, "-: standard output is closed")],
)
def test_a_stream_open_for_the_other_direction_is_refused(image: Path, number: int, flags: int, line: str) -> None:
    with open_file(image, flags) as descriptor, standing_in(number, descriptor), pytest.raises(UserError, match=line):
        local.standard_input() if number == 0 else local.standard_output(None)


def test_a_file_redirected_to_both_sides_is_refused(image: Path, opened: contextlib.ExitStack) -> None:
    first = source(opened, image)
    with (
        open_file(image, os.O_WRONLY) as descriptor,
        standing_in(1, descriptor),
        pytest.raises(UserError, match="source and destination are the same"),
    ):
        local.standard_output(first)


def test_closing_a_stream_leaves_the_standard_descriptor_open() -> None:
    read_end, write_end = os.pipe()
    try:
        with standing_in(0, read_end):
            end = local.standard_input()
            end.close()
            os.fstat(0)
    finally:
        os.close(read_end)
        os.close(write_end)


# -- block devices -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loop_device(backing: Path, *flags: str) -> Iterator[Path]:
    """A loop device on `backing`; the test is skipped where there can be none."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    made = subprocess.run(
        ["losetup", "--find", "--show", *flags, str(backing)], capture_output=True, text=True, timeout=20, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    path = made.stdout.strip()
    try:
        yield Path(path)
    finally:
        subprocess.run(["losetup", "--detach", path], timeout=20, check=True)


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(b"\x11" * (1 << 20))
    return path


def test_a_block_device_has_its_own_size_and_does_not_grow(backing: Path) -> None:
    with loop_device(backing) as device, contextlib.ExitStack() as stack:
        end = destination(stack, device)
        assert (end.sort, end.size, end.grows, end.created) == (Sort.BLOCK, 1 << 20, False, False)
        end.prepare(4096)
        assert backing.read_bytes() == b"\x11" * (1 << 20)


def test_a_block_device_in_use_is_refused(backing: Path) -> None:
    with loop_device(backing) as device, contextlib.ExitStack() as stack:
        destination(stack, device)
        with pytest.raises(UserError, match=f"{device}: is mounted or in use by another program"):
            local.open_destination(str(device), None)


def test_workers_can_open_a_device_which_the_coordinator_holds(backing: Path) -> None:
    with loop_device(backing) as device, contextlib.ExitStack() as stack:
        destination(stack, device)
        with open_file(device, os.O_RDWR):
            pass


def test_a_read_only_block_device_is_refused(backing: Path) -> None:
    with (
        loop_device(backing, "--read-only") as device,
        pytest.raises(UserError, match=r"the destination device is read-only|cannot be written"),
    ):
        local.open_destination(str(device), None)


def test_a_block_device_is_the_same_by_another_node(backing: Path, tmp_path: Path) -> None:
    with loop_device(backing) as device, contextlib.ExitStack() as stack:
        node = tmp_path / "node"
        try:
            os.mknod(node, device.stat().st_mode, device.stat().st_rdev)
            os.close(os.open(node, os.O_RDONLY))
        except PermissionError:
            pytest.skip("device nodes cannot be made or opened here")
        first = source(stack, device)
        with pytest.raises(UserError, match="source and destination are the same"):
            local.open_destination(str(node), first)


def test_a_mounted_device_is_refused(backing: Path, tmp_path: Path) -> None:
    if shutil.which("mke2fs") is None:
        pytest.skip("no mke2fs")
    subprocess.run(["mke2fs", "-q", str(backing)], timeout=20, check=True, capture_output=True)
    with loop_device(backing) as device:
        (tmp_path / "mnt").mkdir()
        mounted = subprocess.run(
            ["mount", str(device), str(tmp_path / "mnt")], capture_output=True, text=True, timeout=20, check=False
        )
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
        try:
            with pytest.raises(UserError, match="is mounted or in use by another program; unmount it first"):
                local.open_destination(str(device), None)
        finally:
            subprocess.run(["umount", str(tmp_path / "mnt")], timeout=20, check=True)
