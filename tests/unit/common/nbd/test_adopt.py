"""Requests that somebody else has sent, and bytes that somebody else has received: the client takes both over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from nbdshard.common.errors import BugError, ConnectionLost, IllegalEvent, ProtocolError
from nbdshard.common.nbd.client import Arriving, Client, Done, Event, Sent
from nbdshard.common.nbd.constants import Command, TransmissionFlag
from nbdshard.common.nbd.sinks import BufferSink
from nbdshard.common.nbd.states import ClientState
from nbdshard.common.nbd.wire import pack_error, pack_hole, pack_simple_reply
from nbdshard.common.ranges import Range
from support.nbd_feeding import an_export, chunk, data_chunk, feed_client, scatter, send_all, sizes_of

MODES = ["simple", "structured", "extended"]
WHERE = Range.of(4096, 8)  # of the READ with handle 5
ELSEWHERE = Range.of(512, 4)  # of the READ with handle 2


def an_heir(mode: str = "structured", handles: int = 8) -> Client:
    return Client(an_export(mode=mode), "srv", handles)


def adopt_read(client: Client, handle: int, where: Range) -> bytearray:
    """The buffer that is read into, which is dirty."""
    buffer = bytearray(b"\xee" * where.length)
    client.adopt(handle, Command.READ, where, BufferSink(memoryview(buffer)))
    return buffer


def data_reply(mode: str, cookie: int, where: Range, data: bytes) -> bytes:
    """All of a READ's reply in one piece."""
    if mode == "simple":
        return pack_simple_reply(cookie) + data
    payload = where.start.to_bytes(8, "big") + data
    return chunk(1, 1, cookie, payload, extended=mode == "extended", offset=where.start)


def error_reply(mode: str, cookie: int, where: Range, error: int) -> bytes:
    if mode == "simple":
        return pack_simple_reply(cookie, error)
    return chunk(1, 0x8001, cookie, pack_error(error, b"no"), extended=mode == "extended", offset=where.start)


def ack(mode: str, cookie: int, start: int) -> bytes:
    return chunk(1, 0, cookie, extended=True, offset=start) if mode == "extended" else pack_simple_reply(cookie)


def plain(events: Sequence[Event]) -> list[tuple[object, ...]]:
    """Errors are exceptions, which do not compare by their contents."""
    return [
        (type(event), event.handle, str(event.error) if isinstance(event, Done) and event.error else "")
        for event in events
    ]


