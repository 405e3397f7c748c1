"""Local ends of a copy: files, block devices, standard input and output. Checked and held open by the coordinator.

The coordinator opens each local end once, checks it, and keeps the descriptor for the whole job; workers open the same
path again and compare the identity. On a block device that descriptor carries O_EXCL, which the kernel grants to one
holder and to nobody while a file system is mounted from it; a worker's plain open goes beside it.

Nothing of a destination changes before `prepare`, except that a missing file is created; `discard` takes that back.
"""

from __future__ import annotations

import errno
import os
import stat
from enum import Enum, auto

import msgspec

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.messages import EndpointAddress, Side

NOT_RESUMED = "this is not what the copy was writing to"
STDIN = 0
STDOUT = 1
_CREATION_MODE = 0o666  # less the umask, as every program that writes a file does


class Sort(Enum):
    """What a local end is."""

    REGULAR = auto()  # a regular file; as a destination it gets the source's size
    BLOCK = auto()  # a block device; its size is what it is
    STREAM = auto()  # bytes in order, once: a pipe, a socket, a character device


class LocalEnd(msgspec.Struct):
    """One local end, checked and open. `size` in bytes; None for a stream."""

    side: Side
    sort: Sort
    address: EndpointAddress
    size: int | None
    descriptor: int
    facts: os.stat_result
    created: bool = False  # by us: so ours to remove
    resumed: bool = False  # it holds what an earlier run wrote, and has its size
    prepared: bool = False

    @property
    def grows(self) -> bool:
        """Whether a destination takes the size of the source."""
        return self.sort is not Sort.BLOCK

    def prepare(self, size: int) -> None:
        """Give a regular file `size` bytes, all of which read as zeroes; nothing for the others.

        Raises UserError when the file system refuses the size.
        """
        self.prepared = True
        if self.sort is not Sort.REGULAR:
            return
        if self.resumed:
            if self.size != size:
                raise UserError(f"has {self.size} bytes instead of {size}", self.address.address, NOT_RESUMED)
            return
        try:
            os.ftruncate(self.descriptor, 0)  # what was there before must not shine through skipped zeroes
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            raise UserError(f"cannot be given {size} bytes: {error.strerror}", self.address.address) from None

    def discard(self) -> None:
        """Remove the file again if it was created for a job that then wrote nothing. Never raises."""
        if not self.created:
            return
        path = self.address.address
        try:
            now = os.stat(path, follow_symlinks=False)
            if (now.st_dev, now.st_ino) == (self.facts.st_dev, self.facts.st_ino):
                os.unlink(path)
        except OSError as error:
            logs.warning(f"{path}: cannot be removed again: {error.strerror}")

    def close(self) -> None:
        """Close the descriptor, and with it give up a block device. Idempotent; leaves standard streams open."""
        if self.descriptor > STDOUT:
            os.close(self.descriptor)
        self.descriptor = -1


def open_source(path: str, side: Side = "source") -> LocalEnd:
    """The file or block device at `path`, to read from it. Raises UserError: missing, unreadable, a directory, a pipe.

    `side`: how messages call it; a destination is read where it is only compared.
    """
    path = os.path.abspath(path)
    descriptor = _open(path, os.O_RDONLY, side)
    try:
        return _describe(path, descriptor, "source")
    except BaseException:
        os.close(descriptor)
        raise


def open_destination(path: str, source: LocalEnd | None, *, resumes: bool = False) -> LocalEnd:
    """The file or block device at `path` as a destination; a missing file is created. Its content stays as it is.

    `source`, if local too, must be something else. One that `resumes` an earlier copy is neither created nor given a
    size. Raises UserError: a directory, read-only, mounted or in use, no folder to create it in, the same as the
    source.
    """
    path = os.path.abspath(path)
    before = _stat(path)
    if before is None and resumes:
        raise UserError("there is no such file", path, NOT_RESUMED)
    if before is not None:
        _check_sort(path, before.st_mode, "destination")
        _check_different(path, before, source)
    is_block = before is not None and stat.S_ISBLK(before.st_mode)
    descriptor, created = _open_for_writing(path, before is None, is_block)
    try:
        end = _describe(path, descriptor, "destination")
        _check_different(path, end.facts, source)  # again: the path may mean something else by now
        if is_block and end.sort is not Sort.BLOCK:
            raise UserError("the destination was replaced while it was opened", path)
    except BaseException:
        os.close(descriptor)
        if created:
            os.unlink(path)
        raise
    end.created = created
    end.resumed = resumes
    return end


def standard_input() -> LocalEnd:
    """Standard input as a source: the file it is redirected from, if it is one and at its start, else a stream."""
    return _standard(STDIN, "source", os.O_RDONLY, None)


def standard_output(source: LocalEnd | None, *, resumes: bool = False) -> LocalEnd:
    """Standard output as a destination: the file it is redirected to, if it is one and at its start, else a stream.

    `resumes` as for `open_destination`.
    """
    return _standard(STDOUT, "destination", os.O_WRONLY, source, resumes=resumes)


