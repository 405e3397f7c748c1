"""Where a cache on disk keeps its blocks, and an index of those that are not below yet, which outlives the server.

A directory has one owner, and is of one export. What is written to a slot comes before its record in the index, and a
record is taken out before another block gets its slot: so a server that is killed leaves an index that is right. After
a crash of the machine some of both may be missing, which the checksums tell. But an old record, with what belongs to
it, may also be there still: before a flush is answered the index is made durable, so that what it covers is not undone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.machine import BOOT_ID_PATH
from nbdshard.common.units import format_bytes
from nbdshard.server.claims import Claim, claim
from nbdshard.server.layers.cache_blocks import Block, Geometry, runs
from nbdshard.server.layers.cache_index import (
    HEADER_BYTES,
    DamagedRecord,
    Header,
    Record,
    pack_header,
    pack_record,
    record_bytes,
    unpack_header,
    unpack_record,
)

_LOCK: Final = "lock"
_INDEX: Final = "index"
_DATA: Final = "data"
_CHECKSUM: Final = struct.Struct("<I")
_SCAN_BYTES: Final = 1 << 20
_ZEROES: Final = memoryview(bytes(1 << 20))


class DiskSlots:
    """The slots of a cache in a directory. Made by `open_folder`."""

    def __init__(self, folder: Path, held: Claim, index: int, data: int, header: Header) -> None:
        self.lasting = str(folder)
        self._claim = held
        self._index, self._data = index, data
        self._header = header
        self._grains = header.block // header.grain
        self._record_bytes = record_bytes(self._grains)
        self._records: dict[int, Record] = {}  # by slot, as they are in the index
        self._fresh: dict[int, dict[int, int]] = {}  # checksums of what was put since, by slot and grain
        self._sequence = 0
        self._indexing = threading.Lock()  # of what follows
        self._stale: set[int] = set()  # slots whose record in the index is to be another one, or none
        self._noted = self._settled = 0  # records that were put, and how many of them are durable
        self._is_broken = False
        self._settling = threading.Lock()
        self._lost: OSError | None = None

    # -- data ---------------------------------------------------------------------------------------------------------

    def get(self, slot: int, start: int, end: int) -> memoryview | bytes:
        found = os.pread(self._data, end - start, slot * self._header.block + start)
        while len(found) < end - start:
            more = os.pread(self._data, end - start - len(found), slot * self._header.block + start + len(found))
            if not more:
                raise OSError(errno.EIO, f"{self.lasting}/{_DATA} has become shorter")
            found += more
        return found

    def put(self, slot: int, start: int, data: memoryview) -> None:
        at, base = 0, slot * self._header.block + start
        while at < len(data):
            at += os.pwrite(self._data, data[at:], base + at)

    def zero(self, slot: int, start: int, end: int) -> None:
        while start < end:
            length = min(end - start, len(_ZEROES))
            self.put(slot, start, _ZEROES[:length])
            start += length

    def sign(self, slot: int, start: int, end: int, data: memoryview) -> None:
        grain = self._header.grain
        fresh = self._fresh.setdefault(slot, {})
        for number in range(start // grain, -(-end // grain)):
            first, last = number * grain, (number + 1) * grain
            if start <= first and last <= end:
                fresh[number] = zlib.crc32(data[first - start : last - start])
            else:
                fresh[number] = zlib.crc32(self.get(slot, first, last))

    # -- the index ----------------------------------------------------------------------------------------------------

    def note(self, changed: Mapping[int, Block | None]) -> None:
        for slot, block in changed.items():
            fresh = self._fresh.pop(slot, {})
            old = self._records.get(slot)
            if block is None or not block.kept:
                if old is not None:
                    del self._records[slot]
                    self._put_record(slot)
                continue
            is_new = old is None or old.number != block.number
            checksums = bytearray(4 * self._grains if is_new or old is None else old.checksums)
            for grain, checksum in fresh.items():
                _CHECKSUM.pack_into(checksums, 4 * grain, checksum)
            self._sequence += 1
            self._records[slot] = Record(self._sequence, block.number, block.kept, bytes(checksums))
            self._put_record(slot)

    def _put_record(self, slot: int) -> None:
        """Into the index. What cannot be put is stale, and tried again by `settle`."""
        with self._indexing:
            self._stale.add(slot)
            try:
                where = HEADER_BYTES + slot * self._record_bytes
                os.pwrite(self._index, pack_record(self._records.get(slot), self._grains), where)
            except OSError as error:
                if not self._is_broken:
                    self._is_broken = True
                    what = "what is not written back yet would not survive the end of this server"
                    logs.error(f"{self.lasting}/{_INDEX}: cannot be written: {error.strerror}; {what}")
                    self._distrust()
            else:
                self._stale.discard(slot)
                self._noted += 1

    def _distrust(self) -> None:
        """Have the next run check whether a slot still holds what its record says, as after a crash of the machine."""
        with contextlib.suppress(OSError):
            os.pwrite(self._index, pack_header(msgspec.structs.replace(self._header, boot="")), 0)

    def settle(self) -> None:
        with self._indexing:
            stale = list(self._stale)
        for slot in stale:
            self._put_record(slot)
        with self._settling:
            with self._indexing:
                is_whole, noted = not self._stale, self._noted
            if self._lost is None and noted != self._settled:
                try:
                    os.fdatasync(self._index)
                except OSError as error:  # the kernel tells once: nobody knows any more what the disk has
                    self._lost = error
                else:
                    self._settled = noted
            if self._lost is not None or not is_whole:
                what = "cannot be written, and after a crash may undo what was flushed"
                raise OSError(errno.EIO, f"{self.lasting}/{_INDEX}: {what}")

    def restore(self) -> dict[int, tuple[int, int]]:
        """What was not below when it was left: by slot, (number of a block, mask of grains). Raises UserError."""
        is_sure = self._header.closed or self._header.boot == _boot() != ""
        found, torn = self._read_index(is_sure=is_sure)
        lost = 0
        for slot, record in found.items():
            mask = record.mask if is_sure else record.mask & self._intact(slot, record)
            lost += (record.mask & ~mask).bit_count() * self._header.grain
            self._sequence = max(self._sequence, record.sequence)
            if mask:
                self._records[slot] = msgspec.structs.replace(record, mask=mask)
                if mask == record.mask:
                    self._stale.discard(slot)
        if torn or lost:
            what = f"{format_bytes(lost + torn * self._header.block)} at most of what no flush had covered"
            logs.warning(f"{self.lasting}: the machine has crashed, and {what} is not whole, and given up")
        return {slot: (record.number, record.mask) for slot, record in self._records.items()}

    def _read_index(self, *, is_sure: bool) -> tuple[dict[int, Record], int]:
        """Records by slot, one for a block, and how many are torn. Raises UserError where none can be."""
        header = self._header
        geometry = Geometry(header.size, header.block, header.grain, header.block, header.block)
        newest: dict[int, tuple[int, Record]] = {}
        torn = 0
        size, each = self._header.slots * self._record_bytes, self._record_bytes
        step = max(_SCAN_BYTES // each, 1) * each
        for base in range(0, size, step):
            data = os.pread(self._index, min(step, size - base), HEADER_BYTES + base)
            for at in range(0, len(data), each):
                slot = (base + at) // each
                try:
                    record = unpack_record(data[at : at + each], self._grains)
                    if record is None:
                        continue
                    self._stale.add(slot)
                    if record.number * geometry.block >= geometry.size or record.mask & ~geometry.full(record.number):
                        raise DamagedRecord
                except DamagedRecord:
                    if is_sure:
                        where = f"{self.lasting}/{_INDEX}"
                        raise UserError(f"is damaged at record {slot}", where, _advice(self.lasting)) from None
                    self._stale.add(slot)
                    torn += 1
                    continue
                if record.number not in newest or newest[record.number][1].sequence < record.sequence:
                    newest[record.number] = (slot, record)
        return dict(newest.values()), torn

    def _intact(self, slot: int, record: Record) -> int:
        """The mask of the grains whose content is what was put there."""
        mask = 0
        for first, last in runs(record.mask):
            data = memoryview(self.get(slot, first * self._header.grain, last * self._header.grain))
            for grain in range(first, last):
                at = (grain - first) * self._header.grain
                wanted = _CHECKSUM.unpack_from(record.checksums, 4 * grain)[0]
                if zlib.crc32(data[at : at + self._header.grain]) == wanted:
                    mask |= 1 << grain
        return mask

    @property
    def header(self) -> Header:
        """How it is cut."""
        return self._header

    def begin(self) -> None:
        """From now on it is in use, and known to be; what was not restored is forgotten. Raises OSError."""
        for slot in list(self._stale):
            self._put_record(slot)
        self._write_header(closed=False)

    def keep(self) -> None:
        """Make durable what it holds, for the next run. Raises OSError."""
        os.fdatasync(self._data)
        self.settle()
        self._write_header(closed=True)

    def _write_header(self, *, closed: bool) -> None:
        self._header = msgspec.structs.replace(self._header, closed=closed, boot=_boot())
        os.pwrite(self._index, pack_header(self._header), 0)
        os.fdatasync(self._index)

    def close(self) -> None:
        self.release()
        self._claim.close()

    def release(self) -> None:
        """Close the files, and keep the directory claimed."""
        os.close(self._index)
        os.close(self._data)


def _advice(folder: str) -> str:
    return f"removing {folder} gives up what was not written back"


def _boot() -> str:
    """Which start of the machine this is; "" where that cannot be known."""
    try:
        with open(BOOT_ID_PATH, encoding="ascii") as file:
            return file.read(64).strip()
    except OSError:
        return ""


# -- opening ----------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, wanted: Header) -> tuple[DiskSlots, dict[int, tuple[int, int]]]:
    """The cache in `folder`, which is made if there is none, and what it holds that may not be below (`restore`).

    It is cut as `wanted` says; but one that holds such data, as it was. Raises UserError.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        held = claim(folder / _LOCK, alone=True)
    except OSError as error:
        raise UserError(f"cannot be used: {error.strerror}", str(folder)) from None
    try:
        return _opened(folder, held, wanted)
    except BaseException as error:
        held.close()
        if isinstance(error, OSError):
            raise UserError(f"cannot be used: {error.strerror}", str(folder)) from None
        raise


