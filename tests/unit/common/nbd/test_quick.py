"""What is plain traffic, byte for byte; and that whatever differs from it in a single bit is ODD."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from nbdshard.common.nbd.client import Arriving, Client, Done
from nbdshard.common.nbd.constants import Command
from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.nbd.quick import ODD, Quick, quick
from nbdshard.common.nbd.sinks import DrainSink
from nbdshard.common.ranges import Range
from support.nbd_feeding import an_export, feed_client, scatter, send_all

MODES = ["simple", "structured", "extended"]

# By cookie: 1 and 3 are outstanding, 0 and 2 are not, and there is no 4.
STARTS = [0x7000, 0x1000, 0x200000, 0x200000]
LENGTHS = [0, 0x200, 0, 0x10000]


def a_quick(mode: str) -> Quick:
    return quick(an_export(mode=mode))


def as_bytes(drawn: str) -> bytearray:
    return bytearray.fromhex(drawn)


# -- requests ----------------------------------------------------------------------------------------------------------

COMPACT_REQUESTS: list[tuple[Callable[[Quick], bytes], str]] = [
    (lambda quick: quick.read(10, 0x1000, 0x200), "25609513 0000 0000 000000000000000a 0000000000001000 00000200"),
    (lambda quick: quick.write(10, 0x1000, 0x200), "25609513 0000 0001 000000000000000a 0000000000001000 00000200"),
    (lambda quick: quick.zero(10, 0x1000, 0x200), "25609513 0000 0006 000000000000000a 0000000000001000 00000200"),
    (lambda quick: quick.flush(10), "25609513 0000 0003 000000000000000a 0000000000000000 00000000"),
]
EXTENDED_REQUESTS: list[tuple[Callable[[Quick], bytes], str]] = [
    (
        lambda quick: quick.read(10, 0x1000, 0x200),
        "21e41c71 0000 0000 000000000000000a 0000000000001000 0000000000000200",
    ),
    (
        lambda quick: quick.write(10, 0x1000, 0x200),
        "21e41c71 0020 0001 000000000000000a 0000000000001000 0000000000000200",
    ),
    (
        lambda quick: quick.zero(10, 0x1000, 0x200),
        "21e41c71 0000 0006 000000000000000a 0000000000001000 0000000000000200",
    ),
    (lambda quick: quick.flush(10), "21e41c71 0000 0003 000000000000000a 0000000000000000 0000000000000000"),
]


@pytest.mark.parametrize(
    ("mode", "request_of", "drawn"),
    [
        *(("simple", *each) for each in COMPACT_REQUESTS),
        *(("structured", *each) for each in COMPACT_REQUESTS),
        *(("extended", *each) for each in EXTENDED_REQUESTS),
    ],
)
def test_a_request_has_the_bytes_the_spec_draws(mode: str, request_of: Callable[[Quick], bytes], drawn: str) -> None:
    assert request_of(a_quick(mode)) == as_bytes(drawn)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cookie", "where"),
    [
        (0, Range.of(0, 1)),
        (255, Range.of(4096, 256 * 1024)),
        (259, Range.of((1 << 40) - 512, 512)),
        (299, Range.of(0x0102030405, 0x010203)),
    ],
)
def test_a_request_is_what_the_client_itself_would_send(mode: str, cookie: int, where: Range) -> None:
    export = an_export(1 << 40, mode=mode)
    ours = quick(export)
    client = Client(export, "srv", 300)
    client.submit(cookie, Command.READ, where, sink=DrainSink())
    assert send_all(client)[0] == ours.read(cookie, where.start, where.length)
    client = Client(export, "srv", 300)
    client.write(cookie, where, [bytes(where.length)])
    assert in_memory(client.data_to_send())[0] == ours.write(cookie, where.start, where.length)
    client = Client(export, "srv", 300)
    client.write_zeroes(cookie, where, no_hole=False)
    assert send_all(client)[0] == ours.zero(cookie, where.start, where.length)
    client = Client(export, "srv", 300)
    client.flush(cookie)
    assert send_all(client)[0] == ours.flush(cookie)


@pytest.mark.parametrize("mode", MODES)
def test_the_longest_compact_request_is_what_the_client_itself_would_send(mode: str) -> None:
    export = an_export(1 << 40, mode=mode, block_sizes=BlockSizes(maximum=0xFFFFFFFF))
    client = Client(export, "srv", 1)
    client.submit(0, Command.READ, Range.of(512, 0xFFFFFFFF), sink=DrainSink())
    assert send_all(client)[0] == quick(export).read(0, 512, 0xFFFFFFFF)


# -- plain replies -----------------------------------------------------------------------------------------------------

PLAIN_HEADS = {
    "simple": "67446698 00000000 0000000000000003",
    "structured": "668e33ef 0001 0001 0000000000000003 00010008 0000000000200000",
    "extended": "6e8a278c 0001 0001 0000000000000003 0000000000200000 0000000000010008 0000000000200000",
}
PLAIN_ACKS = {
    "simple": "67446698 00000000 0000000000000003",
    "structured": "67446698 00000000 0000000000000003",
    "extended": "6e8a278c 0001 0000 0000000000000003 0000000000200000 0000000000000000",
}


@pytest.mark.parametrize("mode", MODES)
def test_the_head_of_a_plain_reply_to_a_read_names_its_cookie(mode: str) -> None:
    head = as_bytes(PLAIN_HEADS[mode])
    assert a_quick(mode).head_bytes == len(head)
    assert a_quick(mode).head(head, STARTS, LENGTHS) == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_reply_to_a_write_names_its_cookie(mode: str) -> None:
    ack = as_bytes(PLAIN_ACKS[mode])
    assert a_quick(mode).ack_bytes == len(ack)
    assert a_quick(mode).ack(ack, 0, STARTS, LENGTHS) == 3


@pytest.mark.parametrize("mode", MODES)
def test_acks_are_found_wherever_they_are(mode: str) -> None:
    ours = a_quick(mode)
    third = as_bytes(PLAIN_ACKS[mode])
    first = third.replace(b"\3", b"\1")
    received = first + third + first
    starts = [0, 0x200000, 0, 0x200000]
    assert [ours.ack(received, at * ours.ack_bytes, starts, LENGTHS) for at in range(3)] == [1, 3, 1]


@pytest.mark.parametrize("mode", MODES)
def test_the_first_cookie_is_a_cookie_like_any_other(mode: str) -> None:
    ours = a_quick(mode)
    head = as_bytes(PLAIN_HEADS[mode].replace("0000000000000003", "0000000000000000"))
    ack = as_bytes(PLAIN_ACKS[mode].replace("0000000000000003", "0000000000000000"))
    assert ours.head(head, [0x200000], [0x10000]) == 0
    assert ours.ack(ack, 0, [0x200000], [1]) == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_head_is_all_that_the_client_would_receive_in_front_of_the_payload(mode: str) -> None:
    client = Client(an_export(mode=mode), "srv", 8)
    client.read(3, Range.of(0x200000, 0x10000), memoryview(bytearray(0x10000)))
    assert [len(view) for view in client.receive_target()] == [a_quick(mode).head_bytes]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_plain_is_a_success_to_the_client_too(mode: str) -> None:
    client = Client(an_export(mode=mode), "srv", 8)
    client.read(3, Range.of(0x200000, 0x10000), memoryview(bytearray(0x10000)))
    send_all(client)
    head = memoryview(as_bytes(PLAIN_HEADS[mode]))
    assert client.received(scatter(client.receive_target(), head)) == [Arriving(3)]
    assert client.payload_left == 0x10000
    assert feed_client(client, bytes(0x10000)) == [Done(3)]
    client.write(3, Range.of(0x200000, 0x10000), [bytes(0x10000)])
    send_all(client)
    assert feed_client(client, bytes.fromhex(PLAIN_ACKS[mode])) == [Done(3)]


# -- whatever is anything else -----------------------------------------------------------------------------------------

SIMPLE_REPLY_ODDITIES = {
    "another magic": "67446699 00000000 0000000000000003",
    "a request's magic": "25609513 00000000 0000000000000003",
    "an error": "67446698 00000005 0000000000000003",
    "an error in the highest byte": "67446698 01000000 0000000000000003",
    "a cookie with nothing outstanding": "67446698 00000000 0000000000000002",
    "a cookie that does not exist": "67446698 00000000 0000000000000004",
    "the largest cookie": "67446698 00000000 ffffffffffffffff",
    "a cookie that is ours in its lower half only": "67446698 00000000 0000000100000003",
    "a structured chunk": "668e33ef 0001 0000 0000000000000003",
    "nothing at all": "00000000 00000000 0000000000000000",
}
STRUCTURED_HEAD_ODDITIES = {
    "another magic": "668e33ee 0001 0001 0000000000000003 00010008 0000000000200000",
    "an extended magic": "6e8a278c 0001 0001 0000000000000003 00010008 0000000000200000",
    "a simple reply, and more": "67446698 00000000 0000000000000003 000000000000000000000000",
    "not DONE": "668e33ef 0000 0001 0000000000000003 00010008 0000000000200000",
    "an unknown flag": "668e33ef 0003 0001 0000000000000003 00010008 0000000000200000",
    "NONE": "668e33ef 0001 0000 0000000000000003 00000000 668e33ef00010000",
    "a hole": "668e33ef 0001 0002 0000000000000003 0000000c 0000000000200000",
    "a hole as long as data": "668e33ef 0001 0002 0000000000000003 00010008 0000000000200000",
    "an error": "668e33ef 0001 8001 0000000000000003 00000008 00000005 00026e6f",
    "an error with an offset": "668e33ef 0001 8002 0000000000000003 0000000e 00000005 00000000",
    "a cookie with nothing outstanding": "668e33ef 0001 0001 0000000000000002 00000008 0000000000200000",
    "a cookie that does not exist": "668e33ef 0001 0001 0000000000000004 00010008 0000000000200000",
    "the largest cookie": "668e33ef 0001 0001 ffffffffffffffff 00010008 0000000000200000",
    "another outstanding cookie": "668e33ef 0001 0001 0000000000000001 00010008 0000000000200000",
    "a part of the data": "668e33ef 0001 0001 0000000000000003 00008008 0000000000200000",
    "a byte too many": "668e33ef 0001 0001 0000000000000003 00010009 0000000000200000",
    "a length without the offset's": "668e33ef 0001 0001 0000000000000003 00010000 0000000000200000",
    "a later offset": "668e33ef 0001 0001 0000000000000003 00010008 0000000000200001",
    "an offset from the request's start": "668e33ef 0001 0001 0000000000000003 00010008 0000000000000000",
}
EXTENDED_HEAD_ODDITIES = {
    "another magic": "6e8a278d 0001 0001 0000000000000003 0000000000200000 0000000000010008 0000000000200000",
    "a structured magic": "668e33ef 0001 0001 0000000000000003 0000000000200000 0000000000010008 0000000000200000",
    "not DONE": "6e8a278c 0000 0001 0000000000000003 0000000000200000 0000000000010008 0000000000200000",
    "an unknown flag": "6e8a278c 8001 0001 0000000000000003 0000000000200000 0000000000010008 0000000000200000",
    "NONE": "6e8a278c 0001 0000 0000000000000003 0000000000200000 0000000000000000 6e8a278c00010000",
    "a hole": "6e8a278c 0001 0002 0000000000000003 0000000000200000 000000000000000c 0000000000200000",
    "a hole as long as data": "6e8a278c 0001 0002 0000000000000003 0000000000200000 0000000000010008 0000000000200000",
    "an error": "6e8a278c 0001 8001 0000000000000003 0000000000200000 0000000000000008 00000005 00026e6f",
    "a cookie with nothing outstanding": (
        "6e8a278c 0001 0001 0000000000000002 0000000000200000 0000000000000008 0000000000200000"
    ),
    "a cookie that does not exist": (
        "6e8a278c 0001 0001 0000000000000004 0000000000200000 0000000000010008 0000000000200000"
    ),
    "the largest cookie": "6e8a278c 0001 0001 ffffffffffffffff 0000000000200000 0000000000010008 0000000000200000",
    "another outstanding cookie": (
        "6e8a278c 0001 0001 0000000000000001 0000000000200000 0000000000010008 0000000000200000"
    ),
    "a part of the data": "6e8a278c 0001 0001 0000000000000003 0000000000200000 0000000000008008 0000000000200000",
    "a byte too many": "6e8a278c 0001 0001 0000000000000003 0000000000200000 0000000000010009 0000000000200000",
    "a length of more than 32 bits": (
        "6e8a278c 0001 0001 0000000000000003 0000000000200000 0000000100010008 0000000000200000"
    ),
    "another request's": "6e8a278c 0001 0001 0000000000000003 0000000000001000 0000000000010008 0000000000200000",
    "a later offset": "6e8a278c 0001 0001 0000000000000003 0000000000200000 0000000000010008 0000000000200001",
    "both offsets wrong": "6e8a278c 0001 0001 0000000000000003 0000000000200001 0000000000010008 0000000000200001",
}
EXTENDED_ACK_ODDITIES = {
    "another magic": "6e8a278d 0001 0000 0000000000000003 0000000000200000 0000000000000000",
    "a simple reply": "67446698 00000000 0000000000000003 67446698000000000000000000000001",
    "not DONE": "6e8a278c 0000 0000 0000000000000003 0000000000200000 0000000000000000",
    "an unknown flag": "6e8a278c 0003 0000 0000000000000003 0000000000200000 0000000000000000",
    "data": "6e8a278c 0001 0001 0000000000000003 0000000000200000 0000000000010008",
    "data of no length": "6e8a278c 0001 0001 0000000000000003 0000000000200000 0000000000000000",
    "an error": "6e8a278c 0001 8001 0000000000000003 0000000000200000 0000000000000006",
    "an error of no length": "6e8a278c 0001 8001 0000000000000003 0000000000200000 0000000000000000",
    "a length": "6e8a278c 0001 0000 0000000000000003 0000000000200000 0000000000000001",
    "a length of more than 32 bits": "6e8a278c 0001 0000 0000000000000003 0000000000200000 0000000100000000",
    "a cookie with nothing outstanding": "6e8a278c 0001 0000 0000000000000002 0000000000200000 0000000000000000",
    "a cookie that does not exist": "6e8a278c 0001 0000 0000000000000004 0000000000200000 0000000000000000",
    "the largest cookie": "6e8a278c 0001 0000 ffffffffffffffff 0000000000200000 0000000000000000",
}
HEAD_ODDITIES = {
    "simple": SIMPLE_REPLY_ODDITIES,
    "structured": STRUCTURED_HEAD_ODDITIES,
    "extended": EXTENDED_HEAD_ODDITIES,
}
ACK_ODDITIES = {
    "simple": SIMPLE_REPLY_ODDITIES,
    "structured": SIMPLE_REPLY_ODDITIES,
    "extended": EXTENDED_ACK_ODDITIES,
}


def named(oddities: dict[str, dict[str, str]]) -> list[object]:
    return [pytest.param(mode, drawn, id=f"{mode}: {what}") for mode in MODES for what, drawn in oddities[mode].items()]


@pytest.mark.parametrize(("mode", "drawn"), named(HEAD_ODDITIES))
def test_a_reply_to_a_read_that_is_not_plain_is_odd(mode: str, drawn: str) -> None:
    head = as_bytes(drawn)
    assert len(head) == a_quick(mode).head_bytes
    assert a_quick(mode).head(head, STARTS, LENGTHS) == ODD


@pytest.mark.parametrize(("mode", "drawn"), named(ACK_ODDITIES))
def test_a_reply_to_a_write_that_is_not_plain_is_odd(mode: str, drawn: str) -> None:
    ack = as_bytes(drawn)
    assert len(ack) == a_quick(mode).ack_bytes
    assert a_quick(mode).ack(ack, 0, STARTS, LENGTHS) == ODD


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_plain_while_nothing_is_outstanding(mode: str) -> None:
    for starts, lengths in ((STARTS, [0, 0, 0, 0]), ([], [])):
        assert a_quick(mode).head(as_bytes(PLAIN_HEADS[mode]), starts, lengths) == ODD
        assert a_quick(mode).ack(as_bytes(PLAIN_ACKS[mode]), 0, starts, lengths) == ODD


def with_one_bit_flipped(plain: bytearray) -> Iterator[bytearray]:
    for bit in range(8 * len(plain)):
        flipped = bytearray(plain)
        flipped[bit // 8] ^= 1 << bit % 8
        yield flipped


@pytest.mark.parametrize("mode", MODES)
def test_a_head_or_an_ack_with_any_bit_flipped_is_odd(mode: str) -> None:
    only_3 = [0, 0, 0, 0x10000]
    for head in with_one_bit_flipped(as_bytes(PLAIN_HEADS[mode])):
        assert a_quick(mode).head(head, STARTS, only_3) == ODD, head.hex()
    for ack in with_one_bit_flipped(as_bytes(PLAIN_ACKS[mode])):
        assert a_quick(mode).ack(ack, 0, STARTS, only_3) == ODD, ack.hex()
