"""Requests in, events out, where the server keeps to the protocol. What it may break: test_client_errors.py."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import ConnectionLost, IllegalEvent, RequestError
from nbdshard.common.nbd.client import Arriving, Client, Done, Event, Sent
from nbdshard.common.nbd.commands import COMMANDS, CommandEntry
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.states import ClientState
from nbdshard.common.nbd.wire import pack_block_status, pack_error, pack_hole, pack_simple_reply
from nbdshard.common.ranges import Range
from support.nbd_feeding import MIB, an_export, chunk, data_chunk, feed_client, scatter, send_all

KIB4 = 4096
WHERE = Range.of(KIB4, KIB4)


def a_client(mode: str = "structured", handles: int = 8) -> Client:
    return Client(an_export(mode=mode), "srv", handles)


def failed(events: list[Event]) -> RequestError:
    (event,) = [event for event in events if isinstance(event, Done)]
    assert event.error is not None
    return event.error


# -- sending -----------------------------------------------------------------------------------------------------------

REQUESTS = [
    ("simple", lambda client: client.read(1, WHERE, memoryview(bytearray(KIB4))), "0000 0000"),
    (
        "structured",
        lambda client: client.read(1, WHERE, memoryview(bytearray(KIB4)), dont_fragment=True),
        "0004 0000",
    ),
    ("structured", lambda client: client.write_zeroes(1, WHERE), "0000 0006"),
    (
        "structured",
        lambda client: client.write_zeroes(1, WHERE, no_hole=True, fua=True, fast_zero=True),
        "0013 0006",
    ),
    ("structured", lambda client: client.trim(1, WHERE, fua=True), "0001 0004"),
    ("structured", lambda client: client.cache(1, WHERE), "0000 0005"),
    ("structured", lambda client: client.block_status(1, WHERE), "0000 0007"),
    ("structured", lambda client: client.block_status(1, WHERE, one=True), "0008 0007"),
]


@pytest.mark.parametrize(("mode", "queue", "flags_and_command"), REQUESTS)
def test_a_request_has_the_bytes_the_spec_draws(mode: str, queue: object, flags_and_command: str) -> None:
    client = a_client(mode)
    assert callable(queue)
    queue(client)
    (data,) = client.data_to_send()
    expected = f"25609513 {flags_and_command} 0000000000000001 0000000000001000 00001000"
    assert data.hex() == expected.replace(" ", "")


def test_a_flush_has_no_offset_and_no_length() -> None:
    client = a_client()
    client.flush(1)
    (data,) = client.data_to_send()
    assert data.hex() == "25609513000000030000000000000001" + "00" * 12


def test_an_extended_write_says_that_its_length_is_payload() -> None:
    client = a_client("extended")
    client.write(1, Range.of(KIB4, 4), [b"data"], fua=True)
    client.trim(2, WHERE)
    header, payload, trim = client.data_to_send()
    assert bytes(payload) == b"data"
    assert header.hex() == "21e41c71 0021 0001 0000000000000001 0000000000001000 0000000000000004".replace(" ", "")
    assert trim.hex() == "21e41c71 0000 0004 0000000000000002 0000000000001000 0000000000001000".replace(" ", "")


def test_header_and_payload_are_neighbours_and_small_requests_leave_together() -> None:
    client = a_client()
    payload = bytearray(b"datadata")
    client.flush(0)
    client.cache(1, WHERE)
    client.write(2, Range.of(0, 8), [memoryview(payload)[:4], bytes(payload[4:])])
    client.flush(3)
    assert [len(piece) for piece in client.data_to_send()] == [28 * 3, 4, 4, 28]
    assert client.data_to_send() == []


def test_payload_is_handed_out_as_it_is_not_as_a_copy() -> None:
    client = a_client()
    payload = bytearray(8)
    client.write(0, Range.of(0, 8), [memoryview(payload)])
    _, handed = client.data_to_send()
    payload[:] = b"contents"
    assert bytes(handed) == b"contents"


def test_payload_in_wider_items_counts_in_bytes() -> None:
    client = a_client()
    client.write(0, Range.of(0, 16), [memoryview(bytearray(16)).cast("Q")])
    assert [len(piece) for piece in client.data_to_send()] == [28, 16]


def test_sent_comes_with_the_last_byte_of_each_request() -> None:
    client = a_client()
    client.write(0, Range.of(0, 4), [b"data"])
    client.flush(1)
    client.flush(2)
    client.data_to_send()
    assert client.sent(31) == []
    assert client.sent(1) == [Sent(0)]
    assert client.sent(56) == [Sent(1), Sent(2)]


def test_a_reply_may_overtake_the_report_that_its_request_was_sent() -> None:
    client = a_client()
    client.write(3, Range.of(0, 4), [b"data"])
    client.data_to_send()
    assert feed_client(client, chunk(1, 0, 3)) == []
    assert client.pending_handles() == [3]
    assert client.sent(30) == []
    assert client.sent(2) == [Sent(3), Done(3)]
    assert client.pending == 0


# -- reading -----------------------------------------------------------------------------------------------------------


def test_payload_arrives_in_the_callers_buffer_and_nowhere_else() -> None:
    client = a_client("simple")
    buffer = bytearray(KIB4)
    client.read(5, WHERE, memoryview(buffer))
    send_all(client)
    (head,) = client.receive_target()
    assert len(head) == 16
    assert client.received(scatter([head], memoryview(pack_simple_reply(5)))) == [Arriving(5)]
    target, head = client.receive_target()
    assert (target.obj, len(target), len(head)) == (buffer, KIB4, 16)
    assert client.received(scatter([target], memoryview(b"a" * 100))) == []
    target, _ = client.receive_target()
    assert len(target) == KIB4 - 100
    assert client.received(scatter([target], memoryview(b"b" * (KIB4 - 100)))) == [Done(5)]
    assert buffer == b"a" * 100 + b"b" * (KIB4 - 100)


@pytest.mark.parametrize(("mode", "exact"), [("simple", 16), ("structured", 28), ("extended", 40)])
def test_a_target_for_headers_ends_where_payload_can_begin_while_a_read_is_pending(mode: str, exact: int) -> None:
    client = a_client(mode)
    client.flush(0)
    assert [len(view) for view in client.receive_target()] == [4096]
    client.read(1, WHERE, memoryview(bytearray(KIB4)))
    assert [len(view) for view in client.receive_target()] == [exact]


def test_one_receive_takes_the_rest_of_a_payload_and_the_next_header() -> None:
    client = a_client()
    buffers = [bytearray(4), bytearray(4)]
    for handle, buffer in enumerate(buffers):
        client.read(handle, Range.of(0, 4), memoryview(buffer))
    send_all(client)
    assert feed_client(client, data_chunk(0, 0, b"abcd", done=True)[:28]) == [Arriving(0)]
    first = memoryview(b"abcd" + data_chunk(1, 0, b"efgh", done=True)[:28])
    assert client.received(scatter(client.receive_target(), first)) == [Done(0), Arriving(1)]
    assert client.received(scatter(client.receive_target(), memoryview(b"efgh"))) == [Done(1)]
    assert buffers == [b"abcd", b"efgh"]


def test_the_buffer_is_let_go_when_the_read_is_done() -> None:
    client = a_client()
    buffer = bytearray(4)
    client.read(0, Range.of(0, 4), memoryview(buffer))
    send_all(client)
    feed_client(client, data_chunk(0, 0, b"abcd", done=True))
    buffer.append(1)  # raises BufferError as long as anybody holds a view of it


def test_payload_that_comes_with_headers_taken_before_the_read_was_queued_is_not_lost() -> None:
    client = a_client()
    client.flush(0)
    send_all(client)
    target = client.receive_target()
    buffer = bytearray(8000)
    client.read(1, Range.of(0, 8000), memoryview(buffer))
    send_all(client)
    stream = chunk(1, 0, 0) + data_chunk(1, 0, bytes(range(250)) * 32, done=True)
    taken = scatter(target, memoryview(stream))
    assert taken == 4096
    assert client.received(taken) == [Done(0), Arriving(1)]
    assert feed_client(client, stream[taken:]) == [Done(1)]
    assert buffer == bytes(range(250)) * 32


def test_chunks_come_in_any_order_and_between_those_of_other_replies() -> None:
    client = a_client()
    one, two = bytearray(12), bytearray(b"x" * 8)
    client.read(1, Range.of(100, 12), memoryview(one))
    client.read(2, Range.of(200, 8), memoryview(two))
    client.flush(3)
    send_all(client)
    stream = data_chunk(1, 108, b"ijkl") + data_chunk(2, 204, b"ssss") + chunk(1, 0, 3)
    stream += data_chunk(1, 100, b"abcd") + chunk(1, 2, 2, pack_hole(200, 4)) + data_chunk(1, 104, b"efgh")
    events = feed_client(client, stream + chunk(1, 0, 1))
    assert events == [Arriving(1), Arriving(2), Done(3), Done(2), Done(1)]
    assert (one, two) == (b"abcdefghijkl", b"\0\0\0\0ssss")


def test_a_hole_is_filled_with_zeroes() -> None:
    client = a_client()
    buffer = bytearray(b"x" * (3 * MIB))
    client.read(0, Range.of(0, 3 * MIB), memoryview(buffer))
    send_all(client)
    assert feed_client(client, chunk(1, 2, 0, pack_hole(0, 3 * MIB))) == [Arriving(0), Done(0)]
    assert buffer == bytes(3 * MIB)


def test_extended_replies_carry_the_offset_of_the_request() -> None:
    client = a_client("extended")
    buffer = bytearray(4)
    client.read(0, Range.of(512, 4), memoryview(buffer))
    send_all(client)
    stream = chunk(1, 1, 0, (512).to_bytes(8, "big") + b"data", extended=True, offset=512)
    assert feed_client(client, stream) == [Arriving(0), Done(0)]
    assert buffer == b"data"


# -- failing -----------------------------------------------------------------------------------------------------------


def test_a_simple_error_to_a_read_has_no_payload() -> None:
    client = a_client("simple")
    client.read(0, WHERE, memoryview(bytearray(KIB4)))
    client.flush(1)
    send_all(client)
    events = feed_client(client, pack_simple_reply(0, 5) + pack_simple_reply(1))
    assert [event.handle for event in events if isinstance(event, Done)] == [0, 1]
    assert isinstance(events[0], Done)
    assert str(events[0].error) == "EIO"
    assert len(client.receive_target()[0]) == 4096


def test_an_error_chunk_fails_the_request_when_its_reply_is_over_and_not_before() -> None:
    client = a_client()
    client.read(0, Range.of(0, 8), memoryview(bytearray(8)))
    send_all(client)
    assert feed_client(client, data_chunk(0, 0, b"abcd")) == [Arriving(0)]
    assert feed_client(client, chunk(0, 0x8002, 0, pack_error(5, b"bad sector\n", 4))) == []
    assert feed_client(client, data_chunk(0, 4, b"\0\0\0\0")) == []
    error = failed(feed_client(client, chunk(1, 0, 0)))
    assert (error.errno_name, error.errno_value, str(error)) == ("EIO", 5, "EIO (bad sector�)")


def test_after_an_error_chunk_the_rest_need_not_come() -> None:
    client = a_client()
    client.read(0, Range.of(0, 8), memoryview(bytearray(8)))
    send_all(client)
    assert str(failed(feed_client(client, chunk(1, 0x8001, 0, pack_error(12))))) == "ENOMEM"


def test_the_first_of_several_errors_is_told() -> None:
    client = a_client()
    client.read(0, Range.of(0, 8), memoryview(bytearray(8)))
    send_all(client)
    stream = chunk(0, 0x8002, 0, pack_error(5, b"", 1)) + chunk(1, 0x8002, 0, pack_error(12, b"", 2))
    assert str(failed(feed_client(client, stream))) == "EIO"


def test_an_error_type_from_the_future_is_an_error_like_any_other() -> None:
    client = a_client()
    client.flush(0)
    send_all(client)
    assert str(failed(feed_client(client, chunk(1, 0x8099, 0, pack_error(28, b"full") + b"more")))) == "ENOSPC (full)"


def test_an_error_value_from_the_future_tells_its_number() -> None:
    client = a_client("simple")
    client.flush(0)
    send_all(client)
    assert str(failed(feed_client(client, pack_simple_reply(0, 116)))) == "EINVAL (unknown error value 116)"


@pytest.mark.parametrize(
    "stream", [pack_simple_reply(0, 108), chunk(1, 0x8001, 0, pack_error(5)).replace(b"\0\0\0\5", b"\0\0\0\x6c")]
)
def test_a_server_that_shuts_down_is_remembered(stream: bytes) -> None:
    client = a_client()
    client.flush(0)
    send_all(client)
    assert not client.shutdown_seen
    assert str(failed(feed_client(client, stream))) == "ESHUTDOWN"
    assert client.shutdown_seen


def test_a_shutdown_behind_another_error_is_remembered_too() -> None:
    client = a_client()
    client.read(0, Range.of(0, 8), memoryview(bytearray(8)))
    send_all(client)
    stream = chunk(0, 0x8002, 0, pack_error(5, b"", 1)) + chunk(1, 0x8001, 0, pack_error(108))
    assert str(failed(feed_client(client, stream))) == "EIO"
    assert client.shutdown_seen


def test_a_simple_reply_may_answer_what_has_no_payload_though_structured_replies_were_agreed_on() -> None:
    client = a_client()
    client.flush(0)
    client.block_status(1, WHERE)
    send_all(client)
    events = feed_client(client, pack_simple_reply(0) + pack_simple_reply(1, 22))
    assert events[0] == Done(0)
    assert str(failed(events[1:])) == "EINVAL"


# -- block status ------------------------------------------------------------------------------------------------------


def status(*descriptors: tuple[int, int], context: int = 7, wide: bool = False, done: bool = True) -> bytes:
    payload = pack_block_status(context, descriptors, wide=wide)
    return chunk(int(done), 6 if wide else 5, 1, payload, extended=wide, offset=KIB4 if wide else 0)


def extents_of(stream: bytes, mode: str = "structured") -> list[tuple[Range, int]] | None:
    client = a_client(mode)
    client.block_status(1, WHERE)
    send_all(client)
    (event,) = feed_client(client, stream)
    assert isinstance(event, Done)
    assert event.error is None
    return event.extents


def test_extents_are_clipped_to_what_was_asked_and_neighbours_merged() -> None:
    stream = status((512, 0), (512, 0), (1024, 3), (1024, 3), (512, 1), (1 << 20, 2))
    assert extents_of(stream) == [
        (Range(4096, 5120), 0),
        (Range(5120, 7168), 3),
        (Range(7168, 7680), 1),
        (Range(7680, 8192), 2),
    ]


def test_a_short_answer_is_an_answer() -> None:
    assert extents_of(status((512, 3))) == [(Range(4096, 4608), 3)]


def test_an_extent_behind_the_end_of_the_request_is_left_out() -> None:
    assert extents_of(status((4096, 3), (4096, 0))) == [(Range(4096, 8192), 3)]


def test_extents_come_in_64_bits_with_extended_headers() -> None:
    assert extents_of(status((512, 3), (1 << 40, 0), wide=True), "extended") == [
        (Range(4096, 4608), 3),
        (Range(4608, 8192), 0),
    ]


def test_extents_in_32_bits_are_taken_with_extended_headers_too() -> None:
    stream = chunk(1, 5, 1, pack_block_status(7, [(4096, 1)]), extended=True, offset=KIB4)
    assert extents_of(stream, "extended") == [(Range(4096, 8192), 1)]


def test_other_contexts_that_were_agreed_on_are_passed_over() -> None:
    client = Client(an_export(contexts={"base:allocation": 7, "qemu:dirty": 9}), "srv", 8)
    client.block_status(1, WHERE)
    send_all(client)
    stream = status((512, 1), context=9, done=False) + status((4096, 0), context=7, done=False) + chunk(1, 0, 1)
    assert feed_client(client, stream) == [Done(1, None, [(Range(4096, 8192), 0)])]


def test_a_block_status_that_failed_has_no_extents() -> None:
    client = a_client()
    client.block_status(1, WHERE)
    send_all(client)
    (event,) = feed_client(client, status((4096, 0), done=False) + chunk(1, 0x8001, 1, pack_error(5)))
    assert isinstance(event, Done)
    assert (str(event.error), event.extents) == ("EIO", None)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_disconnect_is_the_last_thing_said_and_replies_still_count() -> None:
    client = a_client()
    client.flush(0)
    client.disconnect()
    data, events = send_all(client)
    assert data[28:].hex() == "2560951300000002" + "00" * 20
    assert events == [Sent(0)]
    with pytest.raises(IllegalEvent):
        client.flush(1)
    with pytest.raises(IllegalEvent):
        client.disconnect()
    assert feed_client(client, chunk(1, 0, 0)) == [Done(0)]
    assert client.end_of_stream() == []
    assert client.state is ClientState.CLOSED


@pytest.mark.parametrize(("requests", "doing"), [(0, "idle"), (1, "waiting for 1 reply"), (3, "waiting for 3 replies")])
def test_an_end_that_was_not_asked_for_names_what_is_lost(requests: int, doing: str) -> None:
    client = a_client()
    for handle in range(requests):
        client.flush(handle)
    with pytest.raises(ConnectionLost) as caught:
        client.end_of_stream()
    assert str(caught.value) == f"srv: connection lost while {doing}: the server closed the connection"
    assert client.pending_handles() == list(range(requests))
    assert client.data_to_send() == []


def test_a_server_that_closes_before_all_replies_came_is_lost_although_it_was_told_to_close() -> None:
    client = a_client()
    client.flush(0)
    client.disconnect()
    send_all(client)
    with pytest.raises(ConnectionLost, match="waiting for 1 reply"):
        client.end_of_stream()


def test_nothing_happens_after_the_end() -> None:
    client = a_client()
    client.disconnect()
    send_all(client)
    client.end_of_stream()
    for event in (
        lambda: client.flush(0),
        client.receive_target,
        lambda: client.received(1),
        lambda: client.sent(1),
        client.end_of_stream,
        client.disconnect,
    ):
        with pytest.raises(IllegalEvent):
            event()


def test_a_command_from_outside_is_an_entry_in_the_table() -> None:
    resize = CommandEntry(8, needs=TransmissionFlag.SEND_RESIZE, writes=True)
    client = Client(an_export(), "srv", 8, commands={**COMMANDS, 8: resize})
    client.submit(0, 8, Range(0, 512))
    (data,) = client.data_to_send()
    assert data.hex()[8:16] == "00000008"
