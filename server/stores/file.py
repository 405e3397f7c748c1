"""A directory as a store: an object is a file in it.

Files are kept open, and what was written to them is made durable by the next `sync`, or before they are closed: the
kernel may tell nobody of a write-back that fails when nobody has the file open. What is closed is therefore durable,
or known to be lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.file_calls import NEVER, start_write_back, write_zeroes, zero_file
from nbdshard.common.file_map import FileMap
from nbdshard.common.limits import STORE_FILES_OPEN
from nbdshard.common.nbd.constants import EXPORT_BYTES_MAX
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.prompt_files import PromptFiles
from nbdshard.server.claims import Claim, claim, lock_new

_READ: Final = os.O_RDONLY | os.O_CLOEXEC
_WRITE: Final = os.O_RDWR | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOOKED_AT_BYTES: Final = 1 << 18
_WHOLE: Final = Range(0, EXPORT_BYTES_MAX)
_open_stores: Final[set[int]] = set()  # of this process: they share its descriptors


class FileStore:
    """The files of `folder`, which must be there. Some are kept open (`_files_max`)."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        try:
            self._number = os.open(folder, _FOLDER)
        except FileNotFoundError:
            raise UserError("there is no such directory", str(folder), "make it first") from None
        except NotADirectoryError:
            raise UserError("is no directory", str(folder)) from None
        except OSError as error:
            raise UserError(f"cannot be opened: {error.strerror}", str(folder)) from None
        _open_stores.add(id(self))
        self._folder = folder
        self._prompt = PromptFiles(self._number)
        self._mode = _READ if read_only else _WRITE
        self._files: OrderedDict[str, OpenFile] = OrderedDict()  # the one used last is last
        self._leaving: set[OpenFile] = set()  # not in that table any more, and not closed yet
        self._deletions = 0
        self._lock = threading.Lock()  # of these; never held during a system call
        self._has_changed = False  # the directory, since it was synced
        self._syncing = threading.Lock()  # the directory
        self._lost: dict[str, OSError] = {}  # by key: a write-back that failed, which the kernel tells of once
        self._claims: dict[str, Claim] = {}

    @property
    def losses(self) -> int:
        return len(self._lost)

    def read(self, key: str, where: Range) -> bytes | None:
        file = self._take(key)
        if file is None:
            return None
        try:
            found = os.pread(file.number, where.length, where.start)
            while found and len(found) < where.length:  # a signal, or the end
                piece = os.pread(file.number, where.length - len(found), where.start + len(found))
                if not piece:
                    break
                found += piece
            return found
        finally:
            self._let_go(file)

    def write(self, key: str, where: Range, data: memoryview) -> None:
        file = self.take_to_write(key)
        try:
            at = os.pwrite(file.number, data, where.start)
            while at < where.length:
                at += os.pwrite(file.number, data[at:], where.start + at)
        finally:
            self.take_back(file)

    # -- without waiting: see PromptFiles, and ShardedFiles for what it is used for

    def is_open(self, key: str, where: Range | None = None) -> bool:
        """Whether its file is open, and, if asked for, `where` of it at hand."""
        if where is None:
            return key in self._files
        file = self._take_open(key)
        if file is None:
            return False
        try:
            return self._prompt.is_ready(file.number, where)
        finally:
            self._let_go(file)

    def may_open(self, key: str) -> bool:
        """Whether its file is open, or would be without another one's being closed, and synced, for it."""
        return key in self._files or len(self._files) < self._files_max()

    def read_now(self, key: str, where: Range) -> memoryview | None:
        """All of `where`; None where the file is not open, ends before, or would have to be waited for."""
        file = self._take_open(key)
        if file is None:
            return None
        try:
            return self._prompt.read(file.number, where)
        finally:
            self._let_go(file)

    @contextlib.contextmanager
    def reading(self, key: str, where: Range) -> Iterator[int | None]:
        """A descriptor, for as long as the block lasts, of which `where` is read without waiting; or None."""
        file = self._take_open(key)
        if file is None:
            yield None
            return
        try:
            is_all_there = os.fstat(file.number).st_size >= where.end
            yield file.number if is_all_there and self._prompt.is_ready(file.number, where) else None
        finally:
            self._let_go(file)

    def take_to_write(self, key: str) -> OpenFile:
        """Its file, made if need be, by the only one who changes the object: to be followed by `take_back`."""
        file = self._take(key, changes=True) or self._take(key, changes=True, make=True)
        assert file is not None
        return file

    def take_back(self, file: OpenFile) -> None:
        """It was written to, or that was tried."""
        file.is_dirty = True  # now, not before: a sync in between would take it for its own
        self._let_go(file)

    # -- what changes more than bytes

    def put(self, key: str, data: bytes, *, is_new: bool) -> None:
        """Under another name first, so that it is there whole or not at all."""
        aside = f"{key}.{os.getpid()}.new"
        folder = self._number
        number = os.open(aside, _WRITE | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
        try:
            at = 0
            while at < len(data):
                at += os.write(number, data[at:])
            os.fsync(number)
            if is_new:
                os.link(aside, key, src_dir_fd=folder, dst_dir_fd=folder)
                os.unlink(aside, dir_fd=folder)
            else:
                held = lock_new(os.dup(number)) if key in self._claims else None  # before anybody finds it
                os.rename(aside, key, src_dir_fd=folder, dst_dir_fd=folder)
                if held is not None:
                    self._claims.pop(key).close()
                    self._claims[key] = held
            os.fsync(folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside, dir_fd=folder)
            raise
        finally:
            os.close(number)
            self._forget(key)

    def zero(self, key: str, where: Range, *, fast: bool = False) -> bool:
        file = self._take(key, changes=True)
        if file is None:
            return False
        try:
            size = os.fstat(file.number).st_size
            if where.start == 0 and where.end >= size:
                return False
            if where.start < size:
                _zero(file.number, Range(where.start, min(where.end, size)), fast=fast)
            return _has_data(file.number)
        finally:
            self.take_back(file)

    def cut(self, key: str, length: int) -> None:
        file = self._take(key, changes=True)
        if file is None:
            return
        try:
            if os.fstat(file.number).st_size > length:
                os.ftruncate(file.number, length)
        finally:
            self.take_back(file)

    def delete(self, key: str) -> bool:
        try:
            os.unlink(key, dir_fd=self._number)
        except FileNotFoundError:
            return False
        finally:
            self._has_changed = True
        self._forget(key)
        return True

    def sync(self) -> None:
        """Files, and then the directory: without that a new file may be gone after a crash, or a deleted one back."""
        with self._lock:
            # Of many files few are written to between two flushes. One that another flush has begun with is waited for.
            files = [file for file in self._files.values() if file.is_dirty or file.syncing.locked()]
            leaving = list(self._leaving)  # their last users sync them
            held = [file for file in (*files, *leaving) if file.users]
            for file in held:
                file.users += 1
        try:
            dirty = [file for file in held if file.is_dirty and not file.is_gone]
            if len(dirty) > 1:
                for file in dirty:  # so that the device has all of it to do at once
                    with contextlib.suppress(OSError):
                        start_write_back(file.number, _WHOLE)
            for file in (*files, *leaving):
                if not file.is_gone:
                    self._sync_file(file)
        finally:
            for file in held:
                self._let_go(file)
        self._sync_folder()
        self._check_folder()
        if self._lost:
            key, lost = next(iter(self._lost.items()))
            raise OSError(lost.errno, f"a write-back of {key} failed: {lost.strerror}")

    def _sync_file(self, file: OpenFile) -> None:
        """Never raises: what failed is in the table of what is lost, before anybody else can find the file clean."""
        with file.syncing:
            if not file.is_dirty:
                return
            file.is_dirty = False
            try:
                os.fdatasync(file.number)
            except OSError as error:
                self._lost.setdefault(file.key, error)

    def _sync_folder(self) -> None:
        with self._syncing:
            if not self._has_changed:
                return
            self._has_changed = False
            try:
                os.fsync(self._number)
            except OSError as error:
                self._lost.setdefault("the directory", error)

    def extents(self, key: str, where: Range) -> Extents | None:
        file = self._take(key)
        if file is None:
            return None
        try:
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
        finally:
            self._let_go(file)

    @property
    def can_list(self) -> bool:
        return True

    def keys(self) -> Iterator[str]:
        return (entry.name for entry in self._entries())

    def stored(self) -> Iterator[tuple[str, int]]:
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                yield entry.name, entry.stat().st_blocks * 512

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        number = os.open(".", _FOLDER, dir_fd=self._number)  # with a place in it of its own
        try:
            with os.scandir(number) as entries:
                yield from entries
        finally:
            os.close(number)

    def claim(self, key: str, *, alone: bool) -> None:
        self._claims[key] = claim(self._folder / key, alone=alone)

    def close(self) -> None:
        _open_stores.discard(id(self))
        with self._lock:
            files, self._files = list(self._files.values()), OrderedDict()
            self._leaving.update(files)
            number, self._number = self._number, -1
        for file in files:
            self._let_go(file)
        for held in self._claims.values():
            held.close()
        self._claims.clear()
        if number >= 0:
            os.close(number)

    # -- open files

    def _take_open(self, key: str) -> OpenFile | None:
        """As `_take`, where the file is open already."""
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                file.users += 1
            return file

    def _take(self, key: str, *, changes: bool = False, make: bool = False) -> OpenFile | None:
        """The file of `key`, not to be closed before it is let go; None where there is none and none is to be made.

        `changes`: by the only one who changes it, so nobody deletes it meanwhile.
        """
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
                file.users += 1
                return file
            deletions = self._deletions
        try:
            number = self._opened(key, self._mode | (os.O_CREAT if make else 0))
        except FileNotFoundError:
            self._check_folder()
            return None
        if make:
            self._has_changed = True
        file, old = OpenFile(number, key), None
        with self._lock:
            there = self._files.get(key)
            if there is not None:
                there.users += 1
            elif changes or deletions == self._deletions:  # else it may have no name any more: a reader's own
                self._files[key] = file
                file.users += 1
                if len(self._files) > self._files_max():
                    _, old = self._files.popitem(last=False)
                    self._leaving.add(old)
        if old is not None:
            self._let_go(old)
        if there is not None:
            os.close(number)
            return there
        return file

    def _files_max(self) -> int:
        """How many may stay open: its share of half the descriptors that there are, for clients need some, too."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return min(STORE_FILES_OPEN, max(descriptors // 2 // max(len(_open_stores), 1), 1))

    def _check_folder(self) -> None:
        """Raises OSError where the directory was removed: then nothing is known of what was in it."""
        if not os.fstat(self._number).st_nlink:
            raise OSError(errno.ENOENT, f"{self._folder} was removed")

    def _opened(self, key: str, flags: int) -> int:
        """Where there are no descriptors left, files that nobody uses are closed first."""
        while True:
            try:
                return os.open(key, flags, 0o666, dir_fd=self._number)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                with self._lock:
                    idle = [key for key, file in self._files.items() if file.users == 1]
                    closing = [self._files.pop(key) for key in idle[: len(idle) // 2 + 1]]
                    self._leaving.update(closing)
                if not closing:
                    raise
            for file in closing:
                self._let_go(file)

    def _let_go(self, file: OpenFile) -> None:
        with self._lock:
            file.users -= 1
            if file.users:
                return
        if not file.is_gone:
            self._sync_file(file)
        with self._lock:
            self._leaving.discard(file)
        os.close(file.number)

    def _forget(self, key: str) -> None:
        """The file that was open under this name, if any, has it no more."""
        with self._lock:
            self._deletions += 1  # who has opened it by now, and is not in the table yet, does not come into it
            file = self._files.pop(key, None)
            if file is None:
                return
            file.is_gone = True
        self._let_go(file)


class OpenFile:
    """An open file, closed when its last user lets it go; the table it is in is one of them."""

    __slots__ = ("is_dirty", "is_gone", "key", "number", "syncing", "users")

    def __init__(self, number: int, key: str) -> None:
        self.number = number
        self.key = key
        self.users = 1
        self.is_dirty = False  # something was written, and not synced
        self.is_gone = False  # it has no name any more, so nothing of it is to be kept
        self.syncing = threading.Lock()


def is_zero_part(number: int, where: Range) -> bool:
    """Whether all of `where`, which was just written, is zeroes: nearly always a byte or two say that it is not."""
    if os.pread(number, 1, where.end - 1) != b"\0" or os.pread(number, 1, where.start) != b"\0":
        return False
    pieces = (os.pread(number, piece.length, piece.start) for piece in where.split(_LOOKED_AT_BYTES))
    return all(piece == bytes(len(piece)) for piece in pieces)


def _zero(number: int, where: Range, *, fast: bool) -> None:
    try:
        zero_file(number, where, False)
    except OSError as error:
        if error.errno not in NEVER:
            raise
        if fast:
            raise OSError(errno.ENOTSUP, "zeroes are written here") from None
        write_zeroes(number, where)


def _has_data(number: int) -> bool:
    try:
        os.lseek(number, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno != errno.ENXIO  # lseek(2): no data between here and the end
    return True
