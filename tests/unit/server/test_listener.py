"""The listener: against its twin, and against clients that ask for odd things."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import BugError, ConnectionLost, IllegalEvent, ProtocolError, UserError
from nbdshard.common.limits import OPTION_DATA_BYTES_MAX, OPTION_DATA_BYTES_SKIPPED_MAX, OPTIONS_MAX
from nbdshard.common.nbd import wire_options as wire
from nbdshard.common.nbd.connecter import Goal, Listed, Negotiated, Wishes
from nbdshard.common.nbd.constants import Info, Option, OptionReply, TransmissionFlag
from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.hints import QUERY, Hints
from nbdshard.server.haggling import SERVED_OPTIONS, Haggling, ServedOption
from nbdshard.server.listener import Listener
from nbdshard.server.offers import Offer
from nbdshard.server.states import ListenerState
from support.twins import DISK, FLAGS, MIB, feed_listener, negotiate, offers, said_by_listener

FIXED = wire.pack_client_flags(3)
HINTS = Hints(
    request=30.0, loss=120.0, backoff_min=0.2, backoff_max=5.0, instance="6f1c0000-0000-4000-8000-00000000000a"
)


def listening(*exports: Offer, flags: bytes = FIXED) -> Listener:
    """A listener that has its client's flags."""
    listener = Listener(offers(*exports), "client")
    said_by_listener(listener)
    feed_listener(listener, flags)
    return listener


def ask(listener: Listener, option: int, data: bytes = b"", piece: int = 1 << 30) -> list[tuple[int, bytes]]:
    """(reply type, payload) of every reply to one option."""
    feed_listener(listener, wire.pack_option(option, data), piece)
    return replies(said_by_listener(listener), option)


def replies(said: bytes, option: int) -> list[tuple[int, bytes]]:
    found = []
    while said:
        header = wire.unpack_option_reply(said)
        assert header.option == option
        end = wire.OPTION_REPLY.size + header.length
        found.append((header.type, said[wire.OPTION_REPLY.size : end]))
        said = said[end:]
    return found


def go(name: str = "disk", *infos: int) -> bytes:
    return wire.pack_info_request(name, infos)


# -- twins


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 30])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("extended", [True, False])
def test_a_connecter_gets_the_export_it_wishes(piece: int, structured: bool, extended: bool) -> None:
    offer = Offer("disk", 5 * MIB, FLAGS, BlockSizes(512, 4096, MIB), description="the first", hints=HINTS)
    wishes = Wishes("disk", structured=structured, extended=extended, hints=True)
    (heard,), (entered,) = negotiate(wishes, Listener(offers(offer), "client"), piece)
    assert isinstance(heard, Negotiated)
    export = heard.export
    assert (export.size, export.description) == (5 * MIB, "the first")
    assert export.block_sizes == BlockSizes(512, 4096, MIB, advertised=True)
    assert (export.structured, export.extended) == (structured, structured and extended)
    assert export.contexts == ({"base:allocation": 1} if structured else {})
    assert export.hints == (HINTS if structured else Hints())
    assert export.flags == (FLAGS if structured else FLAGS & ~TransmissionFlag.SEND_DF)
    for name in ("size", "flags", "structured", "extended", "contexts"):
        assert getattr(entered.export, name) == getattr(export, name)


def test_a_connecter_lists_the_exports() -> None:
    listener = Listener(offers(DISK, Offer("other", 1, FLAGS, description="an odd one")), "client")
    assert negotiate(Wishes(goal=Goal.LIST), listener)[0] == [Listed([("disk", ""), ("other", "an odd one")])]


def test_a_connecter_that_only_asks_leaves_politely() -> None:
    listener = Listener(offers(), "client")
    assert negotiate(Wishes("disk", goal=Goal.INFO), listener)[1] == []
    assert listener.state is ListenerState.OPTION_HEADER


def test_an_export_that_is_not_there_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="there is no such export"):
        negotiate(Wishes("nothing"), Listener(offers(), "client"))


def test_the_first_export_is_the_default_one() -> None:
    (heard,), _ = negotiate(Wishes(""), Listener(offers(DISK, Offer("other", 1, FLAGS)), "client"))
    assert isinstance(heard, Negotiated)
    assert heard.export.canonical_name == "disk"


