"""Payload that is not in memory: how the client counts it, hands it out, and says where what arrives shall go."""

from __future__ import annotations

import array

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.nbd.client import Arriving, Client, Done, Sent
from nbdshard.common.nbd.payload import Elsewhere, Piece, as_bytes, in_memory
from nbdshard.common.nbd.sinks import BufferSink
from nbdshard.common.nbd.wire import pack_error, pack_simple_reply
from nbdshard.common.ranges import Range
from support.nbd_feeding import an_export, chunk, data_chunk, feed_client, scatter, send_all

HEADER = 28  # bytes of a WRITE's header, and of a data chunk's


class Grown(Elsewhere):
    """As a run in a pipe: it has got longer since it was made."""

    def grow(self, count: int) -> None:
        self.length += count


def a_client() -> Client:
    return Client(an_export(), "srv", 4)


def write(client: Client, handle: int, *payload: Piece) -> None:
    client.write(handle, Range.of(0, sum(map(len, payload))), payload)


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_a_piece_elsewhere_is_as_long_as_it_says() -> None:
    piece = Grown(3)
    piece.grow(4)
    assert (len(piece), len(Elsewhere())) == (7, 0)
    assert as_bytes(piece) is piece


def test_a_piece_in_memory_is_counted_in_bytes() -> None:
    numbers = memoryview(array.array("I", [1, 2]))
    assert len(numbers) == 2
    view = as_bytes(numbers)
    assert len(view) == 8
    assert isinstance(view, memoryview) and bytes(view) == bytes(numbers)
    plain = as_bytes(b"plain")
    assert isinstance(plain, memoryview) and bytes(plain) == b"plain"


def test_a_piece_with_gaps_is_refused() -> None:
    with pytest.raises(BugError, match="payload that is not contiguous"):
        as_bytes(memoryview(b"abcdef")[::2])


def test_a_caller_that_queues_memory_only_is_given_memory_only() -> None:
    pieces: list[Piece] = [b"header", memoryview(b"payload")]
    assert in_memory(pieces) == pieces
    with pytest.raises(BugError, match="payload that is not in memory"):
        in_memory([*pieces, Elsewhere(1)])


# -- sending ----------------------------------------------------------------------------------------------------------


def test_a_piece_elsewhere_is_handed_out_itself_between_its_neighbours() -> None:
    client, first, second = a_client(), Elsewhere(100), Elsewhere(200)
    write(client, 0, first, memoryview(b"hole"), second)
    client.flush(1)
    out = client.data_to_send()
    assert [len(piece) for piece in out] == [HEADER, 100, 4, 200, HEADER]
    assert out[1] is first
    assert out[3] is second
    assert client.data_to_send() == []


def test_what_was_queued_before_payload_leaves_before_it() -> None:
    client, piece = a_client(), Elsewhere(10)
    client.flush(0)
    write(client, 1, piece)
    client.flush(2)
    out = client.data_to_send()
    assert [len(each) for each in out] == [2 * HEADER, 10, HEADER]


def test_pieces_elsewhere_count_for_the_length_of_a_write() -> None:
    client = a_client()
    for length in (9, 11):
        with pytest.raises(BugError, match="payload"):
            client.write(0, Range.of(0, 10), [Elsewhere(length)])
    client.write(0, Range.of(0, 10), [Elsewhere(6), b"four"])


def test_a_request_is_sent_when_the_last_byte_of_its_payload_is() -> None:
    client = a_client()
    write(client, 0, Elsewhere(100))
    write(client, 1, Elsewhere(50))
    client.data_to_send()
    assert client.sent(HEADER) == []
    assert client.sent(99) == []
    assert client.sent(1) == [Sent(0)]
    assert client.sent(HEADER + 50) == [Sent(1)]


def test_a_reply_that_overtakes_the_payload_is_told_when_the_payload_has_left() -> None:
    client = a_client()
    write(client, 0, Elsewhere(100))
    client.data_to_send()
    client.sent(HEADER + 60)
    assert feed_client(client, pack_simple_reply(0)) == []
    assert client.sent(39) == []
    assert client.sent(1) == [Sent(0), Done(0)]