def _opened(folder: Path, held: Claim, wanted: Header) -> tuple[DiskSlots, dict[int, tuple[int, int]]]:
    index, data = folder / _INDEX, folder / _DATA
    if index.exists():
        found = _header(index, str(folder))
        if found.export != wanted.export:
            advice = "each export needs a directory of its own"
            raise UserError(f"is the cache of {found.export}", str(folder), advice)
        slots = _slots(folder, held, found)
        try:
            dirty = slots.restore()
            is_same = msgspec.structs.replace(found, boot="", closed=True) == wanted
            if dirty and found.size != wanted.size:
                what = f"holds what was not written back to an image of {found.size} bytes, which now has {wanted.size}"
                raise UserError(what, str(folder), _advice(str(folder)))
            if dirty or is_same:
                if not is_same:
                    logs.warning(f"{folder}: keeps its size and its blocks until it is written back")
                slots.begin()
                return slots, dirty
        except BaseException:
            slots.release()
            raise
        slots.release()
    elif data.exists() and data.stat().st_size:
        raise UserError("has data of a cache, and no index", str(folder), _advice(str(folder)))
    _make(folder, wanted)
    slots = _slots(folder, held, wanted)
    slots.begin()
    return slots, {}


def _header(index: Path, folder: str) -> Header:
    with index.open("rb") as file:
        return unpack_header(file.read(HEADER_BYTES), str(index), _advice(folder))


def _slots(folder: Path, held: Claim, header: Header) -> DiskSlots:
    index = os.open(folder / _INDEX, os.O_RDWR | os.O_CLOEXEC)
    try:
        data = os.open(folder / _DATA, os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        os.close(index)
        raise
    return DiskSlots(folder, held, index, data, header)


def _make(folder: Path, header: Header) -> None:
    """Both files at their full size: what is acknowledged later has its room. The index takes its name at last."""
    grains = header.block // header.grain
    new = folder / f"{_INDEX}.new"
    sizes = {folder / _DATA: header.slots * header.block, new: HEADER_BYTES + header.slots * record_bytes(grains)}
    for path, size in sizes.items():
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if path == new:
                os.pwrite(number, pack_header(header), 0)
            os.posix_fallocate(number, 0, size)
            os.fsync(number)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            path.unlink()
            raise UserError(f"has no room for {format_bytes(size)}", str(folder), "dir-limit= says how much") from None
        finally:
            os.close(number)
    new.rename(folder / _INDEX)
    for changed in (folder, folder.parent):
        number = os.open(changed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)
