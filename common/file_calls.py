"""What can be asked of an open file beyond reading and writing: zeroes, and its place in the page cache.

Each function takes a descriptor, may block, and raises OSError as the functions of `os` do. Those that Python has no
name for go through ctypes, which releases the interpreter's lock and keeps errno per thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from typing import Final

from nbdshard.common.ranges import Range

_libc = ctypes.CDLL(None, use_errno=True)

_FALLOC_FL_KEEP_SIZE: Final = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
_FALLOC_FL_ZERO_RANGE: Final = 0x10
_BLKZEROOUT: Final = 0x127F  # linux/fs.h: _IO(0x12, 127)
_BLKSSZGET: Final = 0x1268  # linux/fs.h: _IO(0x12, 104), an int
_SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h
_ZEROES_BYTES: Final = 1 << 20  # of memory, to write more of them
_SYS_CACHESTAT: Final = 451  # the same number on every architecture

# Answers that mean "not here, ever", as against "not this time".
NEVER: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENODEV, errno.ENOSYS})


# -- zeroes -----------------------------------------------------------------------------------------------------------


def zero_file(number: int, where: Range, allocated: bool) -> None:
    """Make `where` of a regular file read as zeroes, the file growing as if they had been written."""
    if allocated:
        _fallocate(number, _FALLOC_FL_ZERO_RANGE, where)
        return
    _fallocate(number, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, where)
    # A hole cannot be punched past the end. The last byte is in our own range: writing it, unlike ftruncate, cannot
    # take away what another process wrote behind it meanwhile.
    if os.fstat(number).st_size < where.end:
        os.pwrite(number, b"\0", where.end - 1)


def zero_device(number: int, where: Range, allocated: bool) -> None:
    """Make `where` of a block device read as zeroes; whole sectors by the device, what is cut off them by writing."""
    sector = sector_size(number)
    start, end = where.start + -where.start % sector, where.end - where.end % sector
    if start >= end:
        write_zeroes(number, where)
        return
    if allocated or not _discards(number, Range(start, end)):
        fcntl.ioctl(number, _BLKZEROOUT, struct.pack("=QQ", start, end - start))
    if where.start < start:
        write_zeroes(number, Range(where.start, start))
    if end < where.end:
        write_zeroes(number, Range(end, where.end))


def _discards(number: int, where: Range) -> bool:
    """Punch a hole; False where the device cannot promise that it reads as zeroes (then the kernel refuses)."""
    try:
        _fallocate(number, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, where)
    except OSError as error:
        if error.errno in NEVER:
            return False
        raise
    return True


def write_zeroes(number: int, where: Range) -> None:
    """Write them, where there is no other way."""
    zeroes = memoryview(bytes(min(where.length, _ZEROES_BYTES)))
    at = where.start
    while at < where.end:
        at += os.pwrite(number, zeroes[: where.end - at], at)


def sector_size(number: int) -> int:
    """The logical sector of a block device, in bytes."""
    size: int = struct.unpack("=i", fcntl.ioctl(number, _BLKSSZGET, bytes(4)))[0]
    return size


def _fallocate(number: int, mode: int, where: Range) -> None:
    _check(_fallocate64(number, mode, ctypes.c_int64(where.start), ctypes.c_int64(where.length)))


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_fallocate64 = getattr(_libc, "fallocate64", None) or _libc.fallocate  # glibc and musl: each has one with 64 bits


# -- the page cache ---------------------------------------------------------------------------------------------------


def start_write_back(number: int, where: Range) -> None:
    """Have the kernel begin to write dirty pages of `where`; it may wait for room in the device's queue, no longer.

    Nothing here may wait for the pages: SYNC_FILE_RANGE_WAIT_* report a failed write-back, and what was reported once
    on a descriptor is not reported again by its fdatasync(2), on whose word a range is called durable.
    """
    _check(
        _libc.sync_file_range(
            number, ctypes.c_int64(where.start), ctypes.c_int64(where.length), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        )
    )


def drop_pages(number: int, where: Range) -> None:
    """Let clean pages of `where` go; those dirty or being written stay."""
    os.posix_fadvise(number, where.start, where.length, os.POSIX_FADV_DONTNEED)


def read_by_pages(number: int, where: Range) -> None:
    """Forget what the cache has of `where`, and read no further ahead than is asked for."""
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
    drop_pages(number, where)


_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6, 0x958458F6})  # linux/magic.h: tmpfs, ramfs, hugetlbfs


def is_in_memory(number: int) -> bool:
    """Whether a file has its home in memory, so that nothing of it is ever waited for (but for swapping)."""
    answer = (ctypes.c_long * 32)()  # struct statfs, of at most 120 bytes; its type comes first
    return _libc.fstatfs(number, answer) == 0 and answer[0] in _IN_MEMORY


def is_at_hand(number: int, where: Range) -> bool:
    """Whether the page cache holds all of `where`, as far as the kernel tells: then it is read without waiting."""
    try:
        return cached_bytes(number, where) >= where.length
    except OSError:
        return False


class _CacheStat(ctypes.Structure):
    """struct cachestat of linux/mman.h: pages, by what they are."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "lately"))


class _CacheStatRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


def cached_bytes(number: int, where: Range) -> int:
    """How much of `where` the page cache holds. Raises OSError where the kernel does not tell."""
    try:
        return _cachestat(number, where)
    except OSError as error:
        if error.errno == errno.ENOSYS:  # before Linux 6.5
            return _mincore(number, where)
        raise


def _cachestat(number: int, where: Range) -> int:
    asked, answer = _CacheStatRange(where.start, where.length), _CacheStat()
    _check(_libc.syscall(_SYS_CACHESTAT, number, ctypes.byref(asked), ctypes.byref(answer), 0))
    return int(answer.cached) * mmap.PAGESIZE


def _mincore(number: int, where: Range) -> int:
    """mincore(2) answers "all" to who could not write the file; it costs a mapping of `where`."""
    if not os.access(f"/proc/self/fd/{number}", os.W_OK):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    start = where.start - where.start % mmap.PAGESIZE
    length = ctypes.c_size_t(where.end - start)
    pages = (ctypes.c_ubyte * -(-length.value // mmap.PAGESIZE))()
    mapped = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, number, start)
    if mapped == _MAP_FAILED:
        _check(-1)
    try:
        _check(_libc.mincore(ctypes.c_void_p(mapped), length, pages))
    finally:
        _libc.munmap(ctypes.c_void_p(mapped), length)
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


_mmap = getattr(_libc, "mmap64", None) or _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_MAP_FAILED = ctypes.c_void_p(-1).value
