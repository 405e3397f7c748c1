"""The transmission phase on the wire, both directions: requests, replies and their payloads.

All numbers are big-endian. `pack_*` gives the bytes one side sends, `unpack_*` what the other side reads
from them; the `Struct` objects are public because the hot path unpacks from its own buffer. Source: spec,
"Transmission". The handshake is in wire_options.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Final, NamedTuple

from nbdshard.common.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ReplyType,
)

Buffer = bytes | bytearray | memoryview

# One drawing per message; the number under a field is its width in bytes.

# | magic | flags | command | cookie | offset | length |   + payload of a WRITE
# |   4   |   2   |    2    |   8    |   8    |   4    |
REQUEST: Final = Struct(">IHHQQI")

# | magic | flags | command | cookie | offset | length |   + payload where PAYLOAD_LEN is set
# |   4   |   2   |    2    |   8    |   8    |   8    |
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")

# | magic | error | cookie |   + payload of a successful READ
# |   4   |   4   |   8    |
SIMPLE_REPLY: Final = Struct(">IIQ")

# | magic | flags | type | cookie | length |   + `length` bytes
# |   4   |   2   |  2   |   8    |   4    |
STRUCTURED_REPLY: Final = Struct(">IHHQI")

# | magic | flags | type | cookie | offset | length |   + `length` bytes; `offset` is the request's
# |   4   |   2   |  2   |   8    |   8    |   8    |
EXTENDED_REPLY: Final = Struct(">IHHQQQ")

MAGIC: Final = Struct(">I")
OFFSET: Final = Struct(">Q")  # OFFSET_DATA: | offset 8 | data ... |
OFFSET_HOLE: Final = Struct(">QI")  # | offset 8 | hole size 4 |
ERROR: Final = Struct(">IH")  # | error 4 | message length 2 | message ... |, ERROR_OFFSET: + | offset 8 |
CONTEXT_ID: Final = Struct(">I")  # BLOCK_STATUS: | context id 4 | descriptors ... |
CONTEXT_ID_EXT: Final = Struct(">II")  # BLOCK_STATUS_EXT: | context id 4 | descriptor count 4 | descriptors ... |
DESCRIPTOR: Final = Struct(">II")  # | length 4 | status 4 |
DESCRIPTOR_EXT: Final = Struct(">QQ")  # | length 8 | status 8 |


class Malformed(ValueError):
    """What a peer sent breaks the protocol: the sentence says what. Machines turn it into a ProtocolError."""


class Request(NamedTuple):
    """One request header, compact or extended; `length` counts the payload of a WRITE too."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Chunk(NamedTuple):
    """One structured or extended reply header. `offset` is 0 in a structured one, which has no such field."""

    flags: int
    type: int
    cookie: int
    offset: int
    length: int


class ErrorPayload(NamedTuple):
    """An error chunk's payload; `offset` only where the type has one."""

    error: int
    message: bytes
    offset: int | None


# -- requests --------------------------------------------------------------------------------------------------------


def pack_request(request: Request, *, extended: bool) -> bytes:
    """The 28 or 32 bytes of a request header. Raises struct.error where a field does not fit."""
    if extended:
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, *request)
    return REQUEST.pack(REQUEST_MAGIC, *request)


def unpack_request(data: Buffer, *, extended: bool) -> Request:
    """The request in the first 28 or 32 bytes of `data`. Raises Malformed on another magic."""
    magic, *fields = (EXTENDED_REQUEST if extended else REQUEST).unpack_from(data)
    expect_magic(magic, EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC)
    return Request(*fields)


# -- replies ---------------------------------------------------------------------------------------------------------


def pack_simple_reply(cookie: int, error: int = 0) -> bytes:
    """The 16 bytes of a simple reply's header."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def unpack_simple_reply(data: Buffer) -> tuple[int, int]:
    """(cookie, error) of a simple reply. Raises Malformed on another magic."""
    magic, error, cookie = SIMPLE_REPLY.unpack_from(data)
    expect_magic(magic, SIMPLE_REPLY_MAGIC)
    return cookie, error


def pack_chunk(chunk: Chunk, *, extended: bool) -> bytes:
    """The 20 or 32 bytes of a chunk's header; `chunk.offset` is left out of a structured one."""
    if extended:
        return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, *chunk)
    return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, chunk.flags, chunk.type, chunk.cookie, chunk.length)


