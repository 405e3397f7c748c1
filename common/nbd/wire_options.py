"""The handshake on the wire, both directions: greeting, options, their replies and payloads.

All numbers are big-endian. `unpack_*` of a payload raises Malformed with a sentence that says what is
wrong; the machines turn it into a ProtocolError that names the peer and the stage. Source: spec, "Handshake".
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

from nbdshard.common.limits import EXPORT_NAME_BYTES_MAX
from nbdshard.common.nbd.constants import (
    EXPORT_NAME_RESERVED_BYTES,
    GREETING_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Info,
)
from nbdshard.common.nbd.wire import Buffer, Malformed, expect_magic

# | NBDMAGIC | IHAVEOPT | handshake flags |      an oldstyle server has another second magic
# |    8     |    8     |        2        |
GREETING: Final = Struct(">QQH")

CLIENT_FLAGS: Final = Struct(">I")

# | IHAVEOPT | option | length |   + `length` bytes
# |    8     |   4    |   4    |
OPTION: Final = Struct(">QII")

# | magic | option | reply type | length |   + `length` bytes
# |   8   |   4    |     4      |   4    |
OPTION_REPLY: Final = Struct(">QIII")

# | export size | transmission flags |   + 124 zeroes unless NO_ZEROES: the reply to EXPORT_NAME
# |      8      |         2          |
EXPORT_NAME_REPLY: Final = Struct(">QH")

INFO_TYPE: Final = Struct(">H")  # every NBD_REP_INFO payload starts with it
INFO_EXPORT: Final = Struct(">HQH")  # | type 2 | export size 8 | transmission flags 2 |
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # | type 2 | minimum 4 | preferred 4 | maximum 4 |
LENGTH: Final = Struct(">I")
COUNT: Final = Struct(">H")


class OptionReplyHeader(NamedTuple):
    """What precedes the payload of every option reply."""

    option: int
    type: int
    length: int


class InfoRequest(NamedTuple):
    """Payload of INFO and GO."""

    export_name: str
    infos: tuple[int, ...]


class ContextQuery(NamedTuple):
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT."""

    export_name: str
    queries: tuple[str, ...]


# -- greeting and options --------------------------------------------------------------------------------------------


def pack_greeting(flags: int) -> bytes:
    """The server's first 18 bytes."""
    return GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, flags)


def pack_client_flags(flags: int) -> bytes:
    """The client's answer to the greeting: 4 bytes."""
    return CLIENT_FLAGS.pack(flags)


def pack_option(option: int, data: bytes = b"") -> bytes:
    """One option with its data."""
    return OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def unpack_option(data: Buffer) -> tuple[int, int]:
    """(option, length of its data) from the first 16 bytes of `data`. Raises Malformed on another magic."""
    magic, option, length = OPTION.unpack_from(data)
    expect_magic(magic, OPTION_MAGIC)
    return option, length


