"""Where payload goes, and that the client does not care which kind of place it is."""

from __future__ import annotations

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.nbd.client import Arriving, Client, Done
from nbdshard.common.nbd.constants import Command
from nbdshard.common.nbd.sinks import BufferSink, DrainSink
from nbdshard.common.nbd.wire import pack_hole
from nbdshard.common.ranges import Range
from support.nbd_feeding import an_export, chunk, data_chunk, scatter, send_all


class PipeSink:
    """As a splice to a pipe would be: it names no memory, and learns how much was moved."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def begin(self, at: int, length: int) -> None:
        self.log.append(("begin", at, length))

    def target(self) -> memoryview:
        return memoryview(b"")

    def advance(self, count: int) -> None:
        self.log.append(("spliced", count))

    def take(self, data: memoryview) -> None:
        self.log.append(("written", bytes(data)))

    def zeroes(self, at: int, length: int) -> None:
        self.log.append(("zeroes", at, length))


def test_payload_can_be_spliced_past_the_machine() -> None:
    client = Client(an_export(), "srv", 2)
    sink = PipeSink()
    client.submit(0, Command.READ, Range.of(512, 1024), sink=sink)
    send_all(client)
    header = memoryview(data_chunk(0, 512, bytes(1000))[:28])
    assert client.received(scatter(client.receive_target(), header)) == [Arriving(0)]
    assert client.receive_target() == []
    assert client.payload_left == 1000
    assert client.received(600) == []
    assert (client.receive_target(), client.payload_left) == ([], 400)
    assert client.received(400) == []
    last = memoryview(chunk(1, 2, 0, pack_hole(1512, 24)))
    assert client.received(scatter(client.receive_target(), last)) == []
    assert client.received(scatter(client.receive_target(), last[28:])) == [Done(0)]
    assert sink.log == [("begin", 0, 1000), ("spliced", 600), ("spliced", 400), ("zeroes", 1000, 24)]


def test_a_spliced_payload_is_not_overdrawn() -> None:
    client = Client(an_export(), "srv", 2)
    client.submit(0, Command.READ, Range.of(0, 100), sink=PipeSink())
    send_all(client)
    client.received(scatter(client.receive_target(), memoryview(data_chunk(0, 0, bytes(100))[:28])))
    client.receive_target()
    with pytest.raises(BugError, match="101 bytes received of 100 offered"):
        client.received(101)


def test_payload_that_came_with_a_header_is_written_instead_of_spliced() -> None:
    client = Client(an_export(), "srv", 2)
    target = client.receive_target()
    sink = PipeSink()
    client.submit(0, Command.READ, Range.of(0, 8), sink=sink)
    send_all(client)
    client.received(scatter(target, memoryview(data_chunk(0, 0, b"abcd"))))
    assert sink.log == [("begin", 0, 4), ("written", b"abcd")]


def test_a_hole_changes_its_own_bytes_only() -> None:
    memory = bytearray(b"x" * 200_000)
    BufferSink(memoryview(memory)).zeroes(3, 150_000)
    assert memory == b"xxx" + bytes(150_000) + b"x" * 49_997


def test_a_buffer_of_wider_items_is_filled_in_bytes() -> None:
    memory = bytearray(16)
    sink = BufferSink(memoryview(memory).cast("Q"))
    sink.begin(4, 8)
    sink.target()[:3] = b"abc"
    sink.advance(3)
    sink.take(memoryview(b"defgh"))
    assert (len(sink), memory) == (16, b"\0\0\0\0abcdefgh\0\0\0\0")


@pytest.mark.parametrize("buffer", [memoryview(b"read only"), memoryview(bytearray(8))[::2]])
def test_a_buffer_must_be_writable_and_in_one_piece(buffer: memoryview) -> None:
    with pytest.raises(BugError, match="a read needs a buffer that is writable and contiguous"):
        BufferSink(buffer)


def test_what_nobody_wants_needs_one_small_buffer() -> None:
    sink = DrainSink()
    sink.begin(0, 100_000)
    assert len(sink.target()) == 65536
    sink.advance(65536)
    sink.take(memoryview(bytes(4464)))
    assert len(sink.target()) == 30_000