# -- the greeting


def test_it_greets_first() -> None:
    assert said_by_listener(Listener(offers(), "client")) == wire.pack_greeting(3)


def test_flags_nobody_knows_end_the_connection() -> None:
    with pytest.raises(ProtocolError, match="flags 0x6, of which 0x4 are unknown"):
        listening(flags=wire.pack_client_flags(6))


def test_a_client_that_only_looks_may_leave() -> None:
    listener = Listener(offers(), "client")
    listener.end_of_stream()
    assert listener.done


def test_a_client_that_leaves_in_the_middle_is_told_of() -> None:
    listener = listening()
    feed_listener(listener, wire.pack_option(Option.GO, go())[:20])
    with pytest.raises(ConnectionLost, match="waiting for an option"):
        listener.end_of_stream()
    listener.end_of_stream()  # a second time changes nothing


# -- EXPORT_NAME


@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_an_old_client_gets_its_export(flags: int, zeroes: int) -> None:
    listener = listening(flags=wire.pack_client_flags(flags))
    (entered,) = feed_listener(listener, wire.pack_option(Option.EXPORT_NAME, b"disk"))
    assert said_by_listener(listener) == struct.pack(">QH", MIB, FLAGS & ~TransmissionFlag.SEND_DF) + bytes(zeroes)
    assert entered.export.name == "disk"


@pytest.mark.parametrize("name", [b"nothing", b"\xff", b"a\0b", b"x" * 5000, b"x" * (OPTION_DATA_BYTES_MAX + 1)])
def test_an_old_clients_refusal_is_the_end(name: bytes) -> None:
    listener = listening()
    assert feed_listener(listener, wire.pack_option(Option.EXPORT_NAME, name)) == []
    assert (listener.state, said_by_listener(listener)) == (ListenerState.PARTED, b"")


def test_extended_headers_rule_export_name_out() -> None:
    listener = listening()
    ask(listener, Option.EXTENDED_HEADERS)
    with pytest.raises(ProtocolError, match="after extended headers were agreed on"):
        feed_listener(listener, wire.pack_option(Option.EXPORT_NAME, b"disk"))


def test_a_client_that_knows_no_refusal_may_only_name_an_export() -> None:
    with pytest.raises(ProtocolError, match="does not understand a refusal"):
        feed_listener(listening(flags=wire.pack_client_flags(0)), wire.pack_option(Option.LIST))


# -- options


@pytest.mark.parametrize(
    "option", [Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS], ids=lambda option: option.name
)
def test_data_where_none_is_allowed_is_invalid(option: int) -> None:
    listener = listening()
    assert ask(listener, option, b"x") == [
        (OptionReply.ERR_INVALID, b"1 bytes of data, where none are allowed"),
    ]
    assert not listener.haggling.structured


@pytest.mark.parametrize("option", [Option.STARTTLS, Option.PEEK_EXPORT, 999])
def test_an_option_nobody_knows_is_unsupported(option: int) -> None:
    ((kind, _),) = ask(listening(), option, b"whatever")
    assert kind == OptionReply.ERR_UNSUP


@pytest.mark.parametrize("piece", [1000, 1 << 30])
def test_too_much_data_is_dropped_and_refused(piece: int) -> None:
    listener = listening()
    ((kind, _),) = ask(listener, Option.GO, bytes(3 * OPTION_DATA_BYTES_MAX + 1), piece)
    assert kind == OptionReply.ERR_TOO_BIG
    assert ask(listener, Option.LIST)[-1] == (OptionReply.ACK, b"")  # and it goes on


def test_far_too_much_data_is_not_waited_for() -> None:
    header = wire.pack_option(Option.GO)[:12] + struct.pack(">I", OPTION_DATA_BYTES_SKIPPED_MAX + 1)
    with pytest.raises(ProtocolError, match="bytes of data"):
        feed_listener(listening(), header)


def test_another_magic_is_not_the_protocol() -> None:
    with pytest.raises(ProtocolError, match="magic number"):
        feed_listener(listening(), b"GET / HTTP/1.1\r\n")


