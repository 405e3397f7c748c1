"""server/layers/cow.py and overlay.py: a base that stays as it is, and overlays that outlive crashes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server import write_back
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.device import Hole
from nbdshard.server.layers import cow, overlay
from nbdshard.server.layers.cow import Cow
from support import images
from support.backends import Opened, content_of
from support.journals import small_disk

BLOCK = 65_536
SIZE = 8 * BLOCK + 5000
WHOLE = Range(0, SIZE)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return images.random_image(tmp_path / "base", SIZE)


OPENED = Opened()
close = OPENED.close


@pytest.fixture(autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    with OPENED.until_the_end():
        yield


def over(base: Path, more: str = "") -> Backend:
    return OPENED.open(f"cow:file:{base}{more}")


def kept(base: Path) -> Backend:
    return over(base, f"?overlay={base.parent}/overlay")


def test_what_is_written_is_read_back_and_the_base_is_as_it_was(base: Path) -> None:
    before = base.read_bytes()
    expected = bytearray(before)
    backend = over(base)
    for where in (Range(0, 10), Range(BLOCK - 5, 2 * BLOCK + 5), Range(SIZE - 3, SIZE)):
        backend.write(where, memoryview(b"x" * where.length))
        expected[where.start : where.end] = b"x" * where.length
    backend.zero(Range(3 * BLOCK, 4 * BLOCK + 1), may_punch=True, fast=False)
    expected[3 * BLOCK : 4 * BLOCK + 1] = bytes(BLOCK + 1)
    backend.flush()
    assert content_of(backend, WHOLE) == expected
    close(backend)
    assert base.read_bytes() == before
    assert content_of(over(base), WHOLE) == before  # it was thrown away


def test_a_read_only_base_can_be_written_over_and_says_so(base: Path) -> None:
    base.chmod(0o444)
    flags = over(base).flags
    assert not flags & TransmissionFlag.READ_ONLY
    for flag in ("SEND_FLUSH", "SEND_FUA", "SEND_TRIM", "SEND_WRITE_ZEROES", "SEND_FAST_ZERO", "CAN_MULTI_CONN"):
        assert flags & TransmissionFlag[flag], flag
    assert over(base, "?read-only=yes").flags & TransmissionFlag.READ_ONLY


def test_what_is_kept_is_there_again(base: Path) -> None:
    backend = kept(base)
    backend.write(Range(BLOCK + 5, BLOCK + 10), memoryview(b"12345"))
    backend.zero(Range(3 * BLOCK, 4 * BLOCK), may_punch=True, fast=True)
    backend.flush()
    expected = content_of(backend, WHOLE)
    close(backend)
    again = kept(base)
    assert content_of(again, WHOLE) == expected
    close(again)
    for _ in range(2):  # who only reads it is not alone
        assert content_of(over(base, f"?overlay={base.parent}/overlay&read-only=yes"), WHOLE) == expected


def test_holes_are_those_of_the_base_where_nothing_was_written_and_of_the_overlay_elsewhere(tmp_path: Path) -> None:
    base = images.empty_image(tmp_path / "base", 4 * BLOCK)
    with base.open("r+b") as file:
        file.write(b"x" * 2 * BLOCK)
    backend = over(base)
    backend.zero(Range(0, BLOCK), may_punch=True, fast=True)
    backend.write(Range(2 * BLOCK, 3 * BLOCK), memoryview(b"y" * BLOCK))
    found = [(piece.start // BLOCK, piece.end // BLOCK, flags) for piece, flags in backend.extents(Range(0, 4 * BLOCK))]
    hole = STATE_HOLE | STATE_ZERO
    assert found == [(0, 1, hole), (1, 2, 0), (2, 3, 0), (3, 4, hole)]


def test_a_part_of_a_block_of_the_base_is_not_zeroed_fast(base: Path) -> None:
    backend = over(base)
    with pytest.raises(OSError) as caught:
        backend.zero(Range(10, 2 * BLOCK), may_punch=True, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert content_of(backend, WHOLE) == base.read_bytes()


def test_where_no_holes_can_be_punched_zeroes_are_written_but_not_fast(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(overlay, "zero_file", never)
    backend = over(base)
    with pytest.raises(OSError, match="zeroes are written here") as caught:
        backend.zero(Range(0, BLOCK), may_punch=True, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert content_of(backend, WHOLE) == base.read_bytes()
    backend.zero(Range(0, BLOCK + 10), may_punch=True, fast=False)
    assert content_of(backend, WHOLE) == bytes(BLOCK + 10) + base.read_bytes()[BLOCK + 10 :]


def test_a_trim_of_a_part_of_a_block_copies_nothing(base: Path) -> None:
    backend = over(base)
    backend.trim(Range(10, 2 * BLOCK))
    expected = base.read_bytes()
    assert content_of(backend, Range(0, 2 * BLOCK)) == expected[:BLOCK] + bytes(BLOCK)


def test_two_writes_to_a_new_block_both_come_to_be() -> None:
    """They meet while the base is read for the first of them."""

    class Slow(MemoryBackend):
        begun, may_go = threading.Event(), threading.Event()

        def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
            self.begun.set()
            assert self.may_go.wait(30)
            return super().read(where)

    below = Slow(SIZE)
    backend = OPENED.keep(Cow(below, overlay.temporary(SIZE)))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(backend.write, Range(0, 5), memoryview(b"first"))
        assert below.begun.wait(30)
        second = pool.submit(backend.write, Range(10, 16), memoryview(b"second"))
        below.may_go.set()
        first.result(30)
        second.result(30)
    assert content_of(backend, Range(0, 16)) == b"first\0\0\0\0\0second"
    close(backend)


def test_a_full_disk_is_an_error_of_the_write_and_the_block_stays_as_it_was(tmp_path: Path) -> None:
    base = images.random_image(tmp_path / "base", 4 << 20)
    with small_disk(tmp_path / "disk", kib=1024) as folder:
        backend = over(base, f"?overlay={folder}/overlay")
        failed, errors = [], set()
        for block in range(backend.size // BLOCK):
            try:
                backend.write(Range.of(block * BLOCK, BLOCK), memoryview(b"x" * BLOCK))
            except OSError as error:
                failed.append(block)
                errors.add(error.errno)
        assert errors == {errno.ENOSPC}
        backend.flush()  # its map has room
        close(backend)
        again = over(base, f"?overlay={folder}/overlay")
        for block in range(again.size // BLOCK):
            expected = base.read_bytes()[block * BLOCK : (block + 1) * BLOCK] if block in failed else b"x" * BLOCK
            assert content_of(again, Range.of(block * BLOCK, BLOCK)) == expected
        close(again)


# -- overlays that are refused


def test_an_overlay_has_one_owner(base: Path) -> None:
    first = kept(base)
    with pytest.raises(UserError, match="overlay: somebody else has this overlay open"):
        kept(base)
    close(first)
    close(kept(base))


def test_an_overlay_of_another_base_is_refused(base: Path) -> None:
    close(kept(base))
    images.random_image(base, SIZE, seed=2)
    with pytest.raises(UserError, match="is of another base, or its base was changed"):
        kept(base)
    images.random_image(base, SIZE + 1)
    with pytest.raises(UserError, match=f"is of a base of {SIZE} bytes, and this one has {SIZE + 1}"):
        kept(base)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"overlay": 2}, "an overlay of format 2; this nbdshard knows format 1"),
        ({"block_bytes": 1000}, "has blocks of 1000 bytes"),
        ({"block_bytes": 0}, "has blocks of 0 bytes"),
        ({"size": -1}, "is of a base of -1 bytes"),
        ({"colour": "red"}, "is no overlay: Object contains unknown field"),
    ],
)
def test_a_header_that_says_something_else_is_refused(base: Path, change: dict[str, Any], what: str) -> None:
    close(kept(base))
    path = base.parent / "overlay"
    header = json.loads(path.read_bytes()[:4096]) | change
    with path.open("r+b") as file:
        file.write(json.dumps(header).encode().ljust(4096))
    with pytest.raises(UserError, match=what):
        kept(base)


def test_a_file_that_is_none_or_is_cut_off_is_refused(base: Path) -> None:
    path = base.parent / "overlay"
    for content in (b"", b"not at all", bytes(10_000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="overlay: is no overlay: "):
            kept(base)
    path.unlink()
    close(kept(base))
    os.truncate(path, 100_000)
    with pytest.raises(UserError, match="has 100000 bytes instead of"):
        kept(base)


def test_what_cannot_be_made_or_read_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="/nowhere/overlay: cannot be opened: No such file or directory"):
        over(base, "?overlay=/nowhere/overlay")
    with pytest.raises(UserError, match="the base cannot be read: the layer `error` fails this read"):
        open_backend(Wanted("disk", "raw", f"cow:error:file:{base}?overlay={base.parent}/overlay&error=EIO"))
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(UserError, match="/nowhere: no file for the overlay can be made"):
        over(base)


# -- crashes


class PowerLost(Exception):
    """Just before something was made durable."""


class Disk:
    """In the place of `os`: notes what is written to a file since it was last made durable.

    `syncs`: how often it is made durable before the power is lost in the middle of that.
    """

    def __init__(self, path: Path, syncs: int = 1_000_000) -> None:
        self._syncs = syncs
        self.durable = bytearray()
        self.later: list[tuple[int, bytes]] = []
        self._path = path
        self.fails: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, number: int, data: bytes, offset: int) -> int:
        self.later += [(offset + at, bytes(data[at : at + 4096])) for at in range(0, len(data), 4096)]
        return os.pwrite(number, data, offset)

    def zero_file(self, number: int, where: Range, allocated: bool) -> None:
        self.later += [(part.start, bytes(part.length)) for part in where.split(4096)]
        os.pwrite(number, bytes(where.length), where.start)

    def fdatasync(self, number: int) -> None:
        if self.fails is not None:
            failure, self.fails = self.fails, None
            raise failure
        self._syncs -= 1
        if self._syncs < 0:
            raise PowerLost
        os.fdatasync(number)
        self.settle()

    def settle(self) -> None:
        self.durable = bytearray(self._path.read_bytes())
        self.later = []

    def crash(self, chance: random.Random) -> None:
        """The file as a loss of power may leave it: of what was not durable some pages, and some not."""
        left = bytearray(self.durable)
        for offset, data in self.later:
            if chance.random() < 0.5:
                left[offset : offset + len(data)] = data
        self._path.write_bytes(left)


@pytest.mark.parametrize("number", range(20))
def test_a_loss_of_power_leaves_what_was_flushed_and_of_the_rest_what_was_there_at_some_time(
    base: Path, seed: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed * 1000 + number)
    close(kept(base))
    disk = Disk(base.parent / "overlay", syncs=chance.randrange(8))
    disk.settle()
    monkeypatch.setattr(overlay, "os", disk)
    monkeypatch.setattr(write_back, "os", disk)
    monkeypatch.setattr(overlay, "zero_file", disk.zero_file)
    backend = kept(base)
    content = base.read_bytes()
    pages = [[content[at : at + 4096]] for at in range(0, SIZE, 4096)]  # what each may be after a crash
    with contextlib.suppress(PowerLost):
        for _ in range(40):
            first = chance.randrange(len(pages) - 1)
            count = chance.randint(1, min(20, len(pages) - 1 - first))
            where = Range.of(first * 4096, count * 4096)
            if chance.random() < 0.25:
                backend.flush()
                pages = [[page[-1]] for page in pages]
            elif chance.random() < 0.3:
                backend.zero(where, may_punch=True, fast=False)
                for page in pages[first : first + count]:
                    page.append(bytes(4096))
            else:
                data = chance.randbytes(where.length)
                backend.write(where, memoryview(data))
                for at, page in enumerate(pages[first : first + count]):
                    page.append(data[at * 4096 : (at + 1) * 4096])
    close(backend)
    disk.crash(chance)
    monkeypatch.undo()
    again = kept(base)
    found = content_of(again, WHOLE)
    close(again)
    for number, page in enumerate(pages):
        assert found[number * 4096 : (number + 1) * 4096] in page, f"page {number}"


def test_a_write_back_that_failed_is_told_by_every_flush_from_then_on(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = kept(base)
    disk = Disk(base.parent / "overlay")
    disk.fails = OSError(errno.EIO, "the disk is broken")
    monkeypatch.setattr(overlay, "os", disk)
    monkeypatch.setattr(write_back, "os", disk)
    backend.write(Range(0, 10), memoryview(b"0123456789"))
    for _ in range(2):
        with pytest.raises(OSError, match="a write-back of the overlay failed: the disk is broken"):
            backend.flush()
    assert backend.losses == 1
    close(backend)


def test_a_map_that_could_not_be_written_is_written_by_the_next_flush(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Disk):
        def pwrite(self, number: int, data: bytes, offset: int) -> int:
            raise OSError(errno.ENOSPC, "full")

    backend = kept(base)
    backend.write(Range(0, 10), memoryview(b"0123456789"))
    monkeypatch.setattr(overlay, "os", Full(base.parent / "overlay"))
    with pytest.raises(OSError, match="full"):
        backend.flush()
    monkeypatch.undo()
    backend.flush()
    close(backend)
    assert content_of(kept(base), Range(0, 10)) == b"0123456789"


def test_a_very_large_image_has_larger_blocks() -> None:
    big = overlay._header(1 << 50, "")
    assert big.block_bytes > BLOCK and overlay._map_bytes(big) <= overlay.OVERLAY_MAP_BYTES_MAX


def test_samples_of_a_base_are_read_from_both_ends() -> None:
    one, other = MemoryBackend(1 << 20), MemoryBackend(1 << 20)
    assert cow.fingerprint(one) == cow.fingerprint(other)
    for where in (Range(0, 1), Range((1 << 20) - 1, 1 << 20)):
        changed = MemoryBackend(1 << 20)
        changed.write(where, memoryview(b"x"))
        assert cow.fingerprint(changed) != cow.fingerprint(one)
    assert cow.fingerprint(MemoryBackend(10)) != cow.fingerprint(MemoryBackend(11))