# -- what comes after the adoption -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_reply_to_an_adopted_read_is_received_like_any_other(mode: str) -> None:
    client = an_heir(mode)
    buffer = adopt_read(client, 5, WHERE)
    assert (client.pending, client.pending_handles(), client.data_to_send()) == (1, [5], [])
    assert feed_client(client, data_reply(mode, 5, WHERE, b"contents")) == [Arriving(5), Done(5)]
    assert buffer == b"contents"
    assert (client.pending, client.pending_handles()) == (0, [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("command", "where", "start"), [(Command.WRITE, WHERE, 4096), (Command.FLUSH, None, 0)])
def test_an_adopted_write_or_flush_is_done_with_its_reply(
    mode: str, command: Command, where: Range | None, start: int
) -> None:
    client = an_heir(mode)
    client.adopt(7, command, where)
    assert feed_client(client, ack(mode, 7, start)) == [Done(7)]
    client.adopt(7, command, where)
    assert client.overhear(ack(mode, 7, start)) == [Done(7)]
    assert client.pending == 0


def test_a_handle_is_free_again_when_its_adopted_request_is_done() -> None:
    client = an_heir()
    client.adopt(5, Command.WRITE, WHERE)
    assert client.overhear(pack_simple_reply(5)) == [Done(5)]
    client.flush(5)
    assert send_all(client)[1] == [Sent(5)]
    assert feed_client(client, pack_simple_reply(5)) == [Done(5)]


def test_the_buffer_is_let_go_when_the_adopted_read_is_done() -> None:
    client = an_heir()
    buffer = adopt_read(client, 5, WHERE)
    stream = data_reply("structured", 5, WHERE, b"contents")
    client.overhear(stream[:31])
    feed_client(client, stream[31:])
    buffer.append(1)  # raises BufferError as long as anybody holds a view of it


@pytest.mark.parametrize(("mode", "exact"), [("simple", 16), ("structured", 28), ("extended", 40)])
def test_a_target_for_headers_ends_where_payload_can_begin_while_an_adopted_read_is_pending(
    mode: str, exact: int
) -> None:
    client = an_heir(mode)
    adopt_read(client, 5, WHERE)
    assert [len(view) for view in client.receive_target()] == [exact]
    reply = data_reply(mode, 5, WHERE, b"contents")
    assert client.overhear(reply[:10]) == []
    assert [len(view) for view in client.receive_target()] == [exact - 10]
    assert feed_client(client, reply[10:]) == [Arriving(5), Done(5)]
    assert [len(view) for view in client.receive_target()] == [4096]


def test_an_adopted_write_leaves_room_for_many_headers() -> None:
    client = an_heir()
    client.adopt(5, Command.WRITE, WHERE)
    client.overhear(pack_simple_reply(5)[:9])
    assert [len(view) for view in client.receive_target()] == [4096 - 9]


def test_what_was_sent_is_adopted_whatever_the_export_allows() -> None:
    client = Client(an_export(flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY), "srv", 8)
    client.adopt(5, Command.WRITE, WHERE)
    client.adopt(7, Command.FLUSH, None)
    assert client.overhear(pack_simple_reply(5, 1) + pack_simple_reply(7))[1:] == [Done(7)]


# -- what came before, cut anywhere ------------------------------------------------------------------------------------


def heir_of_two(mode: str) -> tuple[Client, list[bytearray]]:
    client = an_heir(mode)
    return client, [adopt_read(client, 5, WHERE), adopt_read(client, 2, ELSEWHERE)]


def fed(mode: str, stream: bytes) -> tuple[list[Event], list[bytearray]]:
    """What comes of `stream` if all of it is received by the client itself."""
    client, buffers = heir_of_two(mode)
    return feed_client(client, stream), buffers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("byte_by_byte", [False, True])
def test_replies_do_not_depend_on_where_the_overheard_part_of_them_ends(mode: str, byte_by_byte: bool) -> None:
    stream = data_reply(mode, 5, WHERE, b"contents") + data_reply(mode, 2, ELSEWHERE, b"data")
    for cut in range(len(stream) + 1):
        client, buffers = heir_of_two(mode)
        overheard = client.overhear(stream[:cut])
        assert (overheard, buffers) == fed(mode, stream[:cut]), f"{cut} bytes overheard"
        rest = feed_client(client, stream[cut:], [1] * len(stream) if byte_by_byte else None)
        assert overheard + rest == [Arriving(5), Done(5), Arriving(2), Done(2)], f"{cut} bytes overheard"
        assert buffers == [b"contents", b"data"], f"{cut} bytes overheard"
        assert client.pending == 0


MANY_CHUNKS = {
    "structured": data_chunk(5, 4100, b"ents")
    + chunk(1, 1, 2, (512).to_bytes(8, "big") + b"data")
    + chunk(0, 2, 5, pack_hole(4096, 4))
    + chunk(1, 0, 5),
    "extended": chunk(0, 1, 5, (4100).to_bytes(8, "big") + b"ents", extended=True, offset=4096)
    + chunk(1, 1, 2, (512).to_bytes(8, "big") + b"data", extended=True, offset=512)
    + chunk(0, 2, 5, pack_hole(4096, 4), extended=True, offset=4096)
    + chunk(1, 0, 5, extended=True, offset=4096),
}


@pytest.mark.parametrize("mode", sorted(MANY_CHUNKS))
def test_a_reply_in_chunks_between_those_of_another_may_be_overheard_up_to_any_byte(mode: str) -> None:
    stream = MANY_CHUNKS[mode]
    for cut in range(len(stream) + 1):
        client, buffers = heir_of_two(mode)
        events = client.overhear(stream[:cut]) + feed_client(client, stream[cut:])
        assert events == [Arriving(5), Arriving(2), Done(2), Done(5)], f"{cut} bytes overheard"
        assert buffers == [b"\0\0\0\0ents", b"data"], f"{cut} bytes overheard"


@pytest.mark.parametrize("mode", MODES)
def test_an_error_may_be_overheard_up_to_any_byte(mode: str) -> None:
    stream = error_reply(mode, 5, WHERE, 5) + data_reply(mode, 2, ELSEWHERE, b"data")
    text = "EIO" if mode == "simple" else "EIO (no)"
    for cut in range(len(stream) + 1):
        client, buffers = heir_of_two(mode)
        events = client.overhear(stream[:cut]) + feed_client(client, stream[cut:])
        assert plain(events) == [(Done, 5, text), (Arriving, 2, ""), (Done, 2, "")], f"{cut} bytes overheard"
        assert buffers == [b"\xee" * 8, b"data"], f"{cut} bytes overheard"


def test_a_hole_is_overheard_as_far_as_the_head_of_data_would_reach() -> None:
    client = an_heir()
    buffer = adopt_read(client, 5, WHERE)
    stream = chunk(1, 2, 5, pack_hole(4096, 8))
    assert client.overhear(stream[:28]) == []
    assert [len(view) for view in client.receive_target()] == [4, 28]
    assert feed_client(client, stream[28:]) == [Arriving(5), Done(5)]
    assert buffer == bytes(8)


def test_the_rest_of_an_overheard_payload_goes_where_the_sink_wants_it() -> None:
    client = an_heir()
    buffer = adopt_read(client, 5, WHERE)
    stream = data_reply("structured", 5, WHERE, b"contents")
    assert client.overhear(stream[:31]) == [Arriving(5)]
    assert client.payload_left == 5
    target, head = client.receive_target()
    assert (target.obj, len(target), len(head)) == (buffer, 5, 28)
    assert buffer == b"con" + b"\xee" * 5
    assert client.received(scatter([target], memoryview(b"tents"))) == [Done(5)]
    assert buffer == b"contents"


class SpliceSink(BufferSink):
    """What is not overheard is moved past the client."""

    def target(self) -> memoryview:
        return memoryview(b"")


def test_overheard_payload_is_written_and_the_rest_is_spliced() -> None:
    client = an_heir()
    buffer = bytearray(b"\xee" * 8)
    sink = SpliceSink(memoryview(buffer))
    client.adopt(5, Command.READ, WHERE, sink)
    assert client.overhear(data_reply("structured", 5, WHERE, b"contents")[:31]) == [Arriving(5)]
    assert (client.receive_target(), client.payload_left, client.payload_sink) == ([], 5, sink)
    assert client.received(5) == [Done(5)]
    assert buffer == b"con" + b"\xee" * 5


# -- several at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_acks_are_overheard_several_at_once_with_a_part_of_one_at_the_end(mode: str) -> None:
    first, second, third, fourth = (ack(mode, handle, 4096 * handle) for handle in (3, 1, 2, 0))
    for part in range(len(fourth)):
        client = an_heir(mode)
        for handle in range(4):
            client.adopt(handle, Command.WRITE, Range.of(4096 * handle, 512))
        assert client.overhear(first + second + third + fourth[:part]) == [Done(3), Done(1), Done(2)]
        assert client.pending_handles() == [0]
        assert feed_client(client, fourth[part:]) == [Done(0)], f"{part} bytes of the last one overheard"


@pytest.mark.parametrize("mode", MODES)
def test_a_write_that_failed_is_overheard_in_front_of_those_that_did_not(mode: str) -> None:
    client = an_heir(mode)
    client.adopt(1, Command.WRITE, WHERE)
    client.adopt(2, Command.WRITE, ELSEWHERE)
    client.adopt(7, Command.FLUSH, None)
    stream = error_reply(mode, 1, WHERE, 28) + ack(mode, 2, 512) + ack(mode, 7, 0)
    text = "ENOSPC" if mode == "simple" else "ENOSPC (no)"
    assert plain(client.overhear(stream)) == [(Done, 1, text), (Done, 2, ""), (Done, 7, "")]
    assert client.pending == 0


def test_a_write_is_answered_by_chunks_where_the_server_prefers_them() -> None:
    client = an_heir()
    client.adopt(1, Command.WRITE, WHERE)
    client.adopt(2, Command.WRITE, ELSEWHERE)
    stream = chunk(1, 0, 1) + chunk(1, 0, 2)
    assert client.overhear(stream[:23]) == [Done(1)]
    assert feed_client(client, stream[23:]) == [Done(2)]


def test_as_many_bytes_may_be_overheard_as_headers_are_taken_at_once() -> None:
    client = an_heir(handles=256)
    for handle in range(256):
        client.adopt(handle, Command.WRITE, Range.of(512 * handle, 512))
    stream = b"".join(pack_simple_reply(handle) for handle in range(256))
    assert len(stream) == 4096
    assert client.overhear(stream) == [Done(handle) for handle in range(256)]


def test_nothing_at_all_may_be_overheard() -> None:
    client = an_heir()
    buffer = adopt_read(client, 5, WHERE)
    assert client.overhear(b"") == []
    assert feed_client(client, data_reply("structured", 5, WHERE, b"contents")) == [Arriving(5), Done(5)]
    assert buffer == b"contents"


# -- beside the client's own requests ----------------------------------------------------------------------------------


def test_sent_is_told_of_what_the_client_sent_itself_and_of_nothing_else() -> None:
    client = an_heir()
    adopt_read(client, 5, WHERE)
    client.adopt(2, Command.WRITE, ELSEWHERE)
    client.write(0, Range.of(0, 4), [b"data"])
    client.adopt(7, Command.FLUSH, None)
    client.flush(1)
    assert [len(piece) for piece in client.data_to_send()] == [28, 4, 28]
    assert client.sent(31) == []
    assert client.sent(1) == [Sent(0)]
    assert client.sent(28) == [Sent(1)]
    stream = b"".join(pack_simple_reply(handle) for handle in (7, 1, 2, 0))
    assert feed_client(client, stream) == [Done(7), Done(1), Done(2), Done(0)]
    assert client.pending_handles() == [5]


def test_an_adopted_request_is_done_while_one_of_our_own_is_still_on_its_way_out() -> None:
    client = an_heir()
    client.flush(0)
    client.data_to_send()
    client.adopt(2, Command.WRITE, ELSEWHERE)
    assert feed_client(client, pack_simple_reply(0) + pack_simple_reply(2)) == [Done(2)]
    assert client.sent(28) == [Sent(0), Done(0)]


def test_replies_to_adopted_requests_and_to_our_own_mix() -> None:
    client = an_heir()
    inherited, own = adopt_read(client, 5, WHERE), bytearray(b"\xee" * 4)
    assert client.overhear(data_reply("structured", 5, WHERE, b"contents")[:30]) == [Arriving(5)]
    client.read(2, ELSEWHERE, memoryview(own))
    send_all(client)
    stream = b"ntents" + data_chunk(2, 512, b"data", done=True)
    assert feed_client(client, stream, sizes_of(3)) == [Done(5), Arriving(2), Done(2)]
    assert [inherited, own] == [b"contents", b"data"]


def test_replies_to_adopted_requests_still_count_after_a_disconnect() -> None:
    client = an_heir()
    client.adopt(2, Command.WRITE, ELSEWHERE)
    client.adopt(7, Command.FLUSH, None)
    client.disconnect()
    assert client.overhear(pack_simple_reply(2)) == [Done(2)]
    assert feed_client(client, pack_simple_reply(7)) == [Done(7)]
    assert client.end_of_stream() == []


# -- a server that breaks the protocol ---------------------------------------------------------------------------------

REPLY = "srv: protocol error in a reply: "
TO_READ = "srv: protocol error in the reply to NBD_CMD_READ of [4096, 4104): "
TO_WRITE = "srv: protocol error in the reply to NBD_CMD_WRITE of [512, 516): "
TO_FLUSH = "srv: protocol error in the reply to NBD_CMD_FLUSH: "

BROKEN = [
    (
        "simple",
        b"HTTP/1.1 400 Bad Request",
        REPLY + "magic number 0x48545450, which starts no reply on this connection",
    ),
    ("structured", bytes(28), REPLY + "magic number 0x0, which starts no reply on this connection"),
    (
        "extended",
        pack_simple_reply(2),
        REPLY + "magic number 0x67446698, which starts no reply on this connection",
    ),
    ("simple", pack_simple_reply(3), REPLY + "a reply with cookie 3, which no pending request has"),
    ("simple", pack_simple_reply(8), REPLY + "a reply with cookie 8, which no pending request has"),
    ("structured", pack_simple_reply(2) * 2, REPLY + "a reply with cookie 2, which no pending request has"),
    (
        "structured",
        pack_simple_reply(5),
        TO_READ + "a simple reply with payload where structured replies were agreed on",
    ),
    (
        "structured",
        data_chunk(5, 4095, b"contents", done=True),
        TO_READ + "data for [4095, 4103), outside of the request [4096, 4104)",
    ),
    ("structured", data_chunk(5, 4096, b"cont", done=True), TO_READ + "success, but only 4 of 8 bytes came"),
    ("structured", chunk(1, 0, 5), TO_READ + "success, but only 0 of 8 bytes came"),
    ("structured", data_chunk(2, 512, b"data"), TO_WRITE + "NBD_REPLY_TYPE_OFFSET_DATA, which is no answer to it"),
    (
        "extended",
        chunk(1, 0, 2, extended=True, offset=513),
        TO_WRITE + "a reply for offset 513 to a request for offset 512",
    ),
    ("structured", chunk(1, 99, 7), TO_FLUSH + "a chunk of unknown type 99"),
]


@pytest.mark.parametrize(("mode", "data", "text"), BROKEN)
def test_a_server_that_was_overheard_breaking_the_protocol_is_not_listened_to_any_more(
    mode: str, data: bytes, text: str
) -> None:
    client = an_heir(mode)
    adopt_read(client, 5, WHERE)
    client.adopt(2, Command.WRITE, ELSEWHERE)
    client.adopt(7, Command.FLUSH, None)
    with pytest.raises(ProtocolError) as caught:
        client.overhear(data)
    assert str(caught.value) == text
    assert client.state is ClientState.FAILED
    assert client.pending_handles()
    for event in (lambda: client.overhear(b""), client.receive_target, client.end_of_stream):
        with pytest.raises(IllegalEvent):
            event()


def test_garbage_that_is_too_short_to_tell_is_told_when_more_has_come() -> None:
    client = an_heir()
    client.adopt(2, Command.WRITE, ELSEWHERE)
    assert client.overhear(b"HTTP/1.1") == []
    with pytest.raises(ProtocolError, match="magic number 0x48545450, which starts no reply on this connection"):
        feed_client(client, b" 400 Bad Request")


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overheard", "left", "doing"),
    [(0, [2, 5], "waiting for 2 replies"), (16, [5], "waiting for 1 reply"), (47, [5], "waiting for 1 reply")],
)
def test_an_end_after_an_adoption_names_what_is_lost(overheard: int, left: list[int], doing: str) -> None:
    client = an_heir()
    client.adopt(2, Command.WRITE, ELSEWHERE)
    adopt_read(client, 5, WHERE)
    client.overhear((pack_simple_reply(2) + data_reply("structured", 5, WHERE, b"contents"))[:overheard])
    with pytest.raises(ConnectionLost) as caught:
        client.end_of_stream()
    assert str(caught.value) == f"srv: connection lost while {doing}: the server closed the connection"
    assert client.pending_handles() == left


