"""Streams of servers for the fuzzer: what a machine was asked, and a correct stream that answers it.

The recordings were taken from real servers: negotiation of a 10 MiB export, then READ of [4096, 4128),
WRITE of [0, 16), BLOCK_STATUS of [0, 65536) and FLUSH, one after the other. The others are made here, to have every
kind of message in every mode of reply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nbdshard.common.nbd.client import Client
from nbdshard.common.nbd.connecter import Connecter, Goal, Wishes
from nbdshard.common.nbd.constants import Info, Option, OptionReply
from nbdshard.common.nbd.wire import pack_block_status, pack_error, pack_hole, pack_simple_reply
from nbdshard.common.nbd.wire_options import (
    pack_export_name_reply,
    pack_greeting,
    pack_info_block_size,
    pack_info_export,
    pack_info_text,
    pack_meta_context,
    pack_option_reply,
    pack_server,
)
from nbdshard.common.ranges import Range
from support.nbd_feeding import GREETING, MIB, an_export, chunk

# nbdkit 1.32.5, memory plugin
NBDKIT = (
    "4e42444d4147494349484156454f505400030003e889045565a90000000b80000001000000000003e889045565a9000000080000000100"
    "0000000003e889045565a90000000a000000040000001300000001626173653a616c6c6f636174696f6e0003e889045565a90000000a00"
    "000001000000000003e889045565a900000007000000030000000c00000000000000a000000ded0003e889045565a90000000700000003"
    "0000000200010003e889045565a9000000070000000100000000",
    "668e33ef000100010000000000000000000000280000000000001000000000000000000000000000000000000000000000000000000000"
    "0000000000674466980000000000000000"
    "00000001668e33ef00010005000000000000000200000014000000010000800000000000000080000000000367446698000000000000"
    "000000000003",
)
# qemu-nbd 7.2, raw file
QEMU_NBD = (
    "4e42444d4147494349484156454f505400030003e889045565a90000000b8000000100000021556e737570706f72746564206f7074696f6e"
    "20313120283c756e6b6e6f776e3e290003e889045565a90000000800000001000000000003e889045565a90000000a00000004000000"
    "1300000000626173653a616c6c6f636174696f6e0003e889045565a90000000a00000001000000000003e889045565a900000007000000"
    "030000000600016469736b0003e889045565a900000007000000030000000e00030000000100001000020000000003e889045565a90000"
    "0007000000030000000c00000000000000a000000ced0003e889045565a9000000070000000100000000",
    "668e33ef0001000200000000000000000000000c0000000000001000000000206744669800000000000000000000"
    "0001668e33ef0001000500000000000000020000001c00000000000010000000000000001000000000030000e00000000000674466980000"
    "00000000000000000003",
)


@dataclass(frozen=True, slots=True)
class Case:
    """`start` gives the machine that awaits `stream` and the buffers its reads go to, guard bytes included."""

    name: str
    stream: bytes
    start: Callable[[], tuple[Connecter | Client, list[bytearray]]]


# Each read's buffer lies between guard bytes that nothing may touch.
GUARD = b"\xa5" * 64


def _guarded(length: int) -> tuple[bytearray, memoryview]:
    memory = bytearray(GUARD + bytes(length) + GUARD)
    return memory, memoryview(memory)[len(GUARD) : len(GUARD) + length]


def _connecter(wishes: Wishes) -> Callable[[], tuple[Connecter | Client, list[bytearray]]]:
    return lambda: (Connecter(wishes, "srv"), [])


def _recorded() -> tuple[Client, list[bytearray]]:
    client = Client(an_export(10 * MIB, contexts={"base:allocation": 1}), "srv", 4)
    memory, view = _guarded(32)
    client.read(0, Range.of(4096, 32), view)
    client.write(1, Range.of(0, 16), [bytes(16)])
    client.block_status(2, Range.of(0, 65536))
    client.flush(3)
    client.sent(sum(map(len, client.data_to_send())))
    return client, [memory]


def _busy(mode: str) -> Callable[[], tuple[Connecter | Client, list[bytearray]]]:
    def start() -> tuple[Client, list[bytearray]]:
        client = Client(an_export(mode=mode, contexts={"base:allocation": 7, "x:y": 8}), "srv", 8)
        memories = []
        for handle in (0, 1, 2):
            memory, view = _guarded(600)
            client.read(handle, Range.of(512 * handle, 600), view)
            memories.append(memory)
        client.write(3, Range.of(0, 8), [bytes(8)])
        if mode != "simple":
            client.block_status(4, Range.of(4096, 65536))
            client.block_status(5, Range.of(4096, 65536), one=True)
        client.flush(6)
        data = client.data_to_send()
        client.sent(sum(map(len, data)) - 30)  # the last request is still on its way out
        return client, memories

    return start


def _busy_stream(mode: str) -> bytes:
    if mode == "simple":
        stream = pack_simple_reply(1) + b"1" * 600 + pack_simple_reply(3) + pack_simple_reply(0, 5)
        return stream + pack_simple_reply(2) + b"2" * 600 + pack_simple_reply(6, 108)
    wide = mode == "extended"
    offsets = [0, 512, 1024, 0, 4096, 4096, 0]

    def one(flags: int, kind: int, handle: int, payload: bytes = b"") -> bytes:
        return chunk(flags, kind, handle, payload, extended=wide, offset=offsets[handle])

    def data(at: int, length: int) -> bytes:
        return at.to_bytes(8, "big") + b"d" * length

    status = pack_block_status(7, [(512, 0), (1024, 3), (1 << 20, 1)], wide=wide)
    other = pack_block_status(8, [(4096, 1)], wide=wide)
    stream = one(0, 1, 0, data(0, 100)) + one(0, 1, 1, data(612, 500)) + one(0, 2, 0, pack_hole(100, 500))
    stream += one(1, 0, 3) + one(0, 0x8002, 2, pack_error(5, b"bad sector", 1100)) + one(1, 1, 1, data(512, 100))
    stream += one(0, 6 if wide else 5, 4, other) + one(1, 0, 0) + one(1, 6 if wide else 5, 4, status)
    stream += one(1, 0x8099, 2, pack_error(12, b"from the future") + b"more")
    return stream + one(1, 6 if wide else 5, 5, status) + one(1, 0x8001, 6, pack_error(108, b"going down"))


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return pack_option_reply(option, kind, data)


def _negotiation(option: int) -> bytes:
    stream = GREETING + _reply(Option.EXTENDED_HEADERS, OptionReply.ACK)
    stream += _reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, pack_meta_context(7, "base:allocation"))
    stream += _reply(Option.SET_META_CONTEXT, OptionReply.ACK)
    for payload in (
        pack_info_export(MIB, 0x1FFF),
        pack_info_block_size(512, 4096, 1 << 25),
        pack_info_text(Info.NAME, "disk"),
        pack_info_text(Info.DESCRIPTION, "größe"),
    ):
        stream += _reply(option, OptionReply.INFO, payload)
    return stream + _reply(option, OptionReply.ACK)


def _listing() -> bytes:
    stream = GREETING
    for name in ("one", "two", ""):
        stream += _reply(Option.LIST, OptionReply.SERVER, pack_server(name, "described"))
    return stream + _reply(Option.LIST, OptionReply.ACK)


def _old() -> bytes:
    stream = pack_greeting(1) + _reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP, b"what?")
    stream += _reply(Option.STRUCTURED_REPLY, OptionReply.ERR_POLICY) + _reply(Option.GO, OptionReply.ERR_UNSUP)
    return stream + pack_export_name_reply(MIB, 3, zeroes=True)


CASES = [
    Case("nbdkit's negotiation", bytes.fromhex(NBDKIT[0]), _connecter(Wishes())),
    Case("qemu-nbd's negotiation", bytes.fromhex(QEMU_NBD[0]), _connecter(Wishes("disk"))),
    Case("nbdkit's replies", bytes.fromhex(NBDKIT[1]), _recorded),
    Case(
        "qemu-nbd's replies",
        bytes.fromhex(QEMU_NBD[1]).replace(b"\0\0\0\x1c\0\0\0\0", b"\0\0\0\x1c\0\0\0\1"),
        _recorded,
    ),
    Case("GO with extended headers", _negotiation(Option.GO), _connecter(Wishes("disk"))),
    Case("INFO", _negotiation(Option.INFO), _connecter(Wishes("disk", goal=Goal.INFO))),
    Case("LIST", _listing(), _connecter(Wishes(goal=Goal.LIST))),
    Case("EXPORT_NAME after GO", _old(), _connecter(Wishes("disk"))),
    Case("newstyle", pack_greeting(2) + pack_export_name_reply(MIB, 1, zeroes=False), _connecter(Wishes())),
    *(Case(f"{mode} replies", _busy_stream(mode), _busy(mode)) for mode in ("simple", "structured", "extended")),
]
