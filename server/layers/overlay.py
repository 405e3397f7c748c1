"""The file of an overlay: blocks of an image that have become others than those of its base, and which they are.

::

    0        4096           first_block                 first_block + size
    | header | map of bits  | the blocks, where they are in the image; the file is a hole where there are none

The header is JSON, with what the base was known by. It is written before the file has its name, and never changed. A
bit of the map says that the block is here. It is written only when the block's data is durable: so whatever is left of
the map after a crash, old or new or some of either, every block that it names is whole. No bit is ever taken back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.file_calls import NEVER, write_zeroes, zero_file
from nbdshard.common.file_map import FileMap
from nbdshard.common.limits import OVERLAY_BLOCK_BYTES, OVERLAY_MAP_BYTES_MAX
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.write_back import WriteBack

_HEADER_BYTES: Final = 4096
_PAGE_BYTES: Final = 4096  # of the map, written at a time
_FORMAT: Final = 1


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`size`, `base`: of the base, its length in bytes and what was found in it (`cow.fingerprint`)."""

    overlay: int  # the format's number
    size: int
    block_bytes: int
    base: str


class Overlay:
    """An open file of the layout above, `number`, whose owner this is. `bits`: the map, as it is in the file.

    Any thread may call; who adds blocks sees to it that nobody else does anything with them.
    """

    def __init__(self, number: int, header: Header, bits: bytearray, *, is_kept: bool) -> None:
        self.block_bytes = header.block_bytes
        self._size = header.size
        self._number = number
        self._bits = bits
        self._first = _first_block(header)
        self._is_kept = is_kept
        self._changed: set[int] = set()  # pages of the map that are not in the file yet
        self._lock = threading.Lock()  # of the map
        self._syncing = threading.Lock()
        self._map = FileMap(number)
        self._write_back = WriteBack(number, "a write-back of the overlay")

    @property
    def losses(self) -> int:
        """As a Backend's."""
        return self._write_back.losses

    # -- the map ------------------------------------------------------------------------------------------------------

    def has(self, block: int) -> bool:
        """Whether the block is here, and not what the base says."""
        return bool(self._bits[block >> 3] & 1 << (block & 7))

    def add(self, blocks: range) -> None:
        """They are here, whole: their data has been written."""
        with self._lock:
            for block in blocks:
                self._bits[block >> 3] |= 1 << (block & 7)
                self._changed.add((block >> 3) // _PAGE_BYTES)

    def runs(self, where: Range) -> Iterator[tuple[Range, bool]]:
        """Parts of `where` that are here (True), and that are not."""
        first, last = where.start // self.block_bytes, (where.end - 1) // self.block_bytes
        while first <= last:
            is_here, end = self.has(first), first + 1
            while end <= last and self.has(end) is is_here:
                end += 1
            yield Range(max(where.start, first * self.block_bytes), min(where.end, end * self.block_bytes)), is_here
            first = end

    # -- blocks -------------------------------------------------------------------------------------------------------

    def read(self, where: Range) -> memoryview:
        """What is here."""
        view, at = memoryview(bytearray(where.length)), 0
        while at < where.length:
            count = os.preadv(self._number, [view[at:]], self._first + where.start + at)
            if not count:
                raise OSError(errno.EIO, "the overlay has become shorter")
            at += count
        return view

    def write(self, where: Range, data: memoryview) -> None:
        """Put `data` there; `add` says so, if it has to be said."""
        at = 0
        while at < where.length:
            at += os.pwrite(self._number, data[at:], self._first + where.start + at)

    def zero(self, where: Range, *, may_punch: bool, may_write: bool = True) -> bool:
        """Make it zeroes, as `write` does; False: they would have to be written, and may not."""
        there = Range(self._first + where.start, self._first + where.end)
        try:
            zero_file(self._number, there, not may_punch)
        except OSError as error:
            if error.errno not in NEVER:
                raise
            if not may_write:
                return False
            write_zeroes(self._number, there)
        return True

    def extents(self, where: Range) -> Extents:
        """Data and holes of what is here, as far as they are known."""
        try:
            found = self._map.find(Range(self._first + where.start, self._first + where.end))
        except OSError:
            return [(where, 0)]  # the file system has no SEEK_HOLE: everything is data
        return [(Range(piece.start - self._first, piece.end - self._first), flags) for piece, flags in found]

    def sync(self) -> None:
        """Make durable what was written before: the blocks, and only then the map that names them.

        The kernel tells once of a write-back that failed: from then on none succeeds here.
        """
        with self._syncing:
            with self._lock:
                pages = {
                    page: bytes(self._bits[page * _PAGE_BYTES : (page + 1) * _PAGE_BYTES]) for page in self._changed
                }
            self._write_back.sync()
            if self._is_kept and pages:
                for page, content in pages.items():
                    _write_all(self._number, content, _HEADER_BYTES + page * _PAGE_BYTES)
                self._write_back.sync()
                with self._lock:
                    self._changed -= {
                        page
                        for page, content in pages.items()
                        if self._bits[page * _PAGE_BYTES : (page + 1) * _PAGE_BYTES] == content
                    }

    def close(self) -> None:
        """Nothing is asked any more."""
        os.close(self._number)


def temporary(size: int) -> Overlay:
    """One that is gone when it is closed, on the disk that is for such things. Raises UserError."""
    folder = os.environ.get("TMPDIR", "/var/tmp")
    header = _header(size, "")
    try:
        with tempfile.TemporaryFile(buffering=0, dir=folder) as file:
            number = os.dup(file.fileno())
        os.ftruncate(number, _first_block(header) + size)
    except OSError as error:
        raise UserError(f"no file for the overlay can be made: {error.strerror}", folder) from None
    return Overlay(number, header, bytearray(_map_bytes(header)), is_kept=False)


def kept(path: Path, size: int, base: str, *, read_only: bool) -> Overlay:
    """The overlay at `path`, of a base of `size` bytes that is known by `base`; a new one where there is none.

    Raises UserError, also where somebody else has it open to write, or it is the overlay of another base.
    """
    number = None
    try:
        if not path.exists() and not read_only:
            _make(path, _header(size, base))
        number = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        fcntl.flock(number, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        header = _read_header(number, path)
        _check(header, size, base, os.fstat(number).st_size, path)
        bits = bytearray(os.pread(number, _map_bytes(header), _HEADER_BYTES))
    except BaseException as error:
        if number is not None:
            os.close(number)
        if isinstance(error, BlockingIOError):
            raise UserError("somebody else has this overlay open", str(path), "an overlay has one owner") from None
        if isinstance(error, OSError):
            raise UserError(f"cannot be opened: {error.strerror}", str(path)) from None
        raise
    return Overlay(number, header, bits, is_kept=not read_only)


def _make(path: Path, header: Header) -> None:
    """Whole before it has its name, whatever happens meanwhile; nothing, if somebody else made one."""
    number, fresh = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".new", dir=path.parent)
    try:
        text = msgspec.json.encode(header)
        _write_all(number, text.ljust(_HEADER_BYTES, b"\n"), 0)
        os.posix_fallocate(number, _HEADER_BYTES, _map_bytes(header))  # so that the map finds room on a full disk
        os.ftruncate(number, _first_block(header) + header.size)
        os.fsync(number)
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        os.close(number)
        os.unlink(fresh)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_header(number: int, path: Path) -> Header:
    try:
        header = msgspec.json.decode(os.pread(number, _HEADER_BYTES, 0), type=Header)
    except msgspec.MsgspecError as error:
        raise UserError(f"is no overlay: {error}", str(path)) from None
    if header.overlay != _FORMAT:
        raise UserError(f"an overlay of format {header.overlay}; this nbdshard knows format {_FORMAT}", str(path))
    return header


def _check(header: Header, size: int, base: str, found_bytes: int, path: Path) -> None:
    if header.size != size:
        raise UserError(f"is of a base of {header.size} bytes, and this one has {size}", str(path))
    if header.base != base:
        raise UserError("is of another base, or its base was changed", str(path), "what it holds would not fit")
    is_power = header.block_bytes & (header.block_bytes - 1) == 0
    if header.block_bytes < 512 or not is_power or _map_bytes(header) > OVERLAY_MAP_BYTES_MAX:
        raise UserError(f"has blocks of {header.block_bytes} bytes", str(path))
    if found_bytes != _first_block(header) + size:
        raise UserError(f"has {found_bytes} bytes instead of {_first_block(header) + size}", str(path))


def _header(size: int, base: str) -> Header:
    block_bytes = OVERLAY_BLOCK_BYTES
    while size > block_bytes * 8 * OVERLAY_MAP_BYTES_MAX:
        block_bytes *= 2
    return Header(_FORMAT, size, block_bytes, base)


def _map_bytes(header: Header) -> int:
    """Whole pages, and one at least."""
    bits = -(-header.size // header.block_bytes)
    return max(-(-bits // 8 // _PAGE_BYTES), 1) * _PAGE_BYTES


def _first_block(header: Header) -> int:
    """Where the blocks begin."""
    return -(-(_HEADER_BYTES + _map_bytes(header)) // header.block_bytes) * header.block_bytes


def _write_all(number: int, data: bytes, offset: int) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(number, data[at:], offset + at)