# -- misuse ------------------------------------------------------------------------------------------------------------

MISUSE: list[tuple[Callable[[Client], object], str]] = [
    (lambda client: client.adopt(0, Command.WRITE, WHERE), "adopting a request with handle 0 in state RUNNING"),
    (lambda client: client.adopt(5, Command.WRITE, WHERE), "adopting a request with handle 5 in state RUNNING"),
    (lambda client: client.adopt(8, Command.WRITE, WHERE), "adopting a request with handle 8 in state RUNNING"),
    (lambda client: client.adopt(-1, Command.WRITE, WHERE), "adopting a request with handle -1 in state RUNNING"),
    (lambda client: client.adopt(1, 99, WHERE), "command 99 is not in the table of commands"),
    (lambda client: client.adopt(1, Command.DISC, None), "NBD_CMD_DISC is not in the table of commands"),
    (lambda client: client.flush(5), "a request with handle 5, which is taken"),
    (lambda client: client.overhear(bytes(4097)), "overhearing 4097 bytes in the middle of a reply"),
]


@pytest.mark.parametrize(("misuse", "text"), MISUSE)
def test_misuse_raises_and_changes_nothing(misuse: Callable[[Client], object], text: str) -> None:
    client = an_heir()
    client.flush(0)
    buffer = adopt_read(client, 5, WHERE)
    with pytest.raises(BugError) as caught:
        misuse(client)
    assert text in str(caught.value)
    assert (client.state, client.pending, client.pending_handles()) == (ClientState.RUNNING, 2, [0, 5])
    assert send_all(client)[1] == [Sent(0)]
    stream = pack_simple_reply(0) + data_reply("structured", 5, WHERE, b"contents")
    assert client.overhear(stream) == [Done(0), Arriving(5), Done(5)]
    assert buffer == b"contents"
    assert [len(view) for view in client.receive_target()] == [4096]


