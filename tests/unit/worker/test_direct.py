"""worker/direct.py with a real client, ring and pipes: sending piece by piece, receiving in turns, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common.errors import BugError
from nbdshard.common.limits import BUFFERS_PER_SEND_MAX, RECEIVES_PER_TURN_MAX
from nbdshard.common.nbd.client import Arriving, Client, Done, Event, Sent
from nbdshard.common.nbd.payload import Elsewhere, Piece
from nbdshard.common.nbd.wire import pack_hole, pack_simple_reply
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Ring, open_ring
from nbdshard.worker.direct import DirectStream
from nbdshard.worker.piped import PipedPayload, PipePool
from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support.arrival import Arrival, arrival
from support.images import KIB, MIB, random_bytes
from support.local_driver import RINGS
from support.nbd_feeding import an_export, chunk, data_chunk
from support.pipes import received
from support.waiting import WAIT_SECONDS

HEADER = 28
CONTENT = random_bytes(256 * KIB)
IN, OUT = select.EPOLLIN, select.EPOLLOUT
ENOUGH = 1 << 30
PORTIONS = st.integers(1, 3000) | st.sampled_from([ENOUGH, -errno.EAGAIN, 0])


class Grudging(SystemPlumbing):
    """Sends no more than the next of `portions` says at a time: bytes, or -errno. Keeps what was asked of it."""

    def __init__(self, portions: Sequence[int] = (ENOUGH,)) -> None:
        super().__init__()
        self.portions = cycle(portions)
        self.asked: list[tuple[str, int, bool]] = []

    def drain(self, pipe: Pipe, number: int, count: int, *, more: bool) -> int:
        self.asked.append(("drain", count, more))
        portion = next(self.portions)
        return portion if portion <= 0 else super().drain(pipe, number, min(count, portion), more=more)

    def send(self, number: int, pieces: Sequence[bytes | memoryview], *, more: bool) -> int:
        assert all(map(len, pieces))
        self.asked.append(("send", sum(map(len, pieces)), more))
        portion = next(self.portions)
        if portion <= 0:
            return portion
        return super().send(number, [memoryview(b"".join(pieces))[:portion]], more=more)


class Scene:
    """A stream to a peer that is a plain socket. Nothing turns the ring: the test says what it told."""

    def __init__(self, ring: Ring, plumbing: SystemPlumbing, source: Arrival) -> None:
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.settimeout(WAIT_SECONDS)
        self.ring = ring
        self.plumbing = plumbing
        self.pool = PipePool(plumbing, MIB)
        self.pool.grow(8)
        self.client = Client(an_export(), "srv", 64)
        self.events: list[Event] = []
        self.got = b""
        self.descriptor = ring.attach(ours.detach(), is_socket=True)
        self.stream = DirectStream(ring, self.descriptor, plumbing, self.client, "srv", lambda _: True)
        self._source = source

    def payload(self, *pieces: int | bytes) -> PipedPayload:
        """A whole payload: numbers are bytes of CONTENT in the pipe, zero bytes are holes."""
        length = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
        payload = self.pool.take(length)
        assert payload is not None
        reader = Client(an_export(), "source", 1)
        reader.read(0, Range.of(0, length), payload)
        reader.sent(sum(map(len, reader.data_to_send())))
        at = 0
        for piece in pieces:
            if isinstance(piece, int):
                stream, size = data_chunk(0, at, CONTENT[at : at + piece]), piece
            else:
                stream, size = chunk(0, 2, 0, pack_hole(at, len(piece))), len(piece)
            self._source.come(reader, *(stream[each : each + 64 * KIB] for each in range(0, len(stream), 64 * KIB)))
            at += size
        assert self._source.come(reader, chunk(1, 0, 0)) == [Done(0)]
        return payload

    def write(self, handle: int, payload: PipedPayload | bytes) -> None:
        pieces: list[Piece] = [payload] if isinstance(payload, bytes) else list[Piece](payload.pieces)
        self.client.write(handle, Range.of(0, len(payload)), pieces)

    def send(self) -> bool:
        """Whether anything was told of."""
        return self._tells(self.stream.send)

    def receive(self) -> bool:
        return self._tells(self.stream.receive)

    def _tells(self, move: Callable[[Callable[[list[Event]], None]], object]) -> bool:
        told: list[list[Event]] = []
        move(told.append)
        for events in told:
            self.events += events
        return bool(told)

    def send_all(self) -> None:
        """Until nothing is left; the peer takes it, and the ring tells of room that there is at once."""
        self.send()
        while not self.stream.idle:
            if select.select([self.peer], [], [], 0)[0]:
                self.got += self.peer.recv(MIB)
            self.stream.take_note(OUT)
            self.send()

    def at_the_peer(self) -> bytes:
        """All that was sent, and no more comes."""
        self.ring.close()
        return self.got + received(self.peer)


@contextlib.contextmanager
def scene_on(name: str, plumbing: SystemPlumbing) -> Iterator[Scene]:
    ring, _ = open_ring(name)
    with arrival(plumbing) as source:
        one = Scene(ring, plumbing, source)
        try:
            yield one
        finally:
            ring.close()
            one.peer.close()
            one.pool.close()


@pytest.fixture
def plumbing() -> Grudging:
    return Grudging()


@pytest.fixture(params=RINGS)
def scene(request: pytest.FixtureRequest, plumbing: Grudging) -> Iterator[Scene]:
    with scene_on(request.param, plumbing) as one:
        yield one


def write_header(handle: int, length: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, 1, handle, 0, length)


def flush_header(handle: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, 3, handle, 0, 0)


# -- sending ----------------------------------------------------------------------------------------------------------


def test_pieces_leave_in_order_and_each_says_whether_more_follows(scene: Scene, plumbing: Grudging) -> None:
    payload = scene.payload(1000, bytes(50), 2000)
    scene.client.flush(1)
    scene.write(0, payload)
    scene.client.flush(2)
    assert scene.send()
    assert plumbing.asked == [
        ("send", 2 * HEADER, True),
        ("drain", 1000, True),
        ("send", 50, True),
        ("drain", 2000, True),
        ("send", HEADER, False),
    ]
    assert scene.events == [Sent(1), Sent(0), Sent(2)]
    expected = flush_header(1) + write_header(0, 3050) + CONTENT[:1000] + bytes(50) + CONTENT[1050:3050]
    assert scene.at_the_peer() == expected + flush_header(2)


def test_the_last_byte_of_a_payload_says_that_nothing_follows(scene: Scene, plumbing: Grudging) -> None:
    scene.write(0, scene.payload(1000))
    scene.send()
    assert plumbing.asked == [("send", HEADER, True), ("drain", 1000, False)]


def test_payload_in_memory_leaves_together_with_its_header(scene: Scene, plumbing: Grudging) -> None:
    for handle in range(3):
        scene.write(handle, CONTENT[:100])
    scene.send()
    assert plumbing.asked == [("send", 3 * (HEADER + 100), False)]
    assert scene.at_the_peer() == b"".join(write_header(handle, 100) + CONTENT[:100] for handle in range(3))


def test_so_many_pieces_leave_together_and_no_more(scene: Scene, plumbing: Grudging) -> None:
    for handle in range(40):
        scene.write(handle, b"x")
    scene.send()
    one = HEADER + 1
    first = BUFFERS_PER_SEND_MAX // 2
    assert plumbing.asked == [("send", first * one, True), ("send", (40 - first) * one, False)]
    assert scene.events == [Sent(handle) for handle in range(40)]


@settings(max_examples=60, deadline=None)
@given(st.lists(PORTIONS, min_size=1).filter(lambda portions: max(portions) > 0))
def test_however_little_the_socket_takes_at_a_time_the_bytes_are_the_same(portions: list[int]) -> None:
    with scene_on("epoll", Grudging(portions)) as scene:
        scene.write(0, scene.payload(5000, bytes(700), 300))
        scene.write(1, CONTENT[:1000])
        scene.client.flush(2)
        scene.write(3, scene.payload(bytes(10), 4000))
        scene.send_all()
        assert scene.events == [Sent(handle) for handle in range(4)]
        first = write_header(0, 6000) + CONTENT[:5000] + bytes(700) + CONTENT[5700:6000]
        second = write_header(1, 1000) + CONTENT[:1000] + flush_header(2)
        assert scene.at_the_peer() == first + second + write_header(3, 4010) + bytes(10) + CONTENT[10:4010]


@pytest.mark.parametrize("nothing", [-errno.EAGAIN, 0])
@pytest.mark.parametrize("before", [[], [10], [ENOUGH], [ENOUGH, 500]])
def test_a_full_socket_is_left_alone_until_it_takes_more(
    scene: Scene, plumbing: Grudging, before: list[int], nothing: int
) -> None:
    plumbing.portions = cycle([*before, nothing])
    scene.write(0, scene.payload(1000))
    scene.send()
    asked = len(plumbing.asked)
    for _ in range(3):
        assert not scene.send()
    scene.write(1, CONTENT[:10])
    scene.send()
    assert not scene.stream.take_note(IN)
    scene.send()
    assert len(plumbing.asked) == asked == len(before) + 1
    assert not scene.stream.idle
    plumbing.portions = cycle([ENOUGH])
    assert scene.stream.take_note(OUT)
    assert scene.send()
    assert scene.stream.idle
    assert scene.events == [Sent(0), Sent(1)]
    expected = write_header(0, 1000) + CONTENT[:1000] + write_header(1, 10) + CONTENT[:10]
    assert scene.at_the_peer() == expected


def test_the_ring_is_asked_for_room_only_while_there_is_none(scene: Scene, plumbing: Grudging) -> None:
    """The socket is writable all the time: whoever asked for that would be told, and so would spin."""
    assert scene.ring.wait(0.01) == []
    plumbing.portions = cycle([-errno.EAGAIN])
    scene.write(0, scene.payload(1000))
    scene.send()
    (watch,) = scene.ring.wait(WAIT_SECONDS)
    assert watch.result & OUT
    plumbing.portions = cycle([ENOUGH])
    scene.stream.take_note(watch.result)
    scene.send()
    assert scene.ring.wait(0.01) == []


def test_a_push_says_nothing_to_the_client_until_the_next_send(scene: Scene) -> None:
    scene.write(0, scene.payload(1000))
    scene.stream.push()
    assert scene.stream.idle
    assert scene.events == []
    assert scene.send()
    assert scene.events == [Sent(0)]
    assert not scene.send()


@pytest.mark.parametrize("before", [[], [10], [ENOUGH], [ENOUGH, 500]])
def test_a_connection_that_fails_is_left_alone_from_then_on(
    scene: Scene, plumbing: Grudging, before: list[int]
) -> None:
    plumbing.portions = cycle([*before, -errno.EPIPE])
    payload = scene.payload(1000)
    scene.write(0, payload)
    scene.send()
    assert scene.stream.error == -errno.EPIPE
    held = payload.pipe.held
    for _ in range(3):
        scene.stream.take_note(OUT)
        scene.send()
    assert len(plumbing.asked) == len(before) + 1
    assert (scene.events, payload.pipe.held) == ([], held)


def test_a_piece_that_is_in_no_pipe_is_a_bug(scene: Scene) -> None:
    scene.client.write(0, Range.of(0, 10), [Elsewhere(10)])
    with pytest.raises(BugError, match="a piece that is in no pipe"):
        scene.send()


# -- receiving --------------------------------------------------------------------------------------------------------


def test_what_has_arrived_is_taken_and_then_nothing_is_left_to_do(scene: Scene) -> None:
    payload = scene.pool.take(1000)
    assert payload is not None
    scene.client.read(0, Range.of(0, 1000), payload)
    scene.client.flush(1)
    scene.send()
    scene.events.clear()
    scene.peer.sendall(data_chunk(0, 0, CONTENT[:1000], done=True) + pack_simple_reply(1))
    assert scene.receive()
    assert scene.events == [Arriving(0), Done(0), Done(1)]
    assert not scene.stream.has_more
    assert not scene.receive()
    assert payload.pipe.held == 1000


def test_a_payload_is_told_of_when_it_is_whole_however_many_pieces_it_comes_in(scene: Scene) -> None:
    payload = scene.pool.take(1000)
    assert payload is not None
    scene.client.read(0, Range.of(0, 1000), payload)
    scene.send()
    scene.events.clear()
    stream = data_chunk(0, 0, CONTENT[:1000], done=True)
    for at in range(0, len(stream), 100):
        assert Done(0) not in scene.events
        scene.peer.sendall(stream[at : at + 100])
        scene.stream.take_note(IN)
        scene.receive()
        assert not scene.stream.has_more
    assert scene.events == [Arriving(0), Done(0)]
    assert (payload.filled, payload.pipe.held) == (1000, 1000)


def test_one_connection_does_not_keep_the_others_from_their_turn(scene: Scene) -> None:
    count = 8 * RECEIVES_PER_TURN_MAX
    payloads = [scene.pool.take(8) for _ in range(8)]
    for handle, payload in enumerate(payloads):
        assert payload is not None
        scene.client.read(handle, Range.of(0, count), PipedPayload(count, payload.pipe, scene.plumbing))
    scene.send()
    scene.events.clear()
    replies = b"".join(
        data_chunk(handle, at, CONTENT[at : at + 1]) for at in range(RECEIVES_PER_TURN_MAX // 8) for handle in range(8)
    )
    scene.peer.sendall(replies)  # each chunk takes two calls: its header, and its one byte
    scene.receive()
    held = sum(payload.pipe.held for payload in payloads if payload is not None)
    assert 0 < held < RECEIVES_PER_TURN_MAX
    assert scene.stream.has_more
    while scene.stream.has_more:
        scene.receive()
    assert sum(payload.pipe.held for payload in payloads if payload is not None) == RECEIVES_PER_TURN_MAX


def test_an_event_that_comes_to_nothing_is_harmless(scene: Scene) -> None:
    scene.client.flush(0)
    scene.send()
    for _ in range(3):
        scene.stream.take_note(IN | OUT)
        assert scene.stream.has_more
        assert not scene.receive()
        assert (scene.stream.has_more, scene.stream.ended, scene.stream.error) == (False, False, 0)


def test_the_end_of_the_stream_is_met_behind_its_last_bytes(scene: Scene) -> None:
    scene.client.flush(0)
    scene.send()
    scene.events.clear()
    scene.peer.sendall(pack_simple_reply(0))
    scene.peer.shutdown(socket.SHUT_WR)
    scene.stream.take_note(IN | select.EPOLLRDHUP)
    assert scene.receive()
    assert scene.events == [Done(0)]
    assert (scene.stream.ended, scene.stream.has_more, scene.stream.error) == (True, False, 0)


@pytest.mark.parametrize("length", [0, 1, 500])
def test_the_end_of_the_stream_within_a_payload_is_met(scene: Scene, length: int) -> None:
    payload = scene.pool.take(1000)
    assert payload is not None
    scene.client.read(0, Range.of(0, 1000), payload)
    scene.send()
    scene.peer.sendall(data_chunk(0, 0, CONTENT[:1000], done=True)[: HEADER + length])
    scene.peer.shutdown(socket.SHUT_WR)
    scene.stream.take_note(IN | select.EPOLLRDHUP)
    scene.receive()
    assert (scene.stream.ended, scene.stream.has_more) == (True, False)
    assert Done(0) not in scene.events


def test_a_reset_is_an_error_of_the_stream(scene: Scene) -> None:
    """On a unix socket: the peer closes with something of ours unread."""
    scene.client.flush(0)
    scene.send()
    scene.peer.close()
    scene.stream.take_note(IN | select.EPOLLRDHUP | select.EPOLLERR)
    scene.receive()
    assert (scene.stream.error, scene.stream.has_more) == (-errno.ECONNRESET, False)
