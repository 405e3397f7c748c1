"""A regular file or a block device as an export: what is there is there, in the file's own layout."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from nbdshard.common.errors import UserError
from nbdshard.common.file_calls import NEVER, write_zeroes, zero_device, zero_file
from nbdshard.common.file_map import FileMap
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import READS, WRITES, Place
from nbdshard.server.backends.prompt_files import PromptFiles
from nbdshard.server.claims import claim
from nbdshard.server.device import Hole
from nbdshard.server.write_back import WriteBack


class FileBackend:
    """The file at `path`, open for as long as the backend is. Raises UserError where it cannot be opened."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        try:
            self._claim = claim(path, alone=not read_only)
            try:
                mode = os.fstat(self._claim.number).st_mode
                self._is_device = stat.S_ISBLK(mode)
                if not self._is_device and not stat.S_ISREG(mode):  # to open a FIFO would wait for who writes to it
                    raise UserError("is neither a regular file nor a block device", str(path))
                self._number = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            except BaseException:
                self._claim.close()
                raise
        except OSError as error:
            raise UserError(f"cannot be opened: {error.strerror}", str(path)) from None
        found = os.fstat(self._number)
        self.size = os.lseek(self._number, 0, os.SEEK_END)
        self.flags = READS | (TransmissionFlag.READ_ONLY if read_only else WRITES)
        self.block_size = max(found.st_blksize, 512)
        self._map = FileMap(self._number)
        self._prompt = PromptFiles(self._number)
        self._flushing = threading.Lock()
        self._write_back = WriteBack(self._number, "a write-back")

    @property
    def losses(self) -> int:
        return self._write_back.losses

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        data = bytearray(where.length)
        view, at = memoryview(data), 0
        while at < where.length:
            count = os.preadv(self._number, [view[at:]], where.start + at)
            if not count:
                raise OSError(errno.EIO, "the file has become shorter")
            at += count
        return (view,)

    def write(self, where: Range, data: memoryview) -> None:
        at = 0
        while at < where.length:
            at += os.pwrite(self._number, data[at:], where.start + at)

    # -- without waiting: see Prompt and Direct

    def read_now(self, where: Range) -> Sequence[memoryview] | None:
        view = self._prompt.read(self._number, where)
        return None if view is None else (view,)  # where it is short, `read` will tell

    def write_now(self, where: Range, data: memoryview) -> bool:
        if (where.start | where.length) % mmap.PAGESIZE and not self._prompt.is_ready(self._number, where):
            return False  # the rest of a page would have to be read first
        self.write(where, data)
        return True

    def is_direct(self, where: Range, *, to_write: bool) -> bool:
        return True

    def reading(self, where: Range) -> AbstractContextManager[Place | None]:
        if self._prompt.is_ready(self._number, where):
            return Place(self._number, where.start)
        return contextlib.nullcontext(None)

    def writing(self, where: Range, *, is_all: bool) -> AbstractContextManager[Place]:
        return Place(self._number, where.start)

    # -- what changes more than bytes

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        try:
            (zero_device if self._is_device else zero_file)(self._number, where, not may_punch)
        except OSError as error:
            if error.errno not in NEVER:
                raise
            if fast:
                raise OSError(errno.ENOTSUP, "zeroes are written here") from None
            write_zeroes(self._number, where)

    def trim(self, where: Range) -> None:
        try:
            (zero_device if self._is_device else zero_file)(self._number, where, False)
        except OSError as error:
            if error.errno not in NEVER:
                raise  # a hint that cannot be followed is no error; one that fails is

    def cache(self, where: Range) -> None:
        os.posix_fadvise(self._number, where.start, where.length, os.POSIX_FADV_WILLNEED)

    def flush(self) -> None:
        with self._flushing:
            self._write_back.sync()

    def extents(self, where: Range) -> Extents:
        if self._is_device:
            return [(where, 0)]
        try:
            return self._map.find(where)
        except OSError:
            return [(where, 0)]  # the file system has no SEEK_HOLE: everything is data

    def close(self) -> None:
        os.close(self._number)
        self._claim.close()