@pytest.mark.parametrize("taken", [1, 27, 28, 35])  # of the head, all of it, and of the payload
@pytest.mark.parametrize("take", [feed_client, Client.overhear])
def test_nothing_is_overheard_in_the_middle_of_a_reply(take: Callable[[Client, bytes], object], taken: int) -> None:
    client = an_heir()
    buffer = adopt_read(client, 5, WHERE)
    stream = data_reply("structured", 5, WHERE, b"contents")
    take(client, stream[:taken])
    for data in (stream[taken:], pack_simple_reply(5), b""):
        with pytest.raises(BugError, match=rf"^overhearing {len(data)} bytes in the middle of a reply$"):
            client.overhear(data)
    assert feed_client(client, stream[taken:])[-1] == Done(5)
    assert buffer == b"contents"


def test_between_two_chunks_of_a_reply_its_rest_may_be_overheard() -> None:
    client = an_heir()
    buffer = adopt_read(client, 5, WHERE)
    assert feed_client(client, data_chunk(5, 4096, b"cont")) == [Arriving(5)]
    assert client.overhear(data_chunk(5, 4100, b"ents", done=True)) == [Done(5)]
    assert buffer == b"contents"


def test_a_target_from_before_is_no_place_for_what_comes_after_the_overheard() -> None:
    client = an_heir()
    buffer = adopt_read(client, 5, WHERE)
    stream = data_reply("structured", 5, WHERE, b"contents")
    client.receive_target()
    client.overhear(stream[:28])
    with pytest.raises(IllegalEvent, match="8 bytes received of 0 offered"):
        client.received(8)
    assert feed_client(client, stream[28:]) == [Done(5)]
    assert buffer == b"contents"


def test_nothing_is_adopted_once_the_server_was_told_to_close() -> None:
    client = an_heir()
    client.disconnect()
    with pytest.raises(IllegalEvent, match="adopting a request with handle 1 in state DISCONNECTING"):
        client.adopt(1, Command.WRITE, WHERE)
    client.end_of_stream()
    with pytest.raises(IllegalEvent, match="overhear in state CLOSED"):
        client.overhear(b"")
    assert client.pending == 0
