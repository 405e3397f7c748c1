"""The bytes of the handshake, both directions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.nbd import wire_options as wire
from nbdshard.common.nbd.wire import Malformed
from nbdshard.common.nbd.wire_options import ContextQuery, InfoRequest, OptionReplyHeader

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)

GOLDEN = [
    (wire.pack_greeting(3), "4e42444d41474943 49484156454f5054 0003"),
    (wire.pack_client_flags(3), "00000003"),
    (wire.pack_option(7, b"ab"), "49484156454f5054 00000007 00000002 6162"),
    (wire.pack_option_reply(7, 1, b"ab"), "0003e889045565a9 00000007 00000001 00000002 6162"),
    (wire.pack_export_name_reply(0x200, 3, zeroes=False), "0000000000000200 0003"),
    (wire.pack_export_name_reply(0x200, 3, zeroes=True), "0000000000000200 0003" + "00" * 124),
    (wire.pack_info_request("ab", [1, 3]), "00000002 6162 0002 0001 0003"),
    (wire.pack_context_query("ab", ["x:y"]), "00000002 6162 00000001 00000003 783a79"),
    (wire.pack_server("ab", "cd"), "00000002 6162 6364"),
    (wire.pack_meta_context(9, "x:y"), "00000009 783a79"),
    (wire.pack_info_export(0x200, 3), "0000 0000000000000200 0003"),
    (wire.pack_info_block_size(1, 0x1000, 0x2000000), "0003 00000001 00001000 02000000"),
    (wire.pack_info_text(1, "ab"), "0001 6162"),
]


@pytest.mark.parametrize(("packed", "expected"), GOLDEN)
def test_a_handshake_message_has_the_bytes_the_spec_draws(packed: bytes, expected: str) -> None:
    assert packed.hex() == expected.replace(" ", "")


@given(U32, st.binary(max_size=20))
def test_an_option_survives_the_wire(option: int, data: bytes) -> None:
    assert wire.unpack_option(wire.pack_option(option, data)) == (option, len(data))


@given(U32, U32, st.binary(max_size=20))
def test_an_option_reply_survives_the_wire(option: int, kind: int, data: bytes) -> None:
    header = wire.unpack_option_reply(wire.pack_option_reply(option, kind, data))
    assert header == OptionReplyHeader(option, kind, len(data))


@given(U64, U16, st.booleans())
def test_size_and_flags_survive_the_wire(size: int, flags: int, zeroes: bool) -> None:
    assert wire.unpack_export_name_reply(wire.pack_export_name_reply(size, flags, zeroes=zeroes)) == (size, flags)
    assert wire.unpack_info_export(wire.pack_info_export(size, flags)) == (size, flags)


@given(TEXT, st.lists(U16, max_size=5))
def test_an_info_request_survives_the_wire(name: str, infos: list[int]) -> None:
    assert wire.unpack_info_request(wire.pack_info_request(name, infos)) == InfoRequest(name, tuple(infos))


@given(TEXT, st.lists(TEXT, max_size=5))
def test_a_context_query_survives_the_wire(name: str, queries: list[str]) -> None:
    assert wire.unpack_context_query(wire.pack_context_query(name, queries)) == ContextQuery(name, tuple(queries))


@given(U32, TEXT)
def test_a_metadata_context_survives_the_wire(number: int, name: str) -> None:
    assert wire.unpack_meta_context(wire.pack_meta_context(number, name)) == (number, name)


@given(TEXT, TEXT)
def test_an_export_entry_survives_the_wire(name: str, description: str) -> None:
    assert wire.unpack_server(wire.pack_server(name, description)) == (name.encode(), description.encode())


@given(U32, U32, U32)
def test_block_sizes_survive_the_wire(minimum: int, preferred: int, maximum: int) -> None:
    payload = wire.pack_info_block_size(minimum, preferred, maximum)
    assert wire.unpack_info_block_size(payload) == (minimum, preferred, maximum)


LONG = wire.LENGTH.pack(4097) + b"a" * 4097


@pytest.mark.parametrize(
    ("unpack", "payload", "sentence"),
    [
        (wire.unpack_info_request, b"\0\0", "the length of an export name is missing"),
        (wire.unpack_info_request, b"\0\0\0\5ab", "an export name of 5 bytes where 2 are left"),
        (wire.unpack_info_request, b"\0\0\0\2ab", "the number of information requests is missing"),
        (wire.unpack_info_request, b"\0\0\0\2ab\0\2\0\0", "2 information requests in 2 bytes"),
        (wire.unpack_info_request, b"\0\0\0\1\xff\0\0", "an export name that is no UTF-8"),
        (wire.unpack_info_request, b"\0\0\0\1\0\0\0", "an export name with a NUL in it"),
        (wire.unpack_info_request, LONG, "an export name of 4097 bytes, at most 4096 are allowed"),
        (wire.unpack_context_query, b"\0\0\0\0\0", "the number of queries is missing"),
        (wire.unpack_context_query, b"\0\0\0\0\xff\xff\xff\xff", "4294967295 queries in 0 bytes"),
        (wire.unpack_context_query, b"\0\0\0\0\0\0\0\0x", "1 bytes after the last query"),
        (wire.unpack_server, b"\0\0\0", "an export's entry of 3 bytes"),
        (wire.unpack_server, b"\0\0\0\5ab", "an export name of 5 bytes in an entry of 6 bytes"),
        (wire.unpack_meta_context, b"\0\0\0", "a metadata context of 3 bytes"),
        (wire.unpack_meta_context, b"\0\0\0\1\xff", "a metadata context name that is no UTF-8"),
        (wire.unpack_info_export, bytes(13), "NBD_INFO_EXPORT of 13 bytes instead of 12"),
        (wire.unpack_info_block_size, bytes(13), "NBD_INFO_BLOCK_SIZE of 13 bytes instead of 14"),
        (wire.unpack_info_type, b"\0", "NBD_REP_INFO of 1 bytes"),
        (wire.unpack_option, bytes(16), "magic number 0x0 instead of 0x49484156454f5054"),
        (wire.unpack_option_reply, bytes(20), "magic number 0x0 instead of 0x3e889045565a9"),
    ],
)
def test_a_payload_that_contradicts_itself_is_malformed(unpack: object, payload: bytes, sentence: str) -> None:
    assert callable(unpack)
    with pytest.raises(Malformed) as caught:
        unpack(payload)
    assert str(caught.value) == sentence


def test_a_peers_text_cannot_move_the_cursor_and_is_bounded() -> None:
    assert wire.printable(b"disk\x1b[2J\r\n\xff") == "disk�[2J���"
    assert wire.printable(b"a" * 5000) == "a" * 4096
    assert wire.printable("größe".encode()) == "größe"
