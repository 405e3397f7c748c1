"""A directory as a store: an object is a file in it."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.file_calls import NEVER, zero_file
from nbdshard.common.file_map import FileMap
from nbdshard.common.limits import STORE_FILES_OPEN
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range

_READ: Final = os.O_RDONLY | os.O_CLOEXEC
_WRITE: Final = os.O_RDWR | os.O_CLOEXEC


class FileStore:
    """The files of `folder`, which must be there. Files are kept open, STORE_FILES_OPEN of them at most."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        if not folder.is_dir():
            raise UserError("is no directory", str(folder))
        self._folder = folder
        self._mode = _READ if read_only else _WRITE
        self._files: OrderedDict[str, _File] = OrderedDict()  # the one used last is last
        self._lock = threading.Lock()
        self._lost: dict[str, OSError] = {}  # by key: a write-back that failed, which the kernel tells of once

    @property
    def losses(self) -> int:
        return len(self._lost)

    def read(self, key: str, where: Range) -> bytes | None:
        with self._open(key) as file:
            if file is None:
                return None
            found = bytearray()
            while len(found) < where.length:
                piece = os.pread(file.number, where.length - len(found), where.start + len(found))
                if not piece:
                    break
                found += piece
            return bytes(found)

    def write(self, key: str, where: Range, data: memoryview) -> None:
        with self._open(key, make=True) as file:
            assert file is not None
            file.is_dirty = True
            at = 0
            while at < where.length:
                at += os.pwrite(file.number, data[at:], where.start + at)

    def zero(self, key: str, where: Range) -> bool:
        with self._open(key) as file:
            if file is None:
                return False
            end = min(where.end, os.fstat(file.number).st_size)
            if where.start < end:
                file.is_dirty = True
                _zero(file.number, Range(where.start, end))
            return _has_data(file.number)

    def delete(self, key: str) -> None:
        with self._lock:  # both at once: who opened it in between would keep, and write to, a file that has no name
            with contextlib.suppress(FileNotFoundError):
                (self._folder / key).unlink()
            file = self._files.pop(key, None)
        if file is not None:
            file.let_go()

    def sync(self, keys: Collection[str]) -> None:
        """Files, and then the directory: without that a new file may be gone after a crash, or a deleted one back."""
        for key in keys:
            with self._open(key) as file:
                if file is not None:
                    file.is_dirty = False
                    file.sync()
            if (lost := self._lost.get(key)) is not None:
                raise OSError(lost.errno, f"a write-back of {key} failed: {lost.strerror}")
        number = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)

    def extents(self, key: str, where: Range) -> Extents | None:
        with self._open(key) as file:
            if file is None:
                return None
            size = os.fstat(file.number).st_size
            if where.start >= size:
                return []
            end = min(where.end, size)
            try:
                found = FileMap(file.number).find(Range(where.start, end))
            except OSError:
                return [(where, 0)]  # the file system has no SEEK_HOLE: everything is data
            told = found[-1][0].end
            if told < end:  # there are more than a map tells at once; what is left out would be taken for a hole
                found.append((Range(told, end), 0))
            return found

    def keys(self) -> Iterator[str]:
        return (entry.name for entry in os.scandir(self._folder) if entry.is_file())

    def close(self) -> None:
        with self._lock:
            files, self._files = list(self._files.values()), OrderedDict()
        for file in files:
            file.let_go()

    @contextlib.contextmanager
    def _open(self, key: str, *, make: bool = False) -> Iterator[_File | None]:
        """The file of `key`, not to be closed meanwhile; None where there is none and none is to be made."""
        with self._lock:
            file = self._files.get(key)
            if file is None:
                try:
                    number = os.open(self._folder / key, self._mode | (os.O_CREAT if make else 0), 0o666)
                except FileNotFoundError:
                    file = None
                else:
                    file = self._files[key] = _File(number, key, self._lost)
            if file is not None:
                self._files.move_to_end(key)
                file.users += 1
            old = self._files.popitem(last=False)[1] if len(self._files) > STORE_FILES_OPEN else None
        if old is not None:
            old.let_go()
        try:
            yield file
        finally:
            if file is not None:
                file.let_go()


class _File:
    """An open file, closed when its last user lets it go; the table it is in is one of them.

    The kernel may tell nobody of a write-back that fails when the file is closed: so it is waited for first.
    """

    def __init__(self, number: int, key: str, lost: dict[str, OSError]) -> None:
        self.number = number
        self.users = 1
        self.is_dirty = False
        self._key = key
        self._lost = lost
        self._lock = threading.Lock()

    def let_go(self) -> None:
        with self._lock:
            self.users -= 1
            is_last = not self.users
        if is_last:
            if self.is_dirty:
                self.sync()
            os.close(self.number)

    def sync(self) -> None:
        """Never raises: what failed is in the table of what is lost, for good."""
        try:
            os.fdatasync(self.number)
        except OSError as error:
            self._lost[self._key] = error


def _zero(number: int, where: Range) -> None:
    try:
        zero_file(number, where, False)
    except OSError as error:
        if error.errno not in NEVER:
            raise
        at = where.start
        while at < where.end:
            at += os.pwrite(number, bytes(min(where.end - at, 1 << 20)), at)


def _has_data(number: int) -> bool:
    try:
        os.lseek(number, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno != errno.ENXIO  # lseek(2): no data between here and the end
    return True
