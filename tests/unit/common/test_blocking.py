"""common/blocking.py against servers in threads: what is told, how long is waited, how it parts."""

from __future__ import annotations

import signal
import time

import pytest

from nbdshard.common.blocking import BlockingClient, Timeouts, inspect, list_exports
from nbdshard.common.errors import BugError, ConnectionLost, ProtocolError, RequestError, TimedOut, UserError
from nbdshard.common.nbd.connecter import Goal, Wishes
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.common.ranges import Range
from support.command import started
from support.doubles import (
    CMD_DISC,
    CMD_FLUSH,
    EIO,
    OPT_LIST_META_CONTEXT,
    REP_ACK,
    REP_META_CONTEXT,
    REPLY_NONE,
    Double,
    Request,
    Talk,
    double,
)
from support.hostile import BROKEN_GO, BROKEN_HANDSHAKES, silent
from support.listening import Serve, listening
from support.waiting import WAIT_SECONDS, wait_for

PATIENT = Timeouts(connect=WAIT_SECONDS, handshake=WAIT_SECONDS, request=WAIT_SECONDS)
SHORT_HANDSHAKE = Timeouts(connect=WAIT_SECONDS, handshake=0.3, request=WAIT_SECONDS)
SHORT_REQUEST = Timeouts(connect=WAIT_SECONDS, handshake=WAIT_SECONDS, request=0.3)


def client(uri: str, timeouts: Timeouts = PATIENT) -> BlockingClient:
    return BlockingClient.open(parse_uri(uri), "peer", timeouts=timeouts)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("tcp", [False, True])
def test_what_is_written_is_read_back(extended: bool, tcp: bool) -> None:
    server = Double(bytearray(65536), extended=extended)
    with double(server, tcp=tcp) as uri:
        with client(uri) as one:
            one.write(Range(4096, 4100), b"abcd")
            one.write_zeroes(Range(4097, 4098))
            one.flush()
            assert one.read(Range(4095, 4101)) == b"\0a\0cd\0"
            assert one.extents(Range(0, 65536)) == [(Range(0, 65536), 0)]
            assert one.export.size == 65536
        wait_for("the disconnect to arrive", lambda: server.count(CMD_DISC) == 1)
        assert server.count(CMD_FLUSH) == 1


def test_inspect_tells_what_was_negotiated_and_how() -> None:
    class Listing(Double):
        def option(self, talk: Talk, option: int, data: bytes) -> bool | None:
            if option != OPT_LIST_META_CONTEXT:
                return super().option(talk, option, data)
            for number, name in enumerate((b"base:allocation", b"qemu:dirty\x1b")):
                talk.reply_to_option(option, REP_META_CONTEXT, number.to_bytes(4, "big") + name)
            talk.reply_to_option(option, REP_ACK)
            return None

    with double(Listing(bytearray(512))) as uri:
        findings = inspect(parse_uri(uri), "peer")
    assert findings.go
    assert findings.contexts_listed == ("base:allocation", "qemu:dirty\ufffd")
    assert findings.export.size == 512
    with double(Double(bytearray(512), go=False)) as uri:
        assert not inspect(parse_uri(uri), "peer").go


def test_a_request_that_the_server_refuses_leaves_the_connection_usable() -> None:
    class Refusing(Double):
        def flush(self, talk: Talk, request: Request) -> None:
            talk.done(request, EIO)

    with double(Refusing(bytearray(b"data"))) as uri, client(uri) as one:
        with pytest.raises(RequestError, match="EIO"):
            one.flush()
        assert one.read(Range(0, 4)) == b"data"


@pytest.mark.parametrize("name", BROKEN_HANDSHAKES)
def test_a_broken_handshake_ends_in_an_error_in_time(name: str) -> None:
    with listening(BROKEN_HANDSHAKES[name]) as state, pytest.raises((ProtocolError, ConnectionLost)) as caught:
        client(state.uri, SHORT_HANDSHAKE)
    assert str(caught.value).startswith("peer: ")


@pytest.mark.parametrize("name", BROKEN_GO)
def test_a_lie_in_the_answer_to_go_is_blamed_on_the_server(name: str) -> None:
    with double(BROKEN_GO[name](bytearray(1 << 20))) as uri, pytest.raises(ProtocolError, match=r"^peer: "):
        client(uri)


def test_a_server_that_never_greets_times_out() -> None:
    with listening(silent) as state, pytest.raises(TimedOut) as caught:
        client(state.uri, SHORT_HANDSHAKE)
    assert str(caught.value) == "peer: timed out while negotiating: no answer within 0.3 s"


def test_a_server_that_trickles_does_not_stretch_the_deadline() -> None:
    """Each byte comes in time; all of them together do not."""

    def trickle(connection: object) -> None:
        for byte in b"NBDMAGICIHAVEOPT\0\3":
            connection.sendall(bytes([byte]))  # type: ignore[attr-defined]
            time.sleep(0.05)  # the fault itself, not a wait

    serve: Serve = trickle
    with listening(serve) as state, pytest.raises(TimedOut, match="negotiating"):
        client(state.uri, SHORT_HANDSHAKE)


def test_a_request_without_an_answer_times_out_and_closes_the_connection() -> None:
    class Silent(Double):
        def read(self, talk: Talk, request: Request) -> None:
            pass

    with double(Silent(bytearray(4096))) as uri, client(uri, SHORT_REQUEST) as one:
        with pytest.raises(TimedOut) as caught:
            one.read(Range(0, 512))
        assert str(caught.value).startswith("peer: timed out while reading [0, 512): no answer within 0.3")


def test_a_server_that_hangs_up_in_mid_request_is_told() -> None:
    class Leaving(Double):
        def read(self, talk: Talk, request: Request) -> None:
            talk.hang_up()

    with double(Leaving(bytearray(4096))) as uri, client(uri) as one, pytest.raises(ConnectionLost) as caught:
        one.read(Range(0, 512))
    assert caught.value.peer == "peer"


def test_a_block_status_without_extents_is_the_servers_fault() -> None:
    class Empty(Double):
        def block_status(self, talk: Talk, request: Request) -> None:
            talk.chunk(request, REPLY_NONE, b"")

    with double(Empty(bytearray(4096))) as uri, client(uri) as one, pytest.raises(ProtocolError):
        one.extents(Range(0, 4096))


def test_closing_does_not_wait_for_a_server_that_keeps_the_connection() -> None:
    class Clinging(Double):
        def transmit(self, talk: Talk) -> None:
            talk.receive(28)
            talk.receive(1)  # until the client closes

    with double(Clinging(bytearray(512))) as uri:
        one = client(uri)
        start = time.monotonic()
        one.close()
        assert time.monotonic() - start < WAIT_SECONDS
        one.close()


def test_a_server_that_cannot_list_is_told() -> None:
    with double(Double(bytearray(512))) as uri, pytest.raises(UserError, match="does not list its exports"):
        list_exports(parse_uri(uri), "peer")


def test_wishes_that_lead_nowhere_are_our_fault() -> None:
    with double(Double(bytearray(512))) as uri, pytest.raises(BugError):
        BlockingClient.open(parse_uri(uri), "peer", wishes=Wishes(goal=Goal.INFO))


def test_ctrl_c_ends_a_waiting_info_with_one_line() -> None:
    with listening(silent) as state, started("info", state.uri) as run:
        wait_for("the connection", lambda: state.accepted == 1)
        run.signal_group(signal.SIGINT)
        outcome = run.wait()
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "nbdshard: interrupted\n")
