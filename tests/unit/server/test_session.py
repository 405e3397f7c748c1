"""A session: the listener and the device as one machine, and private options and commands in its tables."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import ConnectionLost, ProtocolError
from nbdshard.common.nbd import wire_options as wire
from nbdshard.common.nbd.commands import COMMANDS, CommandEntry
from nbdshard.common.nbd.constants import Command, Errno, Option, ReplyType
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.nbd.wire import Request as WireRequest
from nbdshard.common.nbd.wire import pack_request, pack_simple_reply
from nbdshard.server.haggling import SERVED_OPTIONS, ServedOption
from nbdshard.server.serving import Request
from nbdshard.server.session import Session
from support.twins import MIB, offers

CHOICE = wire.pack_client_flags(3) + wire.pack_option(Option.EXPORT_NAME, b"disk")
COMPARE = CommandEntry(4242, sends_payload=True)
DIGEST = CommandEntry(4243, receives_payload=True, content=frozenset({ReplyType.OFFSET_DATA}))


def fed(session: Session, stream: bytes) -> list[Request]:
    requests: list[Request] = []
    data = memoryview(stream)
    while data:
        target = session.receive_target()
        count = min(len(target), len(data))
        assert count, "nothing more is wanted"
        target[:count] = data[:count]
        requests += session.received(count)
        data = data[count:]
    return requests


def said(session: Session) -> bytes:
    data = b"".join(in_memory(session.data_to_send()))
    if data:
        session.sent(len(data))
    return data


def request(command: int, offset: int = 0, length: int = 0) -> bytes:
    return pack_request(WireRequest(0, command, 7, offset, length), extended=False)


def test_a_client_goes_from_the_greeting_to_its_end() -> None:
    session = Session(offers(), "client")
    (asked,) = fed(session, CHOICE + request(Command.FLUSH))
    assert session.device is not None
    session.device.done(asked)
    pieces = b"".join(in_memory(session.data_to_send()))
    assert pieces.startswith(wire.pack_greeting(3))
    assert pieces.endswith(pack_simple_reply(7))
    for _ in range(len(pieces)):
        session.sent(1)
    assert not session.finished
    fed(session, request(Command.DISC))
    assert session.finished


def test_a_client_that_leaves_before_it_has_chosen_is_finished_with_when_it_has_its_answer() -> None:
    session = Session(offers(), "client")
    said(session)
    fed(session, wire.pack_client_flags(3) + wire.pack_option(Option.ABORT))
    assert not session.finished
    assert said(session)
    assert session.finished
    assert not session.receive_target()


@pytest.mark.parametrize("stream", [b"\0\0\0\3half", CHOICE + request(Command.WRITE, 0, 10) + b"half"])
def test_a_client_that_leaves_in_the_middle_is_told_of(stream: bytes) -> None:
    session = Session(offers(), "client")
    fed(session, stream)
    with pytest.raises(ConnectionLost):
        session.end_of_stream()


def test_a_client_that_breaks_the_protocol_is_told_of() -> None:
    for stream in (b"\0\0\0\3" + bytes(16), CHOICE + bytes(28)):
        session = Session(offers(), "client")
        with pytest.raises(ProtocolError):
            fed(session, stream)


def test_who_is_to_leave_gets_nothing_more() -> None:
    session = Session(offers(), "client")
    fed(session, CHOICE)
    said(session)
    session.shut_down()
    assert fed(session, request(Command.READ, 0, 512)) == []
    assert said(session) == pack_simple_reply(7, Errno.ESHUTDOWN)


def test_a_private_command_may_send_payload_and_receive_some() -> None:
    session = Session(offers(), "client", commands={**COMMANDS, 4242: COMPARE, 4243: DIGEST})
    compare, digest = fed(session, CHOICE + request(4242, 512, 4) + b"abcd" + request(4243, 0, MIB))
    assert (compare.payload, digest.payload) == (b"abcd", b"")
    said(session)
    assert session.device is not None
    session.device.done(compare)
    session.device.content(digest, [bytes(MIB)])
    assert said(session) == pack_simple_reply(7) + pack_simple_reply(7) + bytes(MIB)


def test_a_private_option_may_be_added() -> None:
    mine = ServedOption(4711, lambda _haggling, data: [(3, bytes(data)[::-1])])
    session = Session(offers(), "client", options={**SERVED_OPTIONS, 4711: mine})
    said(session)
    fed(session, wire.pack_client_flags(3) + wire.pack_option(4711, b"abc"))
    assert said(session) == wire.pack_option_reply(4711, 3, b"cba") + wire.pack_option_reply(4711, 1)