def test_options_come_to_an_end() -> None:
    listener = listening()
    for _ in range(OPTIONS_MAX):
        ask(listener, Option.LIST)
    with pytest.raises(ProtocolError, match="no end of options"):
        ask(listener, Option.LIST)


def test_an_abort_is_acknowledged() -> None:
    listener = listening()
    assert ask(listener, Option.ABORT) == [(OptionReply.ACK, b"")]
    assert listener.state is ListenerState.PARTED
    with pytest.raises(IllegalEvent):
        listener.received(1)


def test_a_server_that_ends_refuses_what_is_asked() -> None:
    listener = listening()
    listener.shut_down()
    assert ask(listener, Option.GO, go()) == [(OptionReply.ERR_SHUTDOWN, b"the server is shutting down")]
    assert ask(listener, Option.ABORT) == [(OptionReply.ACK, b"")]
    old = listening()
    old.shut_down()
    assert feed_listener(old, wire.pack_option(Option.EXPORT_NAME, b"disk")) == []
    assert (old.state, said_by_listener(old)) == (ListenerState.PARTED, b"")


def test_more_bytes_than_were_wanted_are_a_fault_of_ours() -> None:
    with pytest.raises(BugError, match="5 bytes received where 4 were wanted"):
        Listener(offers(), "client").received(5)


# -- GO, INFO


@pytest.mark.parametrize("data", [b"", b"\0\0\0\1", b"\0\0\0\4disk", go() + b"x", b"\0\0\0\xff" + bytes(6)])
def test_a_go_that_cannot_be_read_is_invalid(data: bytes) -> None:
    ((kind, _),) = ask(listening(), Option.GO, data)
    assert kind == OptionReply.ERR_INVALID


def test_what_is_asked_for_is_told() -> None:
    offer = Offer("disk", MIB, FLAGS, description="the first")
    found = ask(listening(offer), Option.INFO, go("disk", Info.NAME, Info.DESCRIPTION, 77))
    assert found[0] == (OptionReply.INFO, wire.pack_info_export(MIB, FLAGS & ~TransmissionFlag.SEND_DF))
    assert (OptionReply.INFO, wire.pack_info_text(Info.NAME, "disk")) in found
    assert (OptionReply.INFO, wire.pack_info_text(Info.DESCRIPTION, "the first")) in found
    assert found[-1] == (OptionReply.ACK, b"")


def test_who_does_not_ask_for_block_sizes_cannot_have_an_export_that_insists() -> None:
    offer = Offer("disk", MIB, FLAGS, BlockSizes(512, 4096, MIB))
    ((kind, _),) = ask(listening(offer), Option.GO, go())
    assert kind == OptionReply.ERR_BLOCK_SIZE_REQD
    assert ask(listening(offer), Option.GO, go("disk", Info.BLOCK_SIZE))[-1] == (OptionReply.ACK, b"")


# -- structured replies and contexts


def test_extended_headers_include_structured_replies() -> None:
    listener = listening()
    assert ask(listener, Option.EXTENDED_HEADERS) == [(OptionReply.ACK, b"")]
    assert ask(listener, Option.STRUCTURED_REPLY)[0][0] == OptionReply.ERR_EXT_HEADER_REQD
    assert ask(listener, Option.EXTENDED_HEADERS)[0][0] == OptionReply.ERR_INVALID


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_need_structured_replies(option: int) -> None:
    ((kind, _),) = ask(listening(), option, wire.pack_context_query("disk", ["base:allocation"]))
    assert kind == OptionReply.ERR_INVALID


def context_names(option: int, *queries: str, offer: Offer = DISK, name: str = "disk") -> list[str]:
    listener = listening(offer)
    ask(listener, Option.STRUCTURED_REPLY)
    found = ask(listener, option, wire.pack_context_query(name, queries))
    assert found[-1] == (OptionReply.ACK, b"")
    return [wire.unpack_meta_context(payload)[1] for _, payload in found[:-1]]


