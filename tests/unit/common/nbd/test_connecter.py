"""The way through a negotiation: what is sent, what is wanted, what is reported. Errors: test_connecter_errors.py."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import BugError, ConnectionLost, IllegalEvent, ProtocolError
from nbdshard.common.nbd.connecter import Connecter, Goal, Listed, Negotiated, Wishes
from nbdshard.common.nbd.constants import Info, Option, OptionReply, TransmissionFlag
from nbdshard.common.nbd.export import BlockSizes, Export
from nbdshard.common.nbd.hints import NO_HINTS, Hints
from nbdshard.common.nbd.options import OPTIONS, Negotiation, OptionHandler, with_option
from nbdshard.common.nbd.states import ConnecterState
from nbdshard.common.nbd.wire_options import (
    pack_client_flags,
    pack_context_query,
    pack_export_name_reply,
    pack_greeting,
    pack_info_block_size,
    pack_info_export,
    pack_info_request,
    pack_info_text,
    pack_meta_context,
    pack_option,
    pack_server,
)
from support.nbd_feeding import (
    ACK,
    FIXED,
    GREETING,
    MIB,
    NO_ZEROES,
    UNSUP,
    before_go,
    feed_connecter,
    info,
    reply,
    size_info,
    talk,
)

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_DF
ASKED_INFOS = [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE]
GO_DATA = pack_option(Option.GO, pack_info_request("disk", ASKED_INFOS))


def step(connecter: Connecter, stream: bytes) -> bytes:
    """What it sends in answer to `stream`."""
    feed_connecter(connecter, stream)
    return b"".join(connecter.data_to_send())


def test_the_options_are_sent_one_by_one_each_after_the_reply_to_the_last() -> None:
    connecter = Connecter(Wishes("disk"), "srv")
    assert connecter.data_to_send() == []
    assert step(connecter, GREETING) == pack_client_flags(3) + pack_option(Option.EXTENDED_HEADERS)
    assert step(connecter, reply(Option.EXTENDED_HEADERS, UNSUP)) == pack_option(Option.STRUCTURED_REPLY)
    query = pack_context_query("disk", ["base:allocation"])
    assert step(connecter, reply(Option.STRUCTURED_REPLY, ACK)) == pack_option(Option.SET_META_CONTEXT, query)
    assert (
        step(
            connecter, reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, pack_meta_context(7, "base:allocation"))
        )
        == b""
    )
    assert step(connecter, reply(Option.SET_META_CONTEXT, ACK)) == GO_DATA
    assert not connecter.done
    stream = info(pack_info_export(MIB, FLAGS)) + info(pack_info_block_size(512, 4096, MIB))
    stream += info(pack_info_text(Info.NAME, "disk-1")) + info(pack_info_text(Info.DESCRIPTION, "the\x07 first"))
    events, rest = feed_connecter(connecter, stream + reply(Option.GO, ACK) + b"transmission phase")
    assert events == [
        Negotiated(
            Export(
                name="disk",
                size=MIB,
                flags=FLAGS,
                block_sizes=BlockSizes(512, 4096, MIB, advertised=True),
                structured=True,
                extended=False,
                contexts={"base:allocation": 7},
                description="the� first",
                canonical_name="disk-1",
            )
        )
    ]
    assert rest == b"transmission phase"
    assert (connecter.done, connecter.state, connecter.data_to_send()) == (True, ConnecterState.NEGOTIATED, [])


def test_extended_headers_make_structured_replies_superfluous() -> None:
    connecter, _ = talk(GREETING + reply(Option.EXTENDED_HEADERS, ACK))
    assert connecter.data_to_send()[-1] == pack_option(
        Option.SET_META_CONTEXT, pack_context_query("", ["base:allocation"])
    )
    stream = reply(Option.SET_META_CONTEXT, ACK) + size_info() + reply(Option.GO, ACK)
    (event,), _ = feed_connecter(connecter, stream)
    assert isinstance(event, Negotiated)
    assert (event.export.extended, event.export.structured, event.export.contexts) == (True, True, {})


def test_what_is_not_wished_for_is_not_asked_for() -> None:
    connecter, _ = talk(GREETING, Wishes("disk", structured=False))
    assert b"".join(connecter.data_to_send()) == pack_client_flags(3) + GO_DATA
    connecter, _ = talk(GREETING, Wishes("disk", contexts=(), extended=False))
    assert connecter.data_to_send()[-1] == pack_option(Option.STRUCTURED_REPLY)
    assert step(connecter, reply(Option.STRUCTURED_REPLY, ACK)) == GO_DATA


def test_without_structured_replies_no_contexts_are_asked_for_and_df_is_ignored() -> None:
    stream = before_go(structured=False) + info(pack_info_export(MIB, FLAGS)) + reply(Option.GO, ACK)
    _, (event,) = talk(stream)
    assert isinstance(event, Negotiated)
    assert event.export.flags == FLAGS & ~TransmissionFlag.SEND_DF
    assert (event.export.structured, event.export.contexts) == (False, {})
    assert event.export.block_sizes == BlockSizes(1, 4096, 32 * MIB, advertised=False)


@pytest.mark.parametrize("error", [UNSUP, OptionReply.ERR_POLICY, OptionReply.ERR_INVALID, 0x8000FFFF])
def test_an_option_that_fails_is_done_without(error: int) -> None:
    stream = GREETING + reply(Option.EXTENDED_HEADERS, error, b"no") + reply(Option.STRUCTURED_REPLY, ACK)
    connecter, _ = talk(stream + reply(Option.SET_META_CONTEXT, error))
    assert connecter.data_to_send()[-1] == pack_option(Option.GO, pack_info_request("", ASKED_INFOS))


def test_contexts_named_before_an_error_are_forgotten() -> None:
    stream = GREETING + reply(Option.EXTENDED_HEADERS, UNSUP) + reply(Option.STRUCTURED_REPLY, ACK)
    stream += reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, pack_meta_context(7, "base:allocation"))
    stream += reply(Option.SET_META_CONTEXT, OptionReply.ERR_TOO_BIG) + size_info() + reply(Option.GO, ACK)
    _, (event,) = talk(stream)
    assert isinstance(event, Negotiated)
    assert event.export.contexts == {}


def test_details_the_program_does_not_know_are_ignored() -> None:
    _, events = talk(before_go() + info(b"\0\x63what") + size_info() + reply(Option.GO, ACK))
    assert len(events) == 1


@pytest.mark.parametrize(("flags", "reserved"), [(FIXED | NO_ZEROES, 0), (FIXED, 124)])
def test_a_server_without_go_gets_export_name(flags: int, reserved: int) -> None:
    stream = before_go(structured=False).replace(GREETING, pack_greeting(flags))
    connecter, _ = talk(stream + reply(Option.GO, UNSUP), Wishes("disk"))
    assert connecter.data_to_send()[-1] == pack_option(Option.EXPORT_NAME, b"disk")
    answer = pack_export_name_reply(MIB, 1, zeroes=reserved > 0)
    assert len(answer) == len(connecter.receive_target()) == 10 + reserved
    events, rest = feed_connecter(connecter, answer + b"rest")
    assert rest == b"rest"
    assert events == [Negotiated(Export("disk", MIB, TransmissionFlag.HAS_FLAGS))]


def test_structured_replies_and_contexts_outlive_the_fallback() -> None:
    stream = GREETING + reply(Option.EXTENDED_HEADERS, UNSUP) + reply(Option.STRUCTURED_REPLY, ACK)
    stream += reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, pack_meta_context(7, "base:allocation"))
    stream += reply(Option.SET_META_CONTEXT, ACK) + reply(Option.GO, UNSUP)
    _, (event,) = talk(stream + pack_export_name_reply(MIB, 1, zeroes=False))
    assert isinstance(event, Negotiated)
    assert (event.export.structured, event.export.contexts) == (True, {"base:allocation": 7})


@pytest.mark.parametrize(("flags", "zeroes"), [(0, True), (NO_ZEROES, False)])
def test_a_newstyle_server_that_is_not_fixed_gets_export_name_at_once(flags: int, zeroes: bool) -> None:
    connecter, _ = talk(pack_greeting(flags), Wishes("disk"))
    expected = pack_client_flags(flags) + pack_option(Option.EXPORT_NAME, b"disk")
    assert b"".join(connecter.data_to_send()) == expected
    events, _ = feed_connecter(connecter, pack_export_name_reply(MIB, 1, zeroes=zeroes))
    assert events == [Negotiated(Export("disk", MIB, TransmissionFlag.HAS_FLAGS))]


def test_flags_from_the_future_are_not_answered() -> None:
    connecter, _ = talk(pack_greeting(0xFFFF))
    assert connecter.data_to_send()[0] == pack_client_flags(3)


def test_info_tells_the_same_and_stays_out_of_the_transmission_phase() -> None:
    stream = before_go() + size_info(option=Option.INFO) + reply(Option.INFO, ACK)
    connecter, (event,) = talk(stream, Wishes(goal=Goal.INFO))
    assert isinstance(event, Negotiated)
    assert (event.export.size, connecter.state, connecter.done) == (MIB, ConnecterState.HAGGLED, True)
    connecter.data_to_send()
    connecter.abort()
    assert connecter.data_to_send() == [pack_option(Option.ABORT)]
    assert feed_connecter(connecter, reply(Option.ABORT, ACK)) == ([], b"")
    assert connecter.state is ConnecterState.PARTED
    assert len(connecter.receive_target()) == 0


def test_list_tells_names_and_descriptions_in_order() -> None:
    stream = GREETING + reply(Option.LIST, OptionReply.SERVER, pack_server("one", "the first"))
    stream += reply(Option.LIST, OptionReply.SERVER, pack_server("", "")) + reply(Option.LIST, ACK)
    connecter, events = talk(stream, Wishes(goal=Goal.LIST))
    assert b"".join(connecter.data_to_send()) == pack_client_flags(3) + pack_option(Option.LIST)
    assert events == [Listed([("one", "the first"), ("", "")])]
    assert connecter.state is ConnecterState.HAGGLED


# -- parting -----------------------------------------------------------------------------------------------------------


def test_an_abort_before_the_greeting_waits_for_it() -> None:
    connecter = Connecter(Wishes(), "srv")
    connecter.abort()
    assert connecter.data_to_send() == []
    assert step(connecter, GREETING) == pack_client_flags(3) + pack_option(Option.ABORT)
    connecter.end_of_stream()
    assert connecter.state is ConnecterState.PARTED


def test_an_abort_waits_for_the_reply_to_the_option_under_way() -> None:
    connecter, _ = talk(GREETING)
    connecter.data_to_send()
    connecter.abort()
    connecter.abort()
    assert connecter.data_to_send() == []
    assert step(connecter, reply(Option.EXTENDED_HEADERS, ACK)) == pack_option(Option.ABORT)
    assert connecter.done


def test_an_abort_that_meets_the_end_of_the_negotiation_becomes_a_disconnect() -> None:
    connecter, _ = talk(before_go())
    connecter.data_to_send()
    connecter.abort()
    sent = step(connecter, size_info() + reply(Option.GO, ACK))
    assert sent.hex() == "2560951300000002" + "00" * 20
    assert connecter.state is ConnecterState.PARTED


def test_in_the_transmission_phase_an_abort_is_a_disconnect_too() -> None:
    connecter, _ = talk(before_go() + size_info() + reply(Option.GO, ACK))
    connecter.data_to_send()
    connecter.abort()
    assert b"".join(connecter.data_to_send()).hex() == "2560951300000002" + "00" * 20


def test_an_abort_instead_of_the_fallback() -> None:
    connecter, _ = talk(before_go())
    connecter.data_to_send()
    connecter.abort()
    assert step(connecter, reply(Option.GO, UNSUP)) == pack_option(Option.ABORT)


def test_an_abort_to_a_server_that_knows_none_says_nothing() -> None:
    connecter = Connecter(Wishes(), "srv")
    connecter.abort()
    assert step(connecter, pack_greeting(0)) == pack_client_flags(0)
    assert connecter.state is ConnecterState.PARTED


def test_a_list_ended_by_an_abort_is_told_all_the_same() -> None:
    connecter, _ = talk(GREETING, Wishes(goal=Goal.LIST))
    connecter.abort()
    events, _ = feed_connecter(connecter, reply(Option.LIST, ACK))
    assert (events, connecter.state) == ([Listed([])], ConnecterState.ABORTING)


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (b"", "srv: connection lost while waiting for the greeting: the server closed the connection"),
        (
            GREETING,
            "srv: connection lost while waiting for the reply to NBD_OPT_EXTENDED_HEADERS: "
            "the server closed the connection",
        ),
        (
            before_go() + size_info()[:-1],
            "srv: connection lost while waiting for the reply to NBD_OPT_GO: the server closed the connection",
        ),
        (
            pack_greeting(0),
            "srv: connection lost while waiting for the reply to NBD_OPT_EXPORT_NAME: the server closed the "
            "connection, which is how an old server refuses an export: 'disk'",
        ),
    ],
)
def test_the_end_of_the_stream_names_the_stage(stream: bytes, text: str) -> None:
    connecter, _ = talk(stream, Wishes("disk"))
    with pytest.raises(ConnectionLost) as caught:
        connecter.end_of_stream()
    assert str(caught.value) == text
    assert (connecter.state, connecter.data_to_send()) == (ConnecterState.FAILED, [])
    with pytest.raises(IllegalEvent):
        connecter.end_of_stream()


# -- use ---------------------------------------------------------------------------------------------------------------


def test_more_bytes_than_were_wanted_are_our_own_fault() -> None:
    connecter = Connecter(Wishes(), "srv")
    for count in (0, -1, 19):
        with pytest.raises(BugError, match=f"^{count} bytes received where 18 were wanted$"):
            connecter.received(count)
    assert feed_connecter(connecter, GREETING) == ([], b"")


def test_nothing_is_received_when_nothing_is_left_to_be_negotiated() -> None:
    connecter, _ = talk(before_go() + size_info() + reply(Option.GO, ACK))
    with pytest.raises(IllegalEvent, match="in state NEGOTIATED"):
        connecter.received(1)


def test_a_table_without_an_end_is_our_own_fault() -> None:
    connecter = Connecter(Wishes(), "srv", options={})
    with pytest.raises(BugError, match=r"^no option of the table leads to Goal\.GO$"):
        feed_connecter(connecter, GREETING)


def test_an_option_from_outside_is_an_entry_in_the_table() -> None:
    def note(negotiation: Negotiation, payload: memoryview) -> None:
        negotiation.extra["hints"] = bytes(payload)

    hints = OptionHandler(
        Option.LIST_META_CONTEXT,
        wanted=lambda negotiation: negotiation.structured,
        data=lambda negotiation: pack_context_query(negotiation.wishes.export_name, ["x-hints:"]),
        replies={OptionReply.META_CONTEXT: note},
    )
    connecter = Connecter(Wishes("disk"), "srv", options=with_option(OPTIONS, hints, before=Option.GO))
    feed_connecter(connecter, before_go())
    assert connecter.data_to_send()[-1] == pack_option(
        Option.LIST_META_CONTEXT, pack_context_query("disk", ["x-hints:"])
    )
    stream = reply(Option.LIST_META_CONTEXT, OptionReply.META_CONTEXT, pack_meta_context(0, "x-hints:v=1"))
    assert step(connecter, stream + reply(Option.LIST_META_CONTEXT, ACK)) == GO_DATA
    assert connecter.negotiation.extra == {"hints": b"\0\0\0\0x-hints:v=1"}


HINTS_QUERY = pack_option(Option.LIST_META_CONTEXT, pack_context_query("disk", ["x-nbdshard:hints"]))
UP_TO_HINTS = GREETING + reply(Option.EXTENDED_HEADERS, UNSUP) + reply(Option.STRUCTURED_REPLY, ACK)


def listed(*names: str) -> bytes:
    """A server's answer to what contexts it has."""
    contexts = (reply(Option.LIST_META_CONTEXT, OptionReply.META_CONTEXT, pack_meta_context(0, n)) for n in names)
    return b"".join(contexts) + reply(Option.LIST_META_CONTEXT, ACK)


