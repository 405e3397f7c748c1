"""worker/piped.py over real pipes: payload of replies of every shape, looked at, drained, and the pipes used again."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common.errors import BugError
from nbdshard.common.limits import ZERO_FILL_BYTES
from nbdshard.common.nbd.client import Client, Done
from nbdshard.common.nbd.wire import pack_error, pack_simple_reply
from nbdshard.worker.pipes import Pipe
from support.images import KIB, MIB, random_bytes
from support.nbd_feeding import an_export, chunk, scatter
from support.piped import Shallow, data, done, hole, shape_of, world

HEADER = 28  # bytes of a chunk before its data
ERROR = 0x8001  # NBD_REPLY_TYPE_ERROR
CONTENT = random_bytes(60_000)

# -- what a reply makes of it -----------------------------------------------------------------------------------------

# The chunks of a reply to a read of 60000 bytes, and the pieces they become.
REPLIES: dict[str, tuple[Sequence[tuple[int, int, bool]], list[tuple[str, int]]]] = {
    "one chunk": ([(0, 60_000, True)], [("pipe", 60_000)]),
    "chunks in order": ([(0, 10_000, True), (10_000, 40_000, True), (40_000, 60_000, True)], [("pipe", 60_000)]),
    "a hole in front": ([(0, 100, False), (100, 60_000, True)], [("memory", 100), ("pipe", 59_900)]),
    "a hole at the end": ([(0, 59_999, True), (59_999, 60_000, False)], [("pipe", 59_999), ("memory", 1)]),
    "a hole in the middle": (
        [(0, 20_000, True), (20_000, 30_000, False), (30_000, 60_000, True)],
        [("pipe", 20_000), ("memory", 10_000), ("pipe", 30_000)],
    ),
    "nothing but a hole": ([(0, 60_000, False)], [("memory", 60_000)]),
    "holes in turn": (
        [(0, 1, True), (1, 2, False), (2, 3, True), (3, 4, False), (4, 60_000, True)],
        [("pipe", 1), ("memory", 1), ("pipe", 1), ("memory", 1), ("pipe", 59_996)],
    ),
    "the second half first": ([(30_000, 60_000, True), (0, 30_000, True)], [("memory", 60_000)]),
    "the last third before the second": (
        [(0, 20_000, True), (40_000, 60_000, True), (20_000, 40_000, True)],
        [("pipe", 20_000), ("memory", 40_000)],
    ),
    "a hole too early": (
        [(0, 20_000, True), (50_000, 60_000, False), (20_000, 50_000, True)],
        [("pipe", 20_000), ("memory", 40_000)],
    ),
    "a hole too late": (
        [(0, 20_000, True), (30_000, 60_000, True), (20_000, 30_000, False)],
        [("pipe", 20_000), ("memory", 40_000)],
    ),
    "a hole in front, told last": ([(1, 60_000, True), (0, 1, False)], [("memory", 60_000)]),
}


def reply_of(chunks: Sequence[tuple[int, int, bool]], content: bytes) -> list[bytes]:
    """The chunks, (start, end, is data), and the end of the reply."""
    pieces = [
        data(start, content[start:end]) if is_data else hole(start, end - start) for start, end, is_data in chunks
    ]
    return [*pieces, done()]


def content_of(chunks: Sequence[tuple[int, int, bool]], content: bytes) -> bytes:
    """`content` with zeroes where there are holes."""
    expected = bytearray(content)
    for start, end, is_data in chunks:
        if not is_data:
            expected[start:end] = bytes(end - start)
    return bytes(expected)


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_becomes_pieces_that_leave_in_order(name: str) -> None:
    chunks, shape = REPLIES[name]
    with world() as one:
        payload = one.filled(60_000, *reply_of(chunks, CONTENT))
        assert len(payload) == 60_000
        assert shape_of(payload) == shape
        assert payload.in_memory == sum(length for where, length in shape if where == "memory")
        assert one.left(payload) == content_of(chunks, CONTENT)
        one.give_back(payload)


@pytest.mark.parametrize("name", REPLIES)
def test_a_look_shows_the_bytes_and_changes_nothing(name: str) -> None:
    chunks, shape = REPLIES[name]
    expected = content_of(chunks, CONTENT)
    with world() as one:
        payload = one.filled(60_000, *reply_of(chunks, CONTENT))
        for _ in range(2):
            buffer = bytearray(60_000)
            assert payload.look(memoryview(buffer))
            assert buffer == expected
        assert shape_of(payload) == shape
        assert one.left(payload) == expected
        one.give_back(payload)


@pytest.mark.parametrize("depth", [0, 1, 5000, -errno.EMFILE])
@pytest.mark.parametrize("name", REPLIES)
def test_a_look_that_sees_only_a_part_takes_all_of_it_out(name: str, depth: int) -> None:
    chunks, shape = REPLIES[name]
    in_pipe = sum(length for where, length in shape if where == "pipe")
    with world(plumbing=Shallow(depth)) as one:
        payload = one.filled(60_000, *reply_of(chunks, CONTENT))
        buffer = bytearray(60_000)
        assert payload.look(memoryview(buffer)) is (in_pipe <= max(depth, 0))
        assert buffer == content_of(chunks, CONTENT)
        if in_pipe > max(depth, 0):
            assert payload.pipe.held == 0
        one.give_back(payload)


def test_a_simple_reply_fills_the_pipe() -> None:
    with world() as one:
        client = Client(an_export(mode="simple"), "srv", 4)
        payload = one.begin(60_000, client)
        assert one.source.come(client, pack_simple_reply(0) + CONTENT)[-1] == Done(0)
        assert shape_of(payload) == [("pipe", 60_000)]
        assert one.left(payload) == CONTENT


def test_a_long_hole_is_made_of_the_same_zeroes_again_and_again() -> None:
    length = 3 * ZERO_FILL_BYTES + 1
    with world() as one:
        payload = one.filled(length, hole(0, length, done=True))
        assert shape_of(payload) == [("memory", ZERO_FILL_BYTES)] * 3 + [("memory", 1)]
        assert one.left(payload) == bytes(length)


def test_a_long_hole_in_what_has_spilled_is_zeroes_there() -> None:
    length = 3 * ZERO_FILL_BYTES
    with world() as one:
        payload = one.filled(length, data(length - 1, b"x"), hole(0, length - 1, done=True))
        assert shape_of(payload) == [("memory", length)]
        assert one.left(payload) == bytes(length - 1) + b"x"


def test_payload_that_came_with_a_header_stays_in_memory_in_front_of_the_rest() -> None:
    """As a receive for headers may bring it, if the READ was queued after that receive had begun."""
    with world() as one:
        target = one.client.receive_target()
        payload = one.begin(10_000)
        stream = data(0, CONTENT[:10_000], done=True)
        taken = scatter(target, memoryview(stream))
        assert HEADER < taken < len(stream)
        events = one.client.received(taken)
        events += one.source.come(one.client, stream[taken:])
        assert events[-1] == Done(0)
        assert shape_of(payload) == [("memory", taken - HEADER), ("pipe", len(stream) - taken)]
        buffer = bytearray(10_000)
        assert payload.look(memoryview(buffer))
        assert buffer == CONTENT[:10_000]
        assert one.left(payload) == CONTENT[:10_000]


def test_payload_that_came_with_a_header_goes_where_it_belongs_once_it_has_spilled() -> None:
    with world() as one:
        payload = one.pool.take(30)
        assert payload is not None
        payload.begin(10, 20)  # the beginning of it has not come
        payload.take(memoryview(b"0123456789"))
        payload.take(memoryview(b"abc"))
        payload.target()[:] = b"defghij"
        payload.advance(7)
        payload.zeroes(0, 10)
        assert one.left(payload) == bytes(10) + b"0123456789abcdefghij"


def test_what_the_header_brought_is_not_changed_by_what_the_next_one_brings() -> None:
    with world() as one:
        payload = one.pool.take(4)
        assert payload is not None
        head = bytearray(b"abcd")
        payload.begin(0, 4)
        payload.take(memoryview(head))
        head[:] = b"next"
        assert one.left(payload) == b"abcd"


def test_what_comes_next_is_the_rest_of_one_piece() -> None:
    """For a destination that takes its payload piece by piece, and counts the bytes it took."""
    with world() as one:
        payload = one.filled(100, data(0, CONTENT[:40]), hole(40, 20), data(60, CONTENT[60:100], done=True))
        first, _, last = payload.pieces
        assert payload.rest(0) is payload.rest(39) is first
        for at in (40, 59):
            zeroes = payload.rest(at)
            assert isinstance(zeroes, memoryview)
            assert bytes(zeroes) == bytes(60 - at)
        assert payload.rest(60) is payload.rest(99) is last
        with pytest.raises(BugError, match="a payload of 100 bytes has none at its end"):
            payload.rest(100)


# -- pipes that are full early ----------------------------------------------------------------------------------------


def in_small_pieces(stream: bytes, size: int) -> list[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


@pytest.mark.parametrize("size", [1, 512, 1448])
def test_a_pipe_full_in_the_middle_of_a_chunk_leaves_the_rest_to_memory(size: int) -> None:
    with world(16 * KIB) as one:
        content = CONTENT[: 4 * size + 3000]
        payload = one.filled(len(content), *in_small_pieces(data(0, content, done=True), size))
        (first, in_pipe), (second, in_memory) = shape_of(payload)
        assert (first, second) == ("pipe", "memory")
        assert 0 < in_pipe <= 5 * size  # four slots; one may hold what the piece with the header left over
        assert payload.in_memory == in_memory == len(content) - in_pipe
        buffer = bytearray(len(content))
        assert payload.look(memoryview(buffer))
        assert buffer == content
        assert one.left(payload) == content
        one.give_back(payload)


@pytest.mark.parametrize(
    "rest",
    [
        [(40_000, 60_000, True)],
        [(50_000, 60_000, True), (40_000, 50_000, True)],
        [(40_000, 60_000, False)],
        [(50_000, 60_000, False), (40_000, 50_000, True)],
    ],
    ids=["data", "data out of order", "a hole", "a hole too early"],
)
def test_after_a_spill_in_the_middle_of_a_chunk_further_chunks_find_their_places(
    rest: list[tuple[int, int, bool]],
) -> None:
    with world(16 * KIB) as one:
        small = in_small_pieces(data(0, CONTENT[:40_000]), 512)
        payload = one.filled(60_000, *small, *reply_of(rest, CONTENT))
        assert [where for where, _ in shape_of(payload)] == ["pipe", "memory"]
        assert payload.spilled_at < 40_000
        assert one.left(payload) == content_of(rest, CONTENT)
        one.give_back(payload)


def test_a_hole_between_what_is_in_the_pipe_and_what_no_longer_fits_stays_between_them() -> None:
    chunks = [(0, 512, True), (512, 1024, False), (1024, 60_000, True)]
    with world(16 * KIB) as one:
        stream = b"".join(reply_of(chunks, CONTENT))
        payload = one.filled(60_000, *in_small_pieces(stream, 700))
        assert [where for where, _ in shape_of(payload)] == ["pipe", "memory", "pipe", "memory"]
        assert one.left(payload) == content_of(chunks, CONTENT)


def test_a_read_that_fails_half_way_leaves_a_pipe_that_can_be_used_again() -> None:
    with world() as one:
        payload = one.begin(60_000)
        error = chunk(1, ERROR, 0, pack_error(5, b"broken disk"))
        events = one.source.come(one.client, data(0, CONTENT[:30_000]), error)
        (end,) = [event for event in events if isinstance(event, Done)]
        assert end.error is not None
        assert payload.pipe.held == 30_000
        one.give_back(payload)
        again = one.filled(60_000, *reply_of([(0, 60_000, True)], CONTENT[::-1]))
        assert again.pipe is payload.pipe
        assert one.left(again) == CONTENT[::-1]


# -- whatever comes ---------------------------------------------------------------------------------------------------

LENGTH = 20_000


@st.composite
def replies(draw: st.DrawFn) -> list[tuple[int, int, bool]]:
    """Chunks that cover LENGTH bytes, each data or a hole, mostly in order."""
    borders = sorted({0, LENGTH, *draw(st.lists(st.integers(1, LENGTH - 1), max_size=8))})
    chunks = [(start, end, draw(st.booleans())) for start, end in pairwise(borders)]
    return draw(st.just(chunks) | st.permutations(chunks))


@settings(max_examples=80, deadline=None)
@given(
    chunks=replies(),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=30),
    depth=st.sampled_from([MIB, MIB, 0, 1, 4096, -errno.EMFILE]),
    is_looked_at=st.booleans(),
)
def test_whatever_the_reply_and_however_it_is_cut_the_bytes_are_the_same_and_the_pipe_is_left_empty(
    chunks: list[tuple[int, int, bool]], sizes: list[int], depth: int, is_looked_at: bool
) -> None:
    stream = b"".join(reply_of(chunks, CONTENT[:LENGTH]))
    expected = content_of(chunks, CONTENT[:LENGTH])
    with world(16 * KIB, Shallow(depth)) as one:
        for _ in range(2):  # the second time through a pipe that was used
            pieces, rest, number = [], stream, 0
            while rest:
                size = sizes[number % len(sizes)]
                pieces.append(rest[:size])
                rest, number = rest[size:], number + 1
            payload = one.filled(LENGTH, *pieces)
            assert sum(map(len, payload.pieces)) == LENGTH
            is_whole = True
            if is_looked_at:
                buffer = bytearray(LENGTH)
                is_whole = payload.look(memoryview(buffer))
                assert buffer == expected
            if is_whole:
                assert one.left(payload) == expected
            assert payload.pipe.held == 0
            one.give_back(payload)


# -- a pipe that breaks its word --------------------------------------------------------------------------------------


class Broken(Shallow):
    """Gives nothing of what is in a pipe."""

    def read(self, pipe: Pipe, buffer: memoryview) -> int:
        return -errno.EIO


def test_a_pipe_that_gives_nothing_of_what_it_holds_is_a_bug() -> None:
    with world(plumbing=Broken(0)) as one:
        payload = one.filled(100, data(0, CONTENT[:100], done=True))
        with pytest.raises(BugError, match=r"a pipe that holds 100 bytes gave none of them \(-5\)"):
            payload.look(memoryview(bytearray(100)))
