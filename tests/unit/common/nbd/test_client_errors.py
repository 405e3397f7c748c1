"""What a server may do wrong in the transmission phase, and what a caller may: each text is asserted here."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import BugError, IllegalEvent, ProtocolError
from nbdshard.common.nbd.client import Client
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.sinks import BufferSink
from nbdshard.common.nbd.states import ClientState
from nbdshard.common.nbd.wire import (
    pack_block_status,
    pack_error,
    pack_hole,
    pack_simple_reply,
)
from nbdshard.common.ranges import Range
from support.nbd_feeding import ALL_FLAGS, MIB, an_export, chunk, data_chunk, feed_client, send_all

READ, WRITE, STATUS, FLUSH = 0, 1, 2, 3  # the handles of the requests of `busy`


def busy(mode: str) -> Client:
    """A client with one request of each kind under way."""
    client = Client(an_export(mode=mode), "srv", 8)
    client.read(READ, Range.of(4096, 4096), memoryview(bytearray(4096)), dont_fragment=mode == "extended")
    client.write(WRITE, Range.of(0, 512), [bytes(512)])
    if mode != "simple":
        client.block_status(STATUS, Range.of(4096, 4096))
    client.flush(FLUSH)
    send_all(client)
    return client


def extended(kind: int, cookie: int, payload: bytes = b"", *, done: bool = True, offset: int = 4096) -> bytes:
    return chunk(int(done), kind, cookie, payload, extended=True, offset=offset)


def header(kind: int, cookie: int, length: int) -> bytes:
    """A structured header that announces more than comes."""
    return chunk(1, kind, cookie)[:16] + length.to_bytes(4, "big")


PEER = "srv: protocol error in "
REPLY = PEER + "a reply: "
TO_READ = PEER + "the reply to NBD_CMD_READ of [4096, 8192): "
TO_WRITE = PEER + "the reply to NBD_CMD_WRITE of [0, 512): "
TO_STATUS = PEER + "the reply to NBD_CMD_BLOCK_STATUS of [4096, 8192): "
TO_FLUSH = PEER + "the reply to NBD_CMD_FLUSH: "
NO_REPLY = ", which starts no reply on this connection"

BROKEN = [
    # which reply it is
    ("simple", bytes(16), REPLY + "magic number 0x0" + NO_REPLY),
    ("simple", chunk(1, 0, FLUSH), REPLY + "magic number 0x668e33ef" + NO_REPLY),
    ("structured", extended(0, FLUSH), REPLY + "magic number 0x6e8a278c" + NO_REPLY),
    ("extended", pack_simple_reply(FLUSH), REPLY + "magic number 0x67446698" + NO_REPLY),
    ("extended", chunk(1, 0, FLUSH), REPLY + "magic number 0x668e33ef" + NO_REPLY),
    ("simple", pack_simple_reply(7), REPLY + "a reply with cookie 7, which no pending request has"),
    ("structured", chunk(1, 0, 8), REPLY + "a reply with cookie 8, which no pending request has"),
    (
        "structured",
        chunk(1, 0, (1 << 64) - 1),
        REPLY + "a reply with cookie 18446744073709551615, which no pending request has",
    ),
    (
        "structured",
        chunk(1, 0, FLUSH) * 2,
        REPLY + "a reply with cookie 3, which no pending request has",
    ),
    (
        "extended",
        extended(0, FLUSH, offset=1),
        PEER + "the reply to NBD_CMD_FLUSH: a reply for offset 1 to a request for offset 0",
    ),
    # the wrong kind of reply
    (
        "structured",
        pack_simple_reply(READ, 5),
        TO_READ + "a simple reply with payload where structured replies were agreed on",
    ),
    (
        "structured",
        chunk(0, 0x8001, WRITE, pack_error(5)) + pack_simple_reply(WRITE),
        TO_WRITE + "a simple reply after structured chunks",
    ),
    ("structured", data_chunk(WRITE, 0, b"data"), TO_WRITE + "NBD_REPLY_TYPE_OFFSET_DATA, which is no answer to it"),
    (
        "structured",
        chunk(1, 2, STATUS, pack_hole(4096, 4096)),
        TO_STATUS + "NBD_REPLY_TYPE_OFFSET_HOLE, which is no answer to it",
    ),
    (
        "structured",
        chunk(1, 5, READ, pack_block_status(7, [(1, 0)])),
        TO_READ + "NBD_REPLY_TYPE_BLOCK_STATUS, which is no answer to it",
    ),
    (
        "structured",
        chunk(1, 6, STATUS, pack_block_status(7, [(1, 0)], wide=True)),
        TO_STATUS + "NBD_REPLY_TYPE_BLOCK_STATUS_EXT where extended headers were not agreed on",
    ),
    ("structured", chunk(1, 99, FLUSH), TO_FLUSH + "a chunk of unknown type 99"),
    ("structured", chunk(0, 0, FLUSH), TO_FLUSH + "NBD_REPLY_TYPE_NONE without NBD_REPLY_FLAG_DONE"),
    # lengths
    ("structured", chunk(1, 0, FLUSH, b"x"), TO_FLUSH + "NBD_REPLY_TYPE_NONE of 1 bytes"),
    ("structured", data_chunk(READ, 4096, b""), TO_READ + "NBD_REPLY_TYPE_OFFSET_DATA of 8 bytes"),
    ("structured", header(1, READ, 4) + bytes(8), TO_READ + "NBD_REPLY_TYPE_OFFSET_DATA of 4 bytes"),
    ("structured", header(2, READ, 13), TO_READ + "NBD_REPLY_TYPE_OFFSET_HOLE of 13 bytes"),
    ("structured", header(5, STATUS, 4), TO_STATUS + "NBD_REPLY_TYPE_BLOCK_STATUS of 4 bytes"),
    ("structured", header(5, STATUS, 13), TO_STATUS + "NBD_REPLY_TYPE_BLOCK_STATUS of 13 bytes"),
    (
        "structured",
        header(5, STATUS, 4 + 8 * ((1 << 20) + 1)),
        TO_STATUS + "NBD_REPLY_TYPE_BLOCK_STATUS of 8388620 bytes",
    ),
    ("structured", header(0x8001, FLUSH, 5), TO_FLUSH + "NBD_REPLY_TYPE_ERROR of 5 bytes"),
    ("structured", header(0x8001, FLUSH, 8193), TO_FLUSH + "NBD_REPLY_TYPE_ERROR of 8193 bytes"),
    ("structured", header(0x8099, FLUSH, 1 << 31), TO_FLUSH + "NBD_REPLY_TYPE_ERROR of 2147483648 bytes"),
    (
        "structured",
        chunk(1, 0x8001, FLUSH, pack_error(5, b"a" * 4097)),
        TO_FLUSH + "an error message of 4097 bytes",
    ),
    (
        "structured",
        chunk(1, 0x8001, FLUSH, b"\0\0\0\5\0\5no"),
        TO_FLUSH + "an error message of 5 bytes in a chunk of 8 bytes",
    ),
    ("structured", chunk(1, 0x8001, FLUSH, pack_error(0)), TO_FLUSH + "an error chunk whose error value is 0"),
    # data
    (
        "structured",
        data_chunk(READ, 4095, b"ab"),
        TO_READ + "data for [4095, 4097), outside of the request [4096, 8192)",
    ),
    (
        "structured",
        data_chunk(READ, 8191, b"ab"),
        TO_READ + "data for [8191, 8193), outside of the request [4096, 8192)",
    ),
    (
        "structured",
        header(1, READ, 0xFFFFFFFF) + (4096).to_bytes(8, "big"),
        TO_READ + "data for [4096, 4294971383), outside of the request [4096, 8192)",
    ),
    (
        "structured",
        chunk(1, 2, READ, pack_hole(4096, 4097)),
        TO_READ + "data for [4096, 8193), outside of the request [4096, 8192)",
    ),
    ("structured", chunk(1, 2, READ, pack_hole(4096, 0)), TO_READ + "a chunk with no data"),
    (
        "structured",
        data_chunk(READ, 4096, b"abcd") + data_chunk(READ, 4099, b"efgh"),
        TO_READ + "data for [4099, 4103), some of which has come before",
    ),
    (
        "structured",
        data_chunk(READ, 5000, b"abcd") + chunk(0, 2, READ, pack_hole(4096, 1000)),
        TO_READ + "data for [4096, 5096), some of which has come before",
    ),
    (
        "structured",
        data_chunk(READ, 4096, b"abcd", done=True),
        TO_READ + "success, but only 4 of 4096 bytes came",
    ),
    ("structured", chunk(1, 0, READ), TO_READ + "success, but only 0 of 4096 bytes came"),
    (
        "structured",
        data_chunk(READ, 4096, b"a") + data_chunk(READ, 4098, b"b") + chunk(1, 0, READ),
        TO_READ + "success, but only 2 of 4096 bytes came",
    ),
    (
        "extended",
        extended(2, READ, pack_hole(4096, 8), done=False) + extended(2, READ, pack_hole(4104, 8)),
        TO_READ + "a second content chunk in a reply that must not be fragmented",
    ),
    (
        "structured",
        b"".join(data_chunk(READ, 4096 + at, b"a") for at in range(73)),
        TO_READ + "73 chunks in a reply of 4096 bytes",
    ),
    (
        "structured",
        chunk(0, 0x8001, FLUSH, pack_error(5)) * 65,
        TO_FLUSH + "65 chunks in a reply of 0 bytes",
    ),
    (
        "structured",
        chunk(1, 0x8002, READ, pack_error(5, b"", 8192)),
        TO_READ + "an error at offset 8192, outside of the request [4096, 8192)",
    ),
    # extents
    (
        "structured",
        chunk(1, 5, STATUS, pack_block_status(8, [(4096, 0)])),
        TO_STATUS + "block status of metadata context id 8, which was not negotiated",
    ),
    (
        "structured",
        chunk(0, 5, STATUS, pack_block_status(7, [(4096, 0)])) * 2,
        TO_STATUS + "block status of metadata context id 7 twice",
    ),
    (
        "structured",
        chunk(1, 5, STATUS, pack_block_status(7, [(512, 0), (0, 3)])),
        TO_STATUS + "an extent of no length",
    ),
    (
        "extended",
        extended(6, STATUS, b"\0\0\0\7\0\0\0\2" + bytes(15) + b"\1"),
        TO_STATUS + "2 descriptors announced in a chunk of 24 bytes",
    ),
    ("structured", chunk(1, 0, STATUS), TO_STATUS + "success, but no extents of base:allocation came"),
    ("structured", pack_simple_reply(STATUS), TO_STATUS + "success, but no extents of base:allocation came"),
]


@pytest.mark.parametrize(("mode", "stream", "text"), BROKEN)
@pytest.mark.parametrize("byte_by_byte", [False, True])
def test_a_server_that_breaks_the_protocol_is_not_listened_to_any_more(
    mode: str, stream: bytes, text: str, byte_by_byte: bool
) -> None:
    client = busy(mode)
    with pytest.raises(ProtocolError) as caught:
        feed_client(client, stream, [1] * len(stream) if byte_by_byte else None)
    assert str(caught.value) == text
    assert client.state is ClientState.FAILED
    assert client.data_to_send() == []
    assert client.pending_handles()
    for event in (client.receive_target, lambda: client.received(1), lambda: client.sent(1), client.end_of_stream):
        with pytest.raises(IllegalEvent):
            event()


def test_a_reply_to_a_request_that_never_left_is_refused() -> None:
    client = Client(an_export(), "srv", 8)
    client.flush(0)
    with pytest.raises(ProtocolError, match="a reply with cookie 0, which no pending request has"):
        feed_client(client, chunk(1, 0, 0))


def test_a_second_reply_before_the_first_was_told_is_refused() -> None:
    client = Client(an_export(), "srv", 8)
    client.flush(0)
    client.data_to_send()
    assert feed_client(client, chunk(1, 0, 0)) == []
    with pytest.raises(ProtocolError, match="a second reply to NBD_CMD_FLUSH with cookie 0"):
        feed_client(client, chunk(1, 0, 0))


# -- misuse ------------------------------------------------------------------------------------------------------------

KIB4 = Range.of(4096, 4096)
BUFFER = memoryview(bytearray(4096))
READ_ONLY = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_TRIM
BARE = TransmissionFlag.HAS_FLAGS

MISUSE = [
    (ALL_FLAGS, lambda client: client.flush(7), "a request with handle 7, which is taken"),
    (ALL_FLAGS, lambda client: client.flush(8), "a request with handle 8 of 8"),
    (ALL_FLAGS, lambda client: client.flush(-1), "a request with handle -1 of 8"),
    (READ_ONLY, lambda client: client.write(0, KIB4, [BUFFER]), "NBD_CMD_WRITE on a read-only export"),
    (READ_ONLY, lambda client: client.trim(0, KIB4), "NBD_CMD_TRIM on a read-only export"),
    (BARE, lambda client: client.flush(0), "NBD_CMD_FLUSH where the export does not set NBD_FLAG_SEND_FLUSH"),
    (BARE, lambda client: client.trim(0, KIB4), "NBD_CMD_TRIM where the export does not set NBD_FLAG_SEND_TRIM"),
    (
        BARE,
        lambda client: client.write_zeroes(0, KIB4),
        "NBD_CMD_WRITE_ZEROES where the export does not set NBD_FLAG_SEND_WRITE_ZEROES",
    ),
    (BARE, lambda client: client.cache(0, KIB4), "NBD_CMD_CACHE where the export does not set NBD_FLAG_SEND_CACHE"),
    (
        BARE,
        lambda client: client.write(0, KIB4, [BUFFER], fua=True),
        "NBD_CMD_WRITE with <CommandFlag.FUA: 1>, which is not exposed",
    ),
    (
        BARE,
        lambda client: client.read(0, KIB4, BUFFER, dont_fragment=True),
        "NBD_CMD_READ with <CommandFlag.DF: 4>, which is not exposed",
    ),
    (
        ALL_FLAGS,
        lambda client: client.submit(0, 4, KIB4, flags=2),
        "NBD_CMD_TRIM with <CommandFlag.NO_HOLE: 2>, which is not exposed",
    ),
    (
        ALL_FLAGS,
        lambda client: client.read(0, Range(16 * MIB - 4096, 16 * MIB + 1), memoryview(bytearray(4097))),
        "NBD_CMD_READ of [16773120, 16777217) where the export ends at 16777216",
    ),
    (ALL_FLAGS, lambda client: client.submit(0, 99, None), "command 99 is not in the table of commands"),
    (ALL_FLAGS, lambda client: client.submit(0, 2, None), "NBD_CMD_DISC is not in the table of commands"),
    (ALL_FLAGS, lambda client: client.submit(0, 3, KIB4), "NBD_CMD_FLUSH with the range [4096, 8192)"),
    (ALL_FLAGS, lambda client: client.submit(0, 4, None), "NBD_CMD_TRIM with the range None"),
    (
        ALL_FLAGS,
        lambda client: client.write(0, KIB4, [b"short"]),
        "NBD_CMD_WRITE of 4096 bytes with 5 bytes of payload",
    ),
    (
        ALL_FLAGS,
        lambda client: client.submit(0, 4, KIB4, payload=[b"data"]),
        "NBD_CMD_TRIM of 4096 bytes with 4 bytes of payload",
    ),
    (
        ALL_FLAGS,
        lambda client: client.read(0, KIB4, BUFFER[1:]),
        "NBD_CMD_READ of 4096 bytes into a buffer of 4095",
    ),
    (
        ALL_FLAGS,
        lambda client: client.read(0, KIB4, memoryview(bytes(4096))),
        "a read needs a buffer that is writable and contiguous",
    ),
    (
        ALL_FLAGS,
        lambda client: client.write(0, KIB4, [memoryview(bytes(8192))[::2]]),
        "payload that is not contiguous",
    ),
    (ALL_FLAGS, lambda client: client.submit(0, 0, KIB4), "NBD_CMD_READ without a place for payload"),
    (
        ALL_FLAGS,
        lambda client: client.submit(0, 4, KIB4, sink=BufferSink(BUFFER)),
        "NBD_CMD_TRIM with a place for payload",
    ),
]


@pytest.mark.parametrize(("flags", "misuse", "text"), MISUSE)
def test_misuse_raises_and_changes_nothing(flags: TransmissionFlag, misuse: object, text: str) -> None:
    client = Client(an_export(flags=flags), "srv", 8)
    client.block_status(7, KIB4)
    assert callable(misuse)
    with pytest.raises(BugError) as caught:
        misuse(client)
    assert text in str(caught.value)
    assert client.pending_handles() == [7]
    assert [len(data) for data in client.data_to_send()] == [28]


def test_block_status_needs_base_allocation() -> None:
    client = Client(an_export(contexts={"x:y": 1}), "srv", 8)
    with pytest.raises(BugError, match=r"^NBD_CMD_BLOCK_STATUS where base:allocation was not agreed on$"):
        client.block_status(0, KIB4)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (Range(512, 8192), r"NBD_CMD_READ of \[512, 8192\) where the minimum block size is 4096"),
        (Range(4096, 8000), r"NBD_CMD_READ of \[4096, 8000\) where the minimum block size is 4096"),
        (Range(0, 69632), r"NBD_CMD_READ of \[0, 69632\) where the maximum block size is 65536"),
    ],
)
def test_the_servers_block_sizes_are_kept(where: Range, text: str) -> None:
    sizes = BlockSizes(4096, 4096, 65536, advertised=True)
    client = Client(an_export(block_sizes=sizes), "srv", 8)
    with pytest.raises(BugError, match=text):
        client.read(0, where, memoryview(bytearray(where.length)))
    client.trim(0, Range(0, 69632))


def test_a_compact_request_has_32_bits_of_length() -> None:
    huge = Range(0, 1 << 32)
    client = Client(an_export(1 << 40), "srv", 8)
    with pytest.raises(BugError, match=r"^NBD_CMD_WRITE_ZEROES of \[0, 4294967296\), too long for a compact request$"):
        client.write_zeroes(0, huge)
    client = Client(an_export(1 << 40, mode="extended"), "srv", 8)
    client.write_zeroes(0, huge)
    assert client.pending == 1


def test_bytes_are_accounted_for() -> None:
    client = Client(an_export(), "srv", 8)
    client.flush(0)
    with pytest.raises(IllegalEvent, match="1 bytes sent of 0 handed out"):
        client.sent(1)
    client.data_to_send()
    with pytest.raises(IllegalEvent, match="29 bytes sent of 28 handed out"):
        client.sent(29)
    with pytest.raises(IllegalEvent, match="1 bytes received of 0 offered"):
        client.received(1)
    offered = len(client.receive_target()[0])
    with pytest.raises(IllegalEvent, match=f"{offered + 1} bytes received of {offered} offered"):
        client.received(offered + 1)