def found_hints(answer: bytes) -> Hints:
    """What is understood of `answer`, when the rest of the negotiation goes well."""
    connecter = Connecter(Wishes("disk", hints=True), "srv")
    assert step(connecter, UP_TO_HINTS).endswith(HINTS_QUERY)
    assert step(connecter, answer) == pack_option(
        Option.SET_META_CONTEXT, pack_context_query("disk", ["base:allocation"])
    )
    events, _ = feed_connecter(connecter, reply(Option.SET_META_CONTEXT, ACK) + size_info() + reply(Option.GO, ACK))
    (event,) = events
    assert isinstance(event, Negotiated)
    return event.export.hints


def test_hints_are_asked_for_once_and_before_a_context_is_chosen() -> None:
    answer = listed("base:allocation", "x-nbdshard:hints;v=1;loss_ms=60000", "x-nbdshard:hints;v=1;loss_ms=70000")
    assert found_hints(answer) == Hints(loss=60.0)


@pytest.mark.parametrize("error", [UNSUP, OptionReply.ERR_INVALID, OptionReply.ERR_POLICY, OptionReply.ERR_UNKNOWN])
def test_a_server_that_lists_nothing_has_no_hints(error: OptionReply) -> None:
    assert found_hints(reply(Option.LIST_META_CONTEXT, error)) == NO_HINTS
    assert found_hints(listed()) == NO_HINTS


