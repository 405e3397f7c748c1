"""The index of a cache on disk: a header, and a record for each slot that holds what may not be below yet. Pure.

::

    4096 bytes      "nbdshard cache 1\\n", the CRC-32 of what follows in hexadecimal, "\\n", the Header as JSON, zeroes
    a record each   CRC-32 of the rest, 4 bytes of zeroes, its sequence, the number of the block (8 bytes each), a mask
                    of grains, a CRC-32 for each grain, zeroes; all little-endian, and of a length that divides a page
                    or is a multiple of one. A slot without anything has zeroes instead

A record fits into a page, so that a process that is killed has written it whole or not at all.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import msgspec

from nbdshard.common.errors import UserError

HEADER_BYTES: Final = 4096
RECORD_BYTES_MAX: Final = 4096
_MAGIC: Final = b"nbdshard cache "
_FORMAT: Final = 1
_FIXED: Final = struct.Struct("<IIQQ")


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a cache is of, and how it is cut. Sizes in bytes.

    `boot`: of the machine, in which it was opened last. `closed`: everything in it was durable when it was left.
    """

    export: str
    size: int
    block: int
    grain: int
    slots: int
    boot: str = ""
    closed: bool = True


class Record(msgspec.Struct, frozen=True):
    """What a slot holds of `number`, the grains of `mask`. `checksums`: 4 bytes for each grain, in the mask or not."""

    sequence: int
    number: int
    mask: int
    checksums: bytes


class DamagedRecord(Exception):
    """A record that nobody wrote like this."""


def record_bytes(grains: int) -> int:
    """Of each record, where a block has so many grains."""
    needed = _FIXED.size + _mask_bytes(grains) + 4 * grains
    return 1 << (needed - 1).bit_length()


def pack_header(header: Header) -> bytes:
    """HEADER_BYTES of them."""
    text = msgspec.json.encode(header)
    found = _MAGIC + b"%d\n%08x\n" % (_FORMAT, zlib.crc32(text)) + text
    return found.ljust(HEADER_BYTES, b"\0")


def unpack_header(data: bytes, where: str, advice: str) -> Header:
    """Raises UserError with `where` and, if it is damaged, `advice`."""
    lines = data.rstrip(b"\0").split(b"\n", 2)
    if len(lines) != 3 or not lines[0].startswith(_MAGIC):
        raise UserError("is damaged: it does not begin like the index of a cache", where, advice)
    found = lines[0].removeprefix(_MAGIC)
    if found != b"%d" % _FORMAT:
        text = found[:20].decode(errors="replace")
        raise UserError(f"a cache of format {text}; this nbdshard knows format {_FORMAT}", where)
    try:
        if lines[1] != b"%08x" % zlib.crc32(lines[2]):
            raise UserError("is damaged: its checksum is wrong", where, advice)
        return msgspec.json.decode(lines[2], type=Header)
    except msgspec.MsgspecError as error:
        raise UserError(f"is damaged: {error}", where, advice) from None


def pack_record(record: Record | None, grains: int) -> bytes:
    """`record_bytes(grains)` of them; zeroes for None."""
    size = record_bytes(grains)
    if record is None:
        return bytes(size)
    mask = record.mask.to_bytes(_mask_bytes(grains), "little")
    rest = (_FIXED.pack(0, 0, record.sequence, record.number)[4:] + mask + record.checksums).ljust(size - 4, b"\0")
    return struct.pack("<I", zlib.crc32(rest)) + rest


def unpack_record(data: bytes, grains: int) -> Record | None:
    """Raises DamagedRecord."""
    if not any(data):
        return None
    checksum, _, sequence, number = _FIXED.unpack_from(data)
    if checksum != zlib.crc32(data[4:]):
        raise DamagedRecord
    at = _FIXED.size + _mask_bytes(grains)
    mask = int.from_bytes(data[_FIXED.size : at], "little")
    return Record(sequence, number, mask, bytes(data[at : at + 4 * grains]))


def _mask_bytes(grains: int) -> int:
    return -(-grains // 8)