def pack_option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """One option reply with its payload."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def unpack_option_reply(data: Buffer) -> OptionReplyHeader:
    """The header in the first 20 bytes of `data`. Raises Malformed on another magic."""
    magic, *fields = OPTION_REPLY.unpack_from(data)
    expect_magic(magic, OPTION_REPLY_MAGIC)
    return OptionReplyHeader(*fields)


def pack_export_name_reply(size: int, flags: int, *, zeroes: bool) -> bytes:
    """The reply to EXPORT_NAME: 10 bytes, and 124 more where NO_ZEROES was not agreed on."""
    return EXPORT_NAME_REPLY.pack(size, flags) + bytes(EXPORT_NAME_RESERVED_BYTES if zeroes else 0)


def unpack_export_name_reply(data: Buffer) -> tuple[int, int]:
    """(export size, transmission flags)."""
    size, flags = EXPORT_NAME_REPLY.unpack_from(data)
    return size, flags


# -- payloads of options ---------------------------------------------------------------------------------------------


def pack_info_request(export_name: str, infos: Sequence[int]) -> bytes:
    """| length 4 | export name | count 2 | info 2 | info 2 ... |: data of INFO and GO."""
    return _pack_string(export_name) + COUNT.pack(len(infos)) + b"".join(map(COUNT.pack, infos))


def unpack_info_request(data: Buffer) -> InfoRequest:
    """Data of INFO and GO."""
    name, at = _unpack_string(data, 0, "an export name")
    if len(data) < at + COUNT.size:
        raise Malformed("the number of information requests is missing")
    (count,) = COUNT.unpack_from(data, at)
    at += COUNT.size
    if len(data) != at + count * COUNT.size:
        raise Malformed(f"{count} information requests in {len(data) - at} bytes")
    return InfoRequest(name, tuple(info for (info,) in COUNT.iter_unpack(data[at:])))


def pack_context_query(export_name: str, queries: Sequence[str]) -> bytes:
    """| length 4 | export name | count 4 | length 4 | query | ... |: data of LIST_ and SET_META_CONTEXT."""
    return _pack_string(export_name) + LENGTH.pack(len(queries)) + b"".join(map(_pack_string, queries))


def unpack_context_query(data: Buffer) -> ContextQuery:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    name, at = _unpack_string(data, 0, "an export name")
    if len(data) < at + LENGTH.size:
        raise Malformed("the number of queries is missing")
    (count,) = LENGTH.unpack_from(data, at)
    at += LENGTH.size
    if count > (len(data) - at) // LENGTH.size:
        raise Malformed(f"{count} queries in {len(data) - at} bytes")
    queries = []
    for _ in range(count):
        query, at = _unpack_string(data, at, "a query")
        queries.append(query)
    if at != len(data):
        raise Malformed(f"{len(data) - at} bytes after the last query")
    return ContextQuery(name, tuple(queries))


# -- payloads of option replies --------------------------------------------------------------------------------------


def pack_server(name: str, description: str = "") -> bytes:
    """| length 4 | export name | description ... |: payload of NBD_REP_SERVER."""
    return _pack_string(name) + description.encode()


def unpack_server(payload: Buffer) -> tuple[bytes, bytes]:
    """(export name, description), as bytes: they are shown, not trusted."""
    if len(payload) < LENGTH.size:
        raise Malformed(f"an export's entry of {len(payload)} bytes")
    (length,) = LENGTH.unpack_from(payload)
    end = LENGTH.size + length
    if end > len(payload):
        raise Malformed(f"an export name of {length} bytes in an entry of {len(payload)} bytes")
    return bytes(payload[LENGTH.size : end]), bytes(payload[end:])


def pack_meta_context(context: int, name: str) -> bytes:
    """| context id 4 | name ... |: payload of NBD_REP_META_CONTEXT."""
    return LENGTH.pack(context) + name.encode()


def unpack_meta_context(payload: Buffer) -> tuple[int, str]:
    """(context id, name). Raises Malformed where the name is no UTF-8."""
    if len(payload) < LENGTH.size:
        raise Malformed(f"a metadata context of {len(payload)} bytes")
    (context,) = LENGTH.unpack_from(payload)
    return context, text(payload[LENGTH.size :], "a metadata context name")


def pack_info_export(size: int, flags: int) -> bytes:
    """Payload of NBD_REP_INFO with NBD_INFO_EXPORT."""
    return INFO_EXPORT.pack(Info.EXPORT, size, flags)


def unpack_info_export(payload: Buffer) -> tuple[int, int]:
    """(export size, transmission flags)."""
    _expect_length(payload, INFO_EXPORT.size, "NBD_INFO_EXPORT")
    _, size, flags = INFO_EXPORT.unpack(payload)
    return size, flags


def pack_info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    """Payload of NBD_REP_INFO with NBD_INFO_BLOCK_SIZE."""
    return INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, minimum, preferred, maximum)


def unpack_info_block_size(payload: Buffer) -> tuple[int, int, int]:
    """(minimum, preferred, maximum), in bytes."""
    _expect_length(payload, INFO_BLOCK_SIZE.size, "NBD_INFO_BLOCK_SIZE")
    _, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(payload)
    return minimum, preferred, maximum


def pack_info_text(info: int, text: str) -> bytes:
    """Payload of NBD_REP_INFO with NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""
    return INFO_TYPE.pack(info) + text.encode()


def unpack_info_type(payload: Buffer) -> int:
    """Which detail a NBD_REP_INFO is about."""
    if len(payload) < INFO_TYPE.size:
        raise Malformed(f"NBD_REP_INFO of {len(payload)} bytes")
    return int(INFO_TYPE.unpack_from(payload)[0])


# -- strings ---------------------------------------------------------------------------------------------------------


def printable(data: Buffer, length_max: int = EXPORT_NAME_BYTES_MAX) -> str:
    """A peer's bytes as one line for a terminal: bounded, and nothing in it that a terminal would obey."""
    text = bytes(data[:length_max]).decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return LENGTH.pack(len(data)) + data


def _unpack_string(data: Buffer, at: int, what: str) -> tuple[str, int]:
    """The string at `at` and where it ends."""
    if len(data) < at + LENGTH.size:
        raise Malformed(f"the length of {what} is missing")
    (length,) = LENGTH.unpack_from(data, at)
    end = at + LENGTH.size + length
    if end > len(data):
        raise Malformed(f"{what} of {length} bytes where {len(data) - at - LENGTH.size} are left")
    return text(data[at + LENGTH.size : end], what), end


def text(data: Buffer, what: str) -> str:
    if len(data) > EXPORT_NAME_BYTES_MAX:
        raise Malformed(f"{what} of {len(data)} bytes, at most {EXPORT_NAME_BYTES_MAX} are allowed")
    try:
        text = bytes(data).decode()
    except UnicodeDecodeError:
        raise Malformed(f"{what} that is no UTF-8") from None
    if "\0" in text:
        raise Malformed(f"{what} with a NUL in it")
    return text


def _expect_length(payload: Buffer, length: int, what: str) -> None:
    if len(payload) != length:
        raise Malformed(f"{what} of {len(payload)} bytes instead of {length}")
