"""The bytes of the transmission phase, both directions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.nbd.constants import ReplyType
from nbdshard.common.nbd.wire import (
    Chunk,
    ErrorPayload,
    Malformed,
    Request,
    pack_block_status,
    pack_chunk,
    pack_error,
    pack_hole,
    pack_request,
    pack_simple_reply,
    unpack_block_status,
    unpack_chunk,
    unpack_error,
    unpack_hole,
    unpack_request,
    unpack_simple_reply,
)

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)

GOLDEN = [
    (
        pack_request(Request(1, 1, 0x0A, 0x1000, 0x200), extended=False),
        "25609513 0001 0001 000000000000000a 0000000000001000 00000200",
    ),
    (
        pack_request(Request(0x20, 1, 0x0A, 0x1000, 0x200), extended=True),
        "21e41c71 0020 0001 000000000000000a 0000000000001000 0000000000000200",
    ),
    (pack_simple_reply(0x0A, 5), "67446698 00000005 000000000000000a"),
    (pack_chunk(Chunk(1, 2, 0x0A, 0x1000, 12), extended=False), "668e33ef 0001 0002 000000000000000a 0000000c"),
    (
        pack_chunk(Chunk(1, 2, 0x0A, 0x1000, 12), extended=True),
        "6e8a278c 0001 0002 000000000000000a 0000000000001000 000000000000000c",
    ),
    (pack_hole(0x1000, 0x200), "0000000000001000 00000200"),
    (pack_error(5, b"no"), "00000005 0002 6e6f"),
    (pack_error(5, b"no", 0x1000), "00000005 0002 6e6f 0000000000001000"),
    (pack_block_status(7, [(0x200, 3), (0x400, 0)]), "00000007 00000200 00000003 00000400 00000000"),
    (
        pack_block_status(7, [(0x200, 3)], wide=True),
        "00000007 00000001 0000000000000200 0000000000000003",
    ),
]


@pytest.mark.parametrize(("packed", "expected"), GOLDEN)
def test_a_message_has_the_bytes_the_spec_draws(packed: bytes, expected: str) -> None:
    assert packed.hex() == expected.replace(" ", "")


@given(U16, U16, U64, U64, U32, st.booleans())
def test_a_request_survives_the_wire(
    flags: int, command: int, cookie: int, offset: int, length: int, extended: bool
) -> None:
    request = Request(flags, command, cookie, offset, length)
    assert unpack_request(pack_request(request, extended=extended), extended=extended) == request


@given(U64, U32)
def test_a_simple_reply_survives_the_wire(cookie: int, error: int) -> None:
    assert unpack_simple_reply(pack_simple_reply(cookie, error)) == (cookie, error)


@given(U16, U16, U64, U64, U32)
def test_a_chunk_survives_the_wire_and_only_the_extended_one_has_an_offset(
    flags: int, kind: int, cookie: int, offset: int, length: int
) -> None:
    chunk = Chunk(flags, kind, cookie, offset, length)
    assert unpack_chunk(pack_chunk(chunk, extended=True), extended=True) == chunk
    assert unpack_chunk(pack_chunk(chunk, extended=False), extended=False) == chunk._replace(offset=0)


@given(st.integers(1, (1 << 32) - 1), st.binary(max_size=50), st.none() | U64)
def test_an_error_payload_survives_the_wire(error: int, message: bytes, offset: int | None) -> None:
    kind = ReplyType.ERROR if offset is None else ReplyType.ERROR_OFFSET
    assert unpack_error(pack_error(error, message, offset), kind) == ErrorPayload(error, message, offset)


@given(U64, U32)
def test_a_hole_survives_the_wire(offset: int, length: int) -> None:
    assert unpack_hole(pack_hole(offset, length)) == (offset, length)


@given(U32, st.lists(st.tuples(U32, U32), min_size=1, max_size=5), st.booleans())
def test_block_status_survives_the_wire(context: int, descriptors: list[tuple[int, int]], wide: bool) -> None:
    payload = pack_block_status(context, descriptors, wide=wide)
    told, count, unpacked = unpack_block_status(payload, wide=wide)
    assert (told, count, list(unpacked)) == (context, len(descriptors) if wide else 0, descriptors)


def test_an_error_type_from_the_future_may_carry_more_behind_its_message() -> None:
    assert unpack_error(pack_error(5, b"no") + b"more", 0x8077) == ErrorPayload(5, b"no", None)


@pytest.mark.parametrize(
    ("payload", "kind", "sentence"),
    [
        (b"\0\0\0\5\0", ReplyType.ERROR, "an error chunk of 5 bytes, at least 6 are needed"),
        (b"\0\0\0\5\0\3no", ReplyType.ERROR, "an error message of 3 bytes in a chunk of 8 bytes"),
        (pack_error(0, b"no"), ReplyType.ERROR, "an error chunk whose error value is 0"),
        (pack_error(5, b"no"), ReplyType.ERROR_OFFSET, "NBD_REPLY_TYPE_ERROR_OFFSET of 8 bytes, 16 were announced"),
    ],
)
def test_an_error_payload_that_contradicts_itself_is_malformed(payload: bytes, kind: int, sentence: str) -> None:
    with pytest.raises(Malformed) as caught:
        unpack_error(payload, kind)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("extended", [False, True])
def test_another_magic_number_is_malformed_on_both_sides(extended: bool) -> None:
    for unpack in (unpack_request, unpack_chunk):
        with pytest.raises(Malformed, match=r"^magic number 0x0 instead of 0x[0-9a-f]{8}$"):
            unpack(bytes(40), extended=extended)
    with pytest.raises(Malformed, match=r"^magic number 0x0 instead of 0x67446698$"):
        unpack_simple_reply(bytes(16))