def unpack_chunk(data: Buffer, *, extended: bool) -> Chunk:
    """The chunk header at the start of `data`. Raises Malformed on another magic."""
    if extended:
        magic, *fields = EXTENDED_REPLY.unpack_from(data)
        expect_magic(magic, EXTENDED_REPLY_MAGIC)
        return Chunk(*fields)
    magic, flags, kind, cookie, length = STRUCTURED_REPLY.unpack_from(data)
    expect_magic(magic, STRUCTURED_REPLY_MAGIC)
    return Chunk(flags, kind, cookie, 0, length)


# -- payloads of chunks ----------------------------------------------------------------------------------------------


def pack_error(error: int, message: bytes = b"", offset: int | None = None) -> bytes:
    """Payload of ERROR, or of ERROR_OFFSET when `offset` is given."""
    return ERROR.pack(error, len(message)) + message + (b"" if offset is None else OFFSET.pack(offset))


def unpack_error(payload: Buffer, reply_type: int) -> ErrorPayload:
    """Payload of an error chunk of any type; types unknown to us may carry more at the end.

    Raises Malformed where the message does not fit, the error is 0, or ERROR_OFFSET lacks its offset.
    """
    if len(payload) < ERROR.size:
        raise Malformed(f"an error chunk of {len(payload)} bytes, at least {ERROR.size} are needed")
    error, message_length = ERROR.unpack_from(payload)
    end = ERROR.size + message_length
    if end > len(payload):
        raise Malformed(f"an error message of {message_length} bytes in a chunk of {len(payload)} bytes")
    if error == 0:
        raise Malformed("an error chunk whose error value is 0")
    offset = None
    if reply_type == ReplyType.ERROR_OFFSET:
        if len(payload) != end + OFFSET.size:
            raise Malformed(f"NBD_REPLY_TYPE_ERROR_OFFSET of {len(payload)} bytes, {end + OFFSET.size} were announced")
        (offset,) = OFFSET.unpack_from(payload, end)
    return ErrorPayload(error, bytes(payload[ERROR.size : end]), offset)


def pack_hole(offset: int, length: int) -> bytes:
    """Payload of OFFSET_HOLE."""
    return OFFSET_HOLE.pack(offset, length)


def unpack_hole(payload: Buffer) -> tuple[int, int]:
    """(offset, length) of OFFSET_HOLE."""
    offset, length = OFFSET_HOLE.unpack(payload)
    return offset, length


def pack_block_status(context: int, descriptors: Iterable[tuple[int, int]], *, wide: bool = False) -> bytes:
    """Payload of BLOCK_STATUS, or of BLOCK_STATUS_EXT where `wide`: `descriptors` are (length, status)."""
    body = b"".join((DESCRIPTOR_EXT if wide else DESCRIPTOR).pack(*descriptor) for descriptor in descriptors)
    if not wide:
        return CONTEXT_ID.pack(context) + body
    return CONTEXT_ID_EXT.pack(context, len(body) // DESCRIPTOR_EXT.size) + body


def unpack_block_status(payload: Buffer, *, wide: bool) -> tuple[int, int, Iterator[tuple[int, int]]]:
    """(context id, descriptor count as told, descriptors) of BLOCK_STATUS or BLOCK_STATUS_EXT.

    `payload` ends at a whole descriptor (the caller checked the header's length, and may have cut off
    its tail). The count is 0 where nothing was told.
    """
    body = memoryview(payload)
    if wide:
        context, count = CONTEXT_ID_EXT.unpack_from(body)
        return context, count, DESCRIPTOR_EXT.iter_unpack(body[CONTEXT_ID_EXT.size :])
    (context,) = CONTEXT_ID.unpack_from(body)
    return context, 0, DESCRIPTOR.iter_unpack(body[CONTEXT_ID.size :])


def expect_magic(magic: int, expected: int) -> None:
    """Raises Malformed where `magic` is not `expected`."""
    if magic != expected:
        raise Malformed(f"magic number {magic:#x} instead of {expected:#x}")