def _standard(descriptor: int, side: Side, access: int, source: LocalEnd | None, *, resumes: bool = False) -> LocalEnd:
    name = "standard input" if side == "source" else "standard output"
    if os.isatty(descriptor):
        raise UserError(f"{name} is a terminal; an image is not for people to {_verb(side)}", "-", _advice(side))
    try:
        facts = os.fstat(descriptor)
    except OSError:
        raise UserError(f"{name} is closed", "-") from None
    if not _allows(descriptor, access):
        raise UserError(f"{name} is closed", "-")  # or opened for the other direction, which is of no more use
    path = _path_of(descriptor, facts, access)
    if path is not None:
        return open_source(path) if side == "source" else open_destination(path, source, resumes=resumes)
    if stat.S_ISDIR(facts.st_mode):
        raise UserError(f"{name} is a directory", "-")
    if side == "destination":
        _check_different("-", facts, source)
    address = EndpointAddress(kind="stream", address=str(descriptor))
    return LocalEnd(side, Sort.STREAM, address, None, descriptor, facts)


def _allows(descriptor: int, access: int) -> bool:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE in (access, os.O_RDWR)


def _path_of(descriptor: int, facts: os.stat_result, access: int) -> str | None:
    """The path of the whole file behind a redirected standard stream; None where only a stream will do.

    That is: no file, a file without a name, one that was read or written already, or one opened for appending.
    """
    import fcntl

    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISBLK(facts.st_mode)):
        return None
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return None
    if os.lseek(descriptor, 0, os.SEEK_CUR) != 0:
        return None
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    found = _stat(path)
    same = found is not None and (found.st_dev, found.st_ino) == (facts.st_dev, facts.st_ino)
    wanted = os.R_OK if access == os.O_RDONLY else os.W_OK
    return path if same and os.access(path, wanted) else None


def _verb(side: Side) -> str:
    return "type" if side == "source" else "read"


def _advice(side: Side) -> str:
    return "redirect it from a file or a pipe" if side == "source" else "redirect it to a file or a pipe"


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot be opened: {error.strerror}", path) from None


def _open(path: str, flags: int, side: Side) -> int:
    """Open `path` without ever waiting, as a FIFO or a tape would have it."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, _CREATION_MODE)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError("is mounted or in use by another program", path, "unmount it first") from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and side == "destination":
            raise UserError(f"cannot be written: {error.strerror}", path) from None
        raise UserError(f"cannot be opened as the {side}: {error.strerror}", path) from None


def _open_for_writing(path: str, is_missing: bool, is_block: bool) -> tuple[int, bool]:
    """(descriptor, whether the file was created). Only a name that was missing is created, never opened over."""
    if is_missing:
        return _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, "destination"), True
    if is_block:
        return _open(path, os.O_RDWR | os.O_EXCL, "destination"), False
    return _open(path, os.O_WRONLY, "destination"), False


def _describe(path: str, descriptor: int, side: Side) -> LocalEnd:
    facts = os.fstat(descriptor)
    _check_sort(path, facts.st_mode, side)
    address = EndpointAddress(kind="file", address=path, identity=f"{facts.st_dev}:{facts.st_ino}")
    if stat.S_ISREG(facts.st_mode):
        return LocalEnd(side, Sort.REGULAR, address, facts.st_size, descriptor, facts)
    if side == "destination":
        _check_device_writable(path, descriptor)
    size = os.lseek(descriptor, 0, os.SEEK_END)
    return LocalEnd(side, Sort.BLOCK, address, size, descriptor, facts)


def _check_sort(path: str, mode: int, side: Side) -> None:
    if stat.S_ISDIR(mode):
        raise UserError(f"the {side} is a directory", path)
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UserError(f"the {side} is neither a file nor a block device", path, "for a pipe write '-'")


def _check_device_writable(path: str, descriptor: int) -> None:
    """A device set read-only (blockdev --setro) lets root open it for writing and fails the writes."""
    import fcntl
    import struct

    blkroget = 0x125E  # BLKROGET, linux/fs.h
    try:
        answer = fcntl.ioctl(descriptor, blkroget, b"\0" * 4)
    except OSError:
        return  # not every driver answers; the first write will
    if struct.unpack("i", answer)[0]:
        raise UserError("the destination device is read-only", path)


def _check_different(path: str, facts: os.stat_result, source: LocalEnd | None) -> None:
    """Refuse a destination which is the source, by whatever name. Two ends of one pipe or terminal are two things."""
    if source is None or not (stat.S_ISREG(facts.st_mode) or stat.S_ISBLK(facts.st_mode)):
        return
    same_inode = (facts.st_dev, facts.st_ino) == (source.facts.st_dev, source.facts.st_ino)
    same_device = source.sort is Sort.BLOCK and stat.S_ISBLK(facts.st_mode) and facts.st_rdev == source.facts.st_rdev
    if same_inode or same_device:
        raise UserError("source and destination are the same", path)