def test_an_error_that_overtakes_the_payload_is_told_when_the_payload_has_left() -> None:
    """The header promised it, so it has to follow."""
    client = a_client()
    write(client, 0, Elsewhere(100))
    client.data_to_send()
    client.sent(HEADER + 60)
    assert feed_client(client, chunk(1, 0x8001, 0, pack_error(28, b"disk full"))) == []
    sent, done = client.sent(40)
    assert sent == Sent(0)
    assert isinstance(done, Done)
    assert done.error is not None
    assert done.error.errno_name == "ENOSPC"


def test_more_than_was_handed_out_cannot_have_left() -> None:
    client = a_client()
    write(client, 0, Elsewhere(100))
    client.data_to_send()
    with pytest.raises(BugError, match="129 bytes sent of 128 handed out"):
        client.sent(HEADER + 101)


# -- receiving --------------------------------------------------------------------------------------------------------


class Moved:
    """A sink that names no memory."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, at: int, length: int) -> None:
        pass

    def target(self) -> memoryview:
        return memoryview(b"")

    def advance(self, count: int) -> None:
        self.count += count

    def take(self, data: memoryview) -> None:
        self.count += len(data)

    def zeroes(self, at: int, length: int) -> None:
        self.count += length


def begin(client: Client, stream: bytes) -> list[object]:
    """Feed headers only: what stands in `stream` must fit the target."""
    return list(client.received(scatter(client.receive_target(), memoryview(stream))))


def test_the_sink_of_the_payload_that_is_arriving_is_the_requests() -> None:
    client, sink = a_client(), Moved()
    client.read(0, Range.of(0, 100), sink)
    send_all(client)
    assert client.payload_sink is not sink
    assert begin(client, data_chunk(0, 0, bytes(60))[:HEADER]) == [Arriving(0)]
    assert client.payload_sink is sink
    assert (client.receive_target(), client.payload_left) == ([], 60)
    assert client.received(59) == []
    assert client.payload_sink is sink
    client.receive_target()
    assert client.received(1) == []
    assert client.payload_sink is not sink
    assert client.payload_left == 0
    assert begin(client, data_chunk(0, 60, bytes(40), done=True)[:HEADER]) == []
    assert client.payload_sink is sink
    client.receive_target()
    assert client.received(40) == [Done(0)]
    assert client.payload_sink is not sink
    assert sink.count == 100


def test_each_chunk_has_the_sink_of_its_own_request() -> None:
    client, sinks = a_client(), [Moved(), Moved()]
    buffer = bytearray(8)
    for handle, sink in enumerate(sinks):
        client.read(handle, Range.of(0, 16), sink)
    client.read(2, Range.of(0, 8), memoryview(buffer))
    send_all(client)
    for handle, offset in ((0, 0), (1, 8), (0, 8), (1, 0)):
        begin(client, data_chunk(handle, offset, bytes(8))[:HEADER])
        assert client.payload_sink is sinks[handle]
        client.receive_target()
        client.received(8)
    begin(client, data_chunk(2, 0, bytes(8))[:HEADER])
    assert isinstance(client.payload_sink, BufferSink)
    feed_client(client, b"in order")
    assert buffer == b"in order"


def test_what_the_machine_reads_itself_is_never_left_to_the_caller_to_move() -> None:
    """An error in the middle of a read that is spliced: its text has a place in memory."""
    client, sink = a_client(), Moved()
    client.read(0, Range.of(0, 100), sink)
    send_all(client)
    error = chunk(1, 0x8001, 0, pack_error(5, b"broken"))
    begin(client, error[:HEADER])
    assert client.payload_sink is not sink
    target = client.receive_target()
    assert sum(map(len, target)) >= len(error) - HEADER
    (done,) = client.received(scatter(target, memoryview(error)[HEADER:]))
    assert isinstance(done, Done)
    assert str(done.error) == "EIO (broken)"
