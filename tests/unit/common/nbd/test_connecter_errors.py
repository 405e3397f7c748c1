"""What a server may do wrong in a negotiation, and what it may refuse: each text is asserted here."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import BugError, ConnectionLost, NbdshardError, ProtocolError, UserError
from nbdshard.common.nbd.connecter import Connecter, Goal, Wishes
from nbdshard.common.nbd.constants import Option, OptionReply
from nbdshard.common.nbd.states import ConnecterState
from nbdshard.common.nbd.wire_options import (
    OPTION_REPLY,
    pack_export_name_reply,
    pack_greeting,
    pack_info_block_size,
    pack_info_export,
    pack_meta_context,
    pack_option,
)
from support.nbd_feeding import (
    ACK,
    GREETING,
    MIB,
    UNSUP,
    before_go,
    feed_connecter,
    info,
    reply,
    size_info,
)

CONTEXTS = GREETING + reply(Option.EXTENDED_HEADERS, UNSUP) + reply(Option.STRUCTURED_REPLY, ACK)
EXTENDED = GREETING + reply(Option.EXTENDED_HEADERS, ACK) + reply(Option.SET_META_CONTEXT, ACK)
CONTEXT = OptionReply.META_CONTEXT


def context(number: int, name: str) -> bytes:
    return reply(Option.SET_META_CONTEXT, CONTEXT, pack_meta_context(number, name))


def blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    return info(pack_info_block_size(minimum, preferred, maximum))


def failure(stream: bytes, wishes: Wishes) -> tuple[Connecter, NbdshardError]:
    connecter = Connecter(wishes, "srv")
    with pytest.raises(NbdshardError) as caught:
        feed_connecter(connecter, stream)
    return connecter, caught.value


NOT_NBD = "srv: protocol error in greeting: not an NBD server "
GO = "srv: protocol error in NBD_OPT_GO reply: "
META = "srv: protocol error in NBD_OPT_SET_META_CONTEXT reply: "

BROKEN = [
    (b"SSH-2.0-OpenSSH_9.2\r\n", NOT_NBD + "(it sent 'SSH-2.0-')"),
    (b"HTTP/1.1", NOT_NBD + "(it sent 'HTTP/1.1')"),
    (bytes(8), NOT_NBD + "(it sent '��������')"),
    (
        b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(136),
        "srv: protocol error in greeting: an oldstyle NBD server, which nbdshard does not support",
    ),
    (b"NBDMAGIC\0\0\0\0\0\0\0\1", NOT_NBD + "(its second magic number is 0x0000000000000001)"),
    (
        GREETING + bytes(20),
        "srv: protocol error in NBD_OPT_EXTENDED_HEADERS reply: magic number 0x0 instead of 0x3e889045565a9",
    ),
    (
        GREETING + reply(Option.GO, ACK),
        "srv: protocol error in NBD_OPT_EXTENDED_HEADERS reply: "
        "a reply to NBD_OPT_GO, NBD_OPT_EXTENDED_HEADERS was asked",
    ),
    (
        GREETING + OPTION_REPLY.pack(0x3E889045565A9, Option.EXTENDED_HEADERS, 1, 65537),
        "srv: protocol error in NBD_OPT_EXTENDED_HEADERS reply: a reply of 65537 bytes, at most 65536 are believed",
    ),
    (before_go() + size_info() * 1024 + size_info(), GO + "no end of replies (1025 so far, 12300 bytes)"),
    (
        before_go() + info(b"\0\x63" + bytes(65000)) * 65,
        GO + "no end of replies (65 so far, 4225130 bytes)",
    ),
    (before_go() + reply(Option.GO, OptionReply.SERVER), GO + "NBD_REP_SERVER, which is no answer to it"),
    (before_go() + reply(Option.GO, 99), GO + "reply type 0x63, which is no answer to it"),
    (before_go() + reply(Option.GO, ACK, b"x"), GO + "NBD_REP_ACK with 1 bytes of data"),
    (before_go() + reply(Option.GO, ACK), GO + "NBD_REP_ACK without a NBD_INFO_EXPORT before it"),
    (
        before_go() + reply(Option.GO, 0x80000063, b"so\x07"),
        GO + "it refuses with an error this program does not know, reply type 0x80000063 (it says: so�)",
    ),
    (before_go() + info(b""), GO + "NBD_REP_INFO of 0 bytes"),
    (before_go() + info(pack_info_export(1, 1) + b"x"), GO + "NBD_INFO_EXPORT of 13 bytes instead of 12"),
    (before_go() + info(b"\0\3\0"), GO + "NBD_INFO_BLOCK_SIZE of 3 bytes instead of 14"),
    (before_go() + size_info(1 << 63), GO + "an export size of 9223372036854775808 bytes, beyond 2^63 - 1"),
    (before_go() + size_info(1, 2), GO + "transmission flags 0x2 without NBD_FLAG_HAS_FLAGS"),
    (before_go() + blocks(0, 4096, MIB), GO + "a minimum block size of 0 bytes: not a power of 2 up to 65536"),
    (before_go() + blocks(3, 4096, MIB), GO + "a minimum block size of 3 bytes: not a power of 2 up to 65536"),
    (
        before_go() + blocks(1 << 17, 1 << 17, 1 << 20),
        GO + "a minimum block size of 131072 bytes: not a power of 2 up to 65536",
    ),
    (
        before_go() + blocks(1, 5000, MIB),
        GO + "a preferred block size of 5000 bytes: not a power of 2 of at least 512",
    ),
    (
        before_go() + blocks(4096, 512, MIB),
        GO + "a preferred block size of 512 bytes: not a power of 2 of at least 4096",
    ),
    (
        before_go() + blocks(4096, 4096, 5000),
        GO + "a maximum block size of 5000 bytes: not a multiple of the minimum, 4096",
    ),
    (before_go() + blocks(1, 512, 0), GO + "a maximum block size of 0 bytes: not a multiple of the minimum, 1"),
    (
        before_go() + blocks(512, 4096, 2048) + size_info() + reply(Option.GO, ACK),
        GO + "a maximum block size of 2048 bytes, less than the preferred, 4096",
    ),
    (
        EXTENDED + reply(Option.GO, UNSUP),
        GO + "extended headers were agreed on, but NBD_OPT_GO is not supported",
    ),
    (CONTEXTS + context(1, "qemu:\x1bx"), META + "metadata context 'qemu:�x', which was not asked for"),
    (CONTEXTS + context(1, "base:allocation") * 2, META + "metadata context base:allocation twice"),
    (CONTEXTS + context(1, "base:allocation") + context(1, "x:y"), META + "metadata context id 1 twice"),
    (CONTEXTS + reply(Option.SET_META_CONTEXT, CONTEXT, b"\0\0\0"), META + "a metadata context of 3 bytes"),
    (
        pack_greeting(0) + pack_export_name_reply(1 << 63, 1, zeroes=True),
        "srv: protocol error in NBD_OPT_EXPORT_NAME reply: an export size of 9223372036854775808 bytes, "
        "beyond 2^63 - 1",
    ),
]


@pytest.mark.parametrize(("stream", "text"), BROKEN)
def test_a_server_that_breaks_the_protocol_is_told_from_one_that_refuses(stream: bytes, text: str) -> None:
    connecter, error = failure(stream, Wishes(contexts=("base:allocation", "x:y")))
    assert isinstance(error, ProtocolError)
    assert str(error) == text
    assert (connecter.state, connecter.data_to_send(), connecter.done) == (ConnecterState.FAILED, [], False)
    assert len(connecter.receive_target()) == 0


def test_an_entry_of_a_list_that_contradicts_itself_is_the_servers_fault() -> None:
    stream = GREETING + reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\5disk")
    _, error = failure(stream, Wishes(goal=Goal.LIST))
    assert str(error) == ("srv: protocol error in NBD_OPT_LIST reply: an export name of 5 bytes in an entry of 8 bytes")


REFUSED = "srv: NBD_OPT_GO was refused: "
REFUSALS = [
    (OptionReply.ERR_UNKNOWN, "srv: no such export: 'disk'; `nbdshard info --list` names a server's exports"),
    (OptionReply.ERR_TLS_REQD, REFUSED + "the server insists on TLS; nbdshard does not support TLS yet"),
    (OptionReply.ERR_POLICY, REFUSED + "the server's configuration forbids it; ask who runs the server"),
    (OptionReply.ERR_INVALID, REFUSED + "the server calls the request invalid"),
    (OptionReply.ERR_PLATFORM, REFUSED + "the server's platform does not support it"),
    (
        OptionReply.ERR_BLOCK_SIZE_REQD,
        REFUSED + "the server insists that block sizes are negotiated; "
        "nbdshard asks for them, so the server contradicts itself",
    ),
    (OptionReply.ERR_TOO_BIG, REFUSED + "the request or its answer is too big for the server"),
    (
        OptionReply.ERR_EXT_HEADER_REQD,
        REFUSED + "the server insists on extended headers; it did not offer them when it was asked",
    ),
]


@pytest.mark.parametrize(("kind", "text"), REFUSALS)
def test_a_refusal_is_one_clear_line_for_the_user_and_an_abort_for_the_server(kind: int, text: str) -> None:
    connecter, error = failure(before_go() + reply(Option.GO, kind), Wishes("disk"))
    assert isinstance(error, UserError)
    assert str(error) == text
    assert connecter.data_to_send()[-1] == pack_option(Option.ABORT)
    assert connecter.done
    connecter.end_of_stream()


def test_a_refusal_carries_what_the_server_says() -> None:
    stream = before_go() + reply(Option.GO, OptionReply.ERR_UNKNOWN, b"export 'x' is\nnot present")
    _, error = failure(stream, Wishes())
    assert str(error) == (
        "srv: no such export: '' (the default export) (it says: export 'x' is�not present); "
        "`nbdshard info --list` names a server's exports"
    )


def test_a_server_that_is_being_shut_down_is_one_to_come_back_to() -> None:
    stream = GREETING + reply(Option.EXTENDED_HEADERS, OptionReply.ERR_SHUTDOWN, b"bye")
    connecter, error = failure(stream, Wishes())
    assert isinstance(error, ConnectionLost)
    assert str(error) == (
        "srv: connection lost while negotiating NBD_OPT_EXTENDED_HEADERS: the server is being shut down (it says: bye)"
    )
    assert connecter.data_to_send()[-1] == pack_option(Option.ABORT)


def test_tls_is_required_from_the_first_option_on() -> None:
    _, error = failure(GREETING + reply(Option.EXTENDED_HEADERS, OptionReply.ERR_TLS_REQD), Wishes())
    assert str(error) == (
        "srv: NBD_OPT_EXTENDED_HEADERS was refused: the server insists on TLS; nbdshard does not support TLS yet"
    )


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (GREETING + reply(Option.LIST, UNSUP), "srv: the server does not list its exports"),
        (
            GREETING + reply(Option.LIST, OptionReply.ERR_POLICY),
            "srv: NBD_OPT_LIST was refused: the server's configuration forbids it; ask who runs the server",
        ),
        (pack_greeting(0), "srv: the server is too old to list its exports (no fixed newstyle)"),
    ],
)
def test_a_server_that_does_not_list_is_no_reason_to_blame_it(stream: bytes, text: str) -> None:
    _, error = failure(stream, Wishes(goal=Goal.LIST))
    assert isinstance(error, UserError)
    assert str(error) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a" * 4097, "an export name of 4097 bytes; the protocol allows 4096"),
        ("a\0b", "the export name 'a\\x00b' contains a NUL character"),
        ("a\udcff", "the export name 'a\\udcff' is no valid Unicode"),
    ],
)
def test_an_export_name_that_cannot_be_sent_is_refused_before_anything_is(name: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        Connecter(Wishes(name), "srv")
    assert str(caught.value) == text


@pytest.mark.parametrize("contexts", [("a:b", "a:b"), tuple(f"a:{number}" for number in range(65))])
def test_contexts_that_cannot_be_asked_for_are_our_own_fault(contexts: tuple[str, ...]) -> None:
    with pytest.raises(BugError, match=r"metadata contexts, some twice, or more than 64$"):
        Connecter(Wishes(contexts=contexts), "srv")


def test_a_banner_is_recognised_before_all_of_a_greeting_has_come() -> None:
    connecter = Connecter(Wishes(), "srv")
    with pytest.raises(ProtocolError):
        feed_connecter(connecter, b"220 smtp")
