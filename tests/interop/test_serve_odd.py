"""Lengths, options and commands that nobody expects: refused, and the next one is heard, or the client is cut off."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from nbdshard.common.limits import OPTIONS_MAX
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import Command, CommandFlag, Errno, Info, Option, OptionReply
from nbdshard.common.nbd.wire_options import (
    OPTION_REPLY,
    pack_context_query,
    pack_info_request,
    pack_option,
    unpack_option_reply,
)
from support.by_the_byte import FIXED, GO, asked, asked_widely, connected_by_tcp
from support.nbd_blocking import connect, negotiate, received
from support.served import NAME, Served, still_serves


def replies(peer: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """(option, reply type, payload) of what comes."""
    while True:
        header = unpack_option_reply(received(peer, OPTION_REPLY.size))
        yield header.option, header.type, received(peer, header.length) if header.length else b""


OPTIONS = {
    "nobody knows it": (pack_option(4711, b"what"), OptionReply.ERR_UNSUP),
    "TLS": (pack_option(Option.STARTTLS), OptionReply.ERR_UNSUP),
    "a withdrawn one": (pack_option(Option.PEEK_EXPORT, b"x"), OptionReply.ERR_UNSUP),
    "much data": (pack_option(4711, bytes(1 << 20)), OptionReply.ERR_TOO_BIG),
    "a name of 4 GiB": (pack_option(Option.GO, b"\xff" * 4 + bytes(2)), OptionReply.ERR_INVALID),
    "a name of 5000 bytes": (pack_option(Option.GO, pack_info_request("x" * 5000, [])), OptionReply.ERR_INVALID),
    "a name nobody has": (pack_option(Option.GO, pack_info_request("x" * 4096, [])), OptionReply.ERR_UNKNOWN),
    "more wishes than there are": (pack_option(Option.INFO, bytes(4) + b"\xff\xff"), OptionReply.ERR_INVALID),
    "all wishes at once": (
        pack_option(Option.INFO, pack_info_request(NAME, [Info.NAME, *range(30_000)])),
        OptionReply.ACK,
    ),
    "contexts without structure": (
        pack_option(Option.SET_META_CONTEXT, pack_context_query(NAME, ["base:allocation"])),
        OptionReply.ERR_INVALID,
    ),
    "a list with data": (pack_option(Option.LIST, b"x"), OptionReply.ERR_INVALID),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_an_odd_option_is_refused_and_the_next_one_is_heard(memory: Served, what: str) -> None:
    stream, expected = OPTIONS[what]
    with connected_by_tcp(memory) as peer:
        received(peer, 18)
        peer.sendall(FIXED + stream)
        found = replies(peer)
        kind = next(kind for _, kind, _ in found if kind != OptionReply.INFO)
        assert kind == expected
        peer.sendall(pack_option(Option.ABORT))
        assert next(found) == (Option.ABORT, OptionReply.ACK, b"")
        assert peer.recv(1) == b""


@pytest.mark.parametrize("queries", [["base:allocation"] * 3000, ["x:" + "y" * 4000] * 15, []])
def test_many_queries_are_answered_once(memory: Served, queries: list[str]) -> None:
    with connected_by_tcp(memory) as peer:
        received(peer, 18)
        peer.sendall(FIXED + pack_option(Option.STRUCTURED_REPLY))
        peer.sendall(pack_option(Option.SET_META_CONTEXT, pack_context_query(NAME, queries)))
        found = replies(peer)
        assert next(found)[1] == OptionReply.ACK
        kinds = [next(found)[1]]
        if kinds == [OptionReply.META_CONTEXT]:
            kinds.append(next(found)[1])
        assert kinds == ([OptionReply.META_CONTEXT] if "base:allocation" in queries else []) + [OptionReply.ACK]


CUT_OFF = {
    "a web browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "flags nobody knows": b"\0\0\0\xff",
    "an option of 4 GiB": FIXED + b"IHAVEOPT" + struct.pack(">II", Option.GO, 0xFFFFFFFF),
    "an option with another magic": FIXED + b"IHAVEOPS" + bytes(8),
    "options without end": FIXED + pack_option(Option.LIST) * (OPTIONS_MAX + 1),
    "a name that is none": FIXED + pack_option(Option.EXPORT_NAME, b"\xff"),
    "a name nobody has": FIXED + pack_option(Option.EXPORT_NAME, b"nothing"),
    "an option before fixed newstyle": bytes(4) + pack_option(Option.LIST),
    "no request": GO + bytes(28),
    "a payload of 4 GiB": GO + asked(Command.WRITE, 0, 0xFFFFFFFF),
    "a payload of 16 EiB": FIXED
    + pack_option(Option.EXTENDED_HEADERS)
    + GO[4:]
    + asked_widely(Command.WRITE, 0, (1 << 64) - 1, CommandFlag.PAYLOAD_LEN),
}


@pytest.mark.parametrize("what", CUT_OFF)
def test_who_breaks_the_protocol_is_cut_off(memory: Served, what: str) -> None:
    with connected_by_tcp(memory) as peer, contextlib.suppress(ConnectionResetError):
        peer.sendall(CUT_OFF[what])
        while peer.recv(1 << 16):
            pass
    still_serves(memory)


WIDE = {
    "a read": (asked_widely(Command.READ, 0, 1 << 40), Errno.EINVAL),
    "a read from the end of the world": (asked_widely(Command.READ, (1 << 64) - 1, (1 << 64) - 1), Errno.EINVAL),
    "zeroes": (asked_widely(Command.WRITE_ZEROES, 0, 1 << 62), Errno.ENOSPC),
    "a trim": (asked_widely(Command.TRIM, 1, (1 << 64) - 1), Errno.EINVAL),
    "a block status": (asked_widely(Command.BLOCK_STATUS, 0, 1 << 63), Errno.EINVAL),
    "a cache": (asked_widely(Command.CACHE, 0, 1 << 63), Errno.EINVAL),
    "a write without its flag": (asked_widely(Command.WRITE, 0, 512), Errno.EINVAL),
    "a flush with payload": (asked_widely(Command.FLUSH, 0, 5, CommandFlag.PAYLOAD_LEN) + b"12345", Errno.EINVAL),
    "a command nobody knows": (asked_widely(99, 0, 5, CommandFlag.PAYLOAD_LEN) + b"12345", Errno.EINVAL),
    "a command beyond": (asked_widely(0xFFFF, 7, 7, 0xFFFF & ~CommandFlag.PAYLOAD_LEN), Errno.EINVAL),
}


@pytest.mark.parametrize("what", WIDE)
def test_a_length_of_64_bits_is_refused_and_the_next_request_is_heard(memory: Served, what: str) -> None:
    stream, expected = WIDE[what]
    with connect(memory.socket) as peer:
        negotiate(peer, Wishes(NAME))
        peer.sendall(stream + asked_widely(Command.FLUSH))
        magic, flags, kind, cookie, _, length = struct.unpack(">IHHQQQ", received(peer, 32))
        assert (magic, flags, kind, cookie) == (0x6E8A278C, 1, 0x8001, 1)
        (error,) = struct.unpack_from(">I", received(peer, length))
        assert error == expected
        assert struct.unpack(">IHHQQQ", received(peer, 32))[1:3] == (1, 0)