def test_without_structured_replies_nobody_is_asked_for_hints() -> None:
    connecter = Connecter(Wishes("disk", hints=True), "srv")
    assert step(connecter, before_go(structured=False)).endswith(GO_DATA)


def test_a_question_for_hints_leaves_room_for_one_for_all_contexts() -> None:
    everything = OptionHandler(Option.LIST_META_CONTEXT, wanted=lambda _: True, data=lambda _: b"all")
    options = with_option(OPTIONS, everything, before=Option.GO)
    connecter = Connecter(Wishes("disk", hints=True), "srv", options=options)
    asked = step(connecter, UP_TO_HINTS + listed() + reply(Option.SET_META_CONTEXT, ACK))
    assert asked.endswith(pack_option(Option.LIST_META_CONTEXT, b"all"))
    assert step(connecter, reply(Option.LIST_META_CONTEXT, ACK)) == GO_DATA


def test_a_broken_answer_is_told_by_the_option_s_name() -> None:
    connecter = Connecter(Wishes("disk", hints=True), "srv")
    with pytest.raises(ProtocolError, match="srv: protocol error in NBD_OPT_LIST_META_CONTEXT reply: "):
        feed_connecter(connecter, UP_TO_HINTS + reply(Option.LIST_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0"))
    cut = Connecter(Wishes("disk", hints=True), "srv")
    feed_connecter(cut, UP_TO_HINTS)
    with pytest.raises(ConnectionLost, match="waiting for the reply to NBD_OPT_LIST_META_CONTEXT"):
        cut.end_of_stream()
