"""worker/files.py on block devices: loop devices, which only root can make."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.common import file_calls
from nbdshard.common.limits import CACHE_WINDOW_BYTES, MIB
from nbdshard.common.ranges import Range
from support.local_driver import RINGS, Driver, driver, file_address

SIZE = 16 * MIB
COMMAND_SECONDS = 30.0


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_SECONDS).stdout.strip()


@contextlib.contextmanager
def loop_device(backing: Path, sector: int = 512) -> Iterator[Path]:
    """A block device over the file `backing`."""
    if os.geteuid() != 0:
        pytest.skip("only root can make loop devices")
    try:
        device = run("losetup", "--find", "--show", "--sector-size", str(sector), backing)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Device = Callable[[int], Path]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """Makes a block device of SIZE bytes, all 0xff, over the file `backing`."""
    with contextlib.ExitStack() as stack:

        def made(sector: int = 512) -> Path:
            (tmp_path / "backing").write_bytes(b"\xff" * SIZE)
            return stack.enter_context(loop_device(tmp_path / "backing", sector))

        yield made


@contextlib.contextmanager
def connected(ring: str, path: Path, side: str) -> Iterator[Driver]:
    with driver(ring, file_address(path), side) as one:  # type: ignore[arg-type]
        one.open()
        yield one


def test_a_device_is_as_large_as_it_is_and_has_no_extents(device: Device, ring: str) -> None:
    with connected(ring, device(512), "source") as source:
        found = source.description
        assert (found.size, found.can_extents, found.can_zero, found.block_minimum) == (SIZE, False, True, 1)
        assert source.extents(5, 1000) == [(Range(5, 1005), 0)]


def test_a_device_is_read_and_written_at_any_byte(device: Device, ring: str) -> None:
    path = device(4096)
    data = random.Random(1).randbytes(MIB + 1)
    with connected(ring, path, "destination") as destination:
        assert destination.write(12345, data).error is None
        assert destination.flush().error is None
    with connected(ring, path, "source") as source:
        assert source.read(12344, MIB + 3) == b"\xff" + data + b"\xff"


@pytest.mark.parametrize("allocated", [False, True], ids=["hole", "allocated"])
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize(
    "where",
    [
        Range(0, SIZE),
        Range(4096, 12288),
        Range(1000, SIZE - 999),
        Range(1, 3),
        Range(511, 513),
        Range(4000, 4200),
        Range(SIZE - 100, SIZE),
    ],
    ids=str,
)
def test_zeroes_may_begin_and_end_inside_a_sector(device: Device, where: Range, sector: int, allocated: bool) -> None:
    path = device(sector)
    with connected("epoll", path, "destination") as destination:
        assert destination.zero(where.start, where.length, allocated=allocated).error is None
        assert destination.flush().error is None
    assert path.read_bytes() == b"\xff" * where.start + bytes(where.length) + b"\xff" * (SIZE - where.end)


def test_zeroes_without_a_hole_stay_allocated_and_holes_do_not(device: Device, tmp_path: Path, ring: str) -> None:
    with connected(ring, device(512), "destination") as destination:
        destination.zero(0, SIZE, allocated=True)
        destination.flush()
        kept = (tmp_path / "backing").stat().st_blocks
        destination.zero(0, SIZE, allocated=False)
        destination.flush()
        assert (kept * 512, (tmp_path / "backing").stat().st_blocks) == (SIZE, 0)


def test_a_device_that_cannot_discard_is_zeroed_all_the_same(
    device: Device, ring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_calls, "_discards", lambda *_: False)
    path = device(512)
    with connected(ring, path, "destination") as destination:
        assert destination.zero(0, SIZE, allocated=False).error is None
        assert destination.flush().error is None
    assert path.read_bytes() == bytes(SIZE)


@contextlib.contextmanager
def small_tmpfs(folder: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder.mkdir()
    try:
        run("mount", "-t", "tmpfs", "-o", "size=4m", "none", folder)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount here: {error}")
    try:
        yield folder
    finally:
        run("umount", folder)


def test_a_write_back_that_failed_behind_our_back_fails_the_flush(tmp_path: Path, ring: str) -> None:
    """Hints start the write-back long before the flush, and must not swallow what becomes of it."""
    with small_tmpfs(tmp_path / "small") as folder:
        backing = folder / "backing"
        backing.touch()
        os.truncate(backing, 64 * MIB)
        with loop_device(backing) as path, connected(ring, path, "destination") as destination:
            # Whole windows only: then nothing is left whose failure the flush could meet anew.
            data = random.Random(2).randbytes(CACHE_WINDOW_BYTES)
            for n in range(3):
                assert destination.write(n * CACHE_WINDOW_BYTES, data).error is None
            cache = destination.connection._cache  # type: ignore[attr-defined]
            destination.until("the hints to be over", lambda: not cache.busy)
            error = destination.flush().error
            assert error is not None
            assert error.errno_name in ("EIO", "ENOSPC")