@pytest.mark.parametrize(
    ("queries", "listed", "chosen"),
    [
        ((), ["base:allocation"], []),
        (("base:",), ["base:allocation"], []),
        (("base:allocation",), ["base:allocation"], ["base:allocation"]),
        (("base:allocation", "base:allocation"), ["base:allocation"], ["base:allocation"]),
        (("base:other", "qemu:dirty-bitmap:x", "nonsense"), [], []),
        (("nonsense", "base:allocation"), ["base:allocation"], ["base:allocation"]),
    ],
)
def test_contexts_nobody_has_are_ignored(queries: tuple[str, ...], listed: list[str], chosen: list[str]) -> None:
    assert context_names(Option.LIST_META_CONTEXT, *queries) == listed
    assert context_names(Option.SET_META_CONTEXT, *queries) == chosen


def test_hints_are_for_those_who_ask() -> None:
    offer = Offer("disk", MIB, FLAGS, hints=HINTS)
    expected = (
        "x-nbdshard:hints;v=1;request_ms=30000;loss_ms=120000;backoff_ms=200-5000;"
        "instance=6f1c0000-0000-4000-8000-00000000000a"
    )
    assert context_names(Option.LIST_META_CONTEXT, QUERY, offer=offer) == [expected]
    assert context_names(Option.LIST_META_CONTEXT, offer=offer) == ["base:allocation"]
    assert context_names(Option.LIST_META_CONTEXT, QUERY) == []
    assert context_names(Option.SET_META_CONTEXT, QUERY, offer=offer) == []


@pytest.mark.parametrize("between", [b"other", b""])
def test_contexts_are_those_of_the_export_that_is_chosen(between: bytes) -> None:
    listener = listening(DISK, Offer("other", 1, FLAGS))
    ask(listener, Option.STRUCTURED_REPLY)
    ask(listener, Option.SET_META_CONTEXT, wire.pack_context_query("disk", ["base:allocation"]))
    (entered,) = feed_listener(listener, wire.pack_option(Option.GO, go(between.decode())))
    assert not entered.export.contexts


def test_the_last_choice_of_contexts_counts() -> None:
    listener = listening()
    ask(listener, Option.STRUCTURED_REPLY)
    for queries in (["base:allocation"], ["x:other"]):
        ask(listener, Option.SET_META_CONTEXT, wire.pack_context_query("disk", queries))
    (entered,) = feed_listener(listener, wire.pack_option(Option.GO, go()))
    assert not entered.export.contexts


def test_a_failed_choice_of_contexts_takes_the_one_before_away() -> None:
    listener = listening()
    ask(listener, Option.STRUCTURED_REPLY)
    ask(listener, Option.SET_META_CONTEXT, wire.pack_context_query("disk", ["base:allocation"]))
    ask(listener, Option.SET_META_CONTEXT, b"nonsense")
    (entered,) = feed_listener(listener, wire.pack_option(Option.GO, go()))
    assert not entered.export.contexts


# -- from outside


def test_an_option_may_be_added() -> None:
    def answer(haggling: Haggling, data: memoryview) -> list[tuple[int, bytes]]:
        haggling.extra["said"] = bytes(data)
        return [(OptionReply.INFO, b"thank you")]

    mine = ServedOption(4711, answer)
    listener = Listener(offers(), "client", options={**SERVED_OPTIONS, mine.option: mine})
    said_by_listener(listener)
    feed_listener(listener, FIXED)
    assert ask(listener, 4711, b"hello") == [(OptionReply.INFO, b"thank you"), (OptionReply.ACK, b"")]
    assert listener.haggling.extra == {"said": b"hello"}


@given(st.binary(max_size=300), st.integers(1, 40))
def test_whatever_comes_nothing_but_a_protocol_error_does(stream: bytes, piece: int) -> None:
    listener = Listener(offers(), "client")
    try:
        feed_listener(listener, FIXED + stream, piece)
    except ProtocolError:
        assert listener.state is ListenerState.FAILED


@given(st.sampled_from([*Option, 999]), st.binary(max_size=80))
def test_whatever_an_option_holds_it_is_answered(option: int, data: bytes) -> None:
    listener = listening()
    ask(listener, Option.STRUCTURED_REPLY)
    feed_listener(listener, wire.pack_option(option, data))
    assert listener.done or replies(said_by_listener(listener), option)
