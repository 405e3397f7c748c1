"""Each way that payload can go, on each ring, and each fault of either server: the copy is whole, or says what is not.

The ways: through buffers, by operations of the ring or by direct calls; through pipes, by direct calls; through a lane,
by its thread.
"""

from __future__ import annotations

import time

import msgspec
import pytest

from nbdshard.common.errors import ConnectionLost
from nbdshard.common.messages import ErrorReport
from support.copy_bench import BY_CALLS, OPTIONS, REQUEST, SIZE, WAYS, CopyBench, copy_bench
from support.doubles import CMD_DISC, CMD_READ, CMD_WRITE, EINVAL, EIO, Double, double
from support.failing import (
    AT_ONCE,
    FAILURES,
    GOINGS,
    REFUSALS,
    AcknowledgesAhead,
    Crumbling,
    FailsFirst,
    GoesInAReply,
    GoesInAWrite,
    PausesInAReply,
    RefusesFirst,
    RefusesZeroes,
)
from support.hesitant import Hesitates
from support.images import KIB, random_bytes
from support.local_driver import RINGS
from support.waiting import wait_for

OLD = 0xEE  # what the destination held before
FAULT_AT = 2 * REQUEST  # early: a lane is lent again after it
DENSE = random_bytes(SIZE)
EACH_WAY = pytest.mark.parametrize("way", WAYS)
EACH_WAY_AND_BUFFERS_BY_CALLS = pytest.mark.parametrize("way", [*WAYS, BY_CALLS])
EACH_KIND = pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
# No search for zeroes: payload that goes through pipes stays there.
PLAIN = msgspec.structs.replace(OPTIONS, sparse_unit=0)


def in_turn(size: int) -> bytes:
    """Data and zeroes in turn, 32 KiB of each: a lane sends WRITE and WRITE_ZEROES of a payload together."""
    content = bytearray(DENSE[:size])
    for start in range(32 * KIB, size, 64 * KIB):
        content[start : start + 32 * KIB] = bytes(min(32 * KIB, size - start))
    return bytes(content)


CONTENTS = {"dense": DENSE, "data and zeroes in turn": in_turn(SIZE)}
EACH_CONTENT = pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def old() -> bytearray:
    return bytearray([OLD]) * SIZE


def speak(kind: str, *servers: Double) -> None:
    for server in servers:
        server.structured, server.extended = kind != "simple", kind == "extended"


def spliced(way: str) -> int:
    """What counts as spliced of a dense copy where nothing had to be tried again."""
    return SIZE if way in ("pipes", "lanes") else 0


# -- all goes well ----------------------------------------------------------------------------------------------------


@EACH_KIND
@EACH_CONTENT
@EACH_WAY
def test_a_copy_is_identical_and_tells_which_way_it_went(ring: str, way: str, content: bytes, kind: str) -> None:
    source, target = Double(bytearray(content)), Double(old())
    speak(kind, source, target)
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        done = bench.copy()
    assert target.content == content
    assert done.copied + done.zeroed == SIZE
    if content is DENSE:
        assert done.spliced == spliced(way)


# -- errors -----------------------------------------------------------------------------------------------------------

READ_ERRORS = [("simple", AT_ONCE), *(("structured", name) for name in FAILURES), ("extended", "in the middle")]


@pytest.mark.parametrize(("kind", "name"), READ_ERRORS)
@EACH_WAY_AND_BUFFERS_BY_CALLS
def test_a_read_that_fails_wherever_the_error_stands_is_asked_again(ring: str, way: str, kind: str, name: str) -> None:
    source, target = FailsFirst(bytearray(DENSE)), Double(old())
    source.reply, source.fails_at, source.times = FAILURES[name], FAULT_AT, 1
    speak(kind, source)
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        done = bench.copy()
        if way == "lanes":
            assert bench.lanes[0].odd
    assert source.times == 0
    assert target.content == DENSE
    assert [(request.offset, request.length) for request in target.requests if request.command == CMD_WRITE].count(
        (FAULT_AT, REQUEST)
    ) == 1
    assert done.copied == SIZE
    assert done.spliced == max(0, spliced(way) - REQUEST)  # what had to be tried again went through a buffer


WRITE_ERRORS = [
    ("simple", "before the payload"),
    *(("structured", name) for name in REFUSALS),
    ("extended", "within the payload"),
]


@pytest.mark.parametrize(("kind", "name"), WRITE_ERRORS)
@EACH_WAY_AND_BUFFERS_BY_CALLS
def test_a_write_that_is_refused_wherever_the_answer_comes_is_made_good(
    ring: str, way: str, kind: str, name: str
) -> None:
    source, target = Double(bytearray(DENSE)), RefusesFirst(old())
    target.taken, target.fails_at, target.times = REFUSALS[name], FAULT_AT, 1
    speak(kind, target)
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        done = bench.copy()
        if way == "lanes":
            assert bench.lanes[0].odd
    assert target.times == 0
    assert target.content == DENSE
    assert done.copied == SIZE
    # What was in a buffer is sent again from it, what was in a pipe has to be read again.
    reads = sum(request.offset == FAULT_AT for request in source.requests if request.command == CMD_READ)
    assert reads == (2 if spliced(way) else 1)
    assert done.spliced == max(0, spliced(way) - REQUEST)


def failed_lease(ring: str, way: str, source: Double, target: Double) -> ErrorReport:
    """Why the lease of a copy failed in which one request fails every time. No connection is lost with it."""
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        bench.begin()
        failed = bench.fail()
        assert [end.lost for end in bench.ends] == [[], []]
    assert "failed 3 times: EIO" in failed.error.text
    return failed.error


@EACH_WAY
def test_a_read_that_keeps_failing_fails_its_lease_by_name_and_nothing_else(ring: str, way: str) -> None:
    source, target = FailsFirst(bytearray(DENSE)), Double(old())
    source.fails_at = FAULT_AT
    error = failed_lease(ring, way, source, target)
    assert (error.side, error.offset, error.length) == ("source", FAULT_AT, REQUEST)
    assert target.content[FAULT_AT : FAULT_AT + REQUEST] == bytes([OLD]) * REQUEST


@EACH_WAY
def test_a_write_that_keeps_failing_fails_its_lease_by_name_and_nothing_else(ring: str, way: str) -> None:
    source, target = Double(bytearray(DENSE)), RefusesFirst(old())
    target.fails_at = FAULT_AT
    error = failed_lease(ring, way, source, target)
    assert (error.side, error.offset, error.length) == ("destination", FAULT_AT, REQUEST)


@pytest.mark.parametrize("error", [EIO, EINVAL])
@EACH_WAY
def test_zeroes_that_are_refused_among_data_are_made_good(ring: str, way: str, error: int) -> None:
    content = in_turn(SIZE)
    source, target = Double(bytearray(content)), RefusesZeroes(old())
    target.number, target.error = 5, error
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        done = bench.copy()
    assert target.content == content
    assert done.copied + done.zeroed == SIZE


# -- a server that goes -----------------------------------------------------------------------------------------------


def left_softly(server: Double) -> bool:
    """The last thing that was said to `server` is that we leave: nothing was half said."""
    return [request.command for request in server.requests[-1:]] == [CMD_DISC]


@pytest.mark.parametrize("going", GOINGS)
@pytest.mark.parametrize("length", [9, 28 + REQUEST // 2])
@EACH_WAY_AND_BUFFERS_BY_CALLS
def test_a_source_that_goes_with_half_a_payload_received(ring: str, way: str, length: int, going: str) -> None:
    source, target = GoesInAReply(bytearray(DENSE)), Double(old())
    source.length, source.goes_at, source.go_away = length, FAULT_AT, GOINGS[going]
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        bench.begin()
        lost = bench.lose()
        assert lost is bench.source
        assert isinstance(lost.lost[0], ConnectionLost)
        assert bench.acknowledged <= FAULT_AT
        wait_for("the destination to be left", lambda: left_softly(target))
    assert target.content[FAULT_AT:] == bytes([OLD]) * (SIZE - FAULT_AT)
    for request in target.requests[:-1]:  # each that was begun is whole
        assert target.content[request.offset :][: request.length] == DENSE[request.offset :][: request.length]


@pytest.mark.parametrize(("tcp", "going"), [(False, "hangs up"), (True, "hangs up"), (True, "resets")])
@pytest.mark.parametrize("share", [0.0, 0.5])
@EACH_CONTENT
@EACH_WAY_AND_BUFFERS_BY_CALLS
def test_a_destination_that_goes_with_half_a_payload_sent(
    ring: str, way: str, content: bytes, tcp: bool, share: float, going: str
) -> None:
    source, target = Double(bytearray(content)), GoesInAWrite(old())
    target.share, target.goes_at, target.go_away = share, FAULT_AT, GOINGS[going]
    with copy_bench(ring, way) as bench, double(source) as one, double(target, tcp=tcp) as two:
        bench.connect(one, two)
        bench.begin()
        lost = bench.lose()
        assert lost is bench.target
        assert isinstance(lost.lost[0], ConnectionLost)
        assert bench.acknowledged <= target.acknowledged
        wait_for("the source to be left", lambda: left_softly(source))


# -- servers that are slow --------------------------------------------------------------------------------------------

CRUMBS = [("dense", 512), ("dense", 1448), ("data and zeroes in turn", 512)]


@pytest.mark.parametrize(("name", "piece"), CRUMBS)
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@EACH_WAY
def test_payload_that_comes_in_small_pieces_arrives(ring: str, way: str, tcp: bool, name: str, piece: int) -> None:
    content = CONTENTS[name]
    source, target = Crumbling(bytearray(content)), Double(old())
    source.piece = piece
    with copy_bench(ring, way) as bench, double(source, tcp=tcp) as one, double(target, tcp=tcp) as two:
        bench.connect(one, two, PLAIN if name == "dense" else OPTIONS)
        done = bench.copy()
        if way == "lanes" and not tcp:  # over TCP the kernel may put pieces together
            assert [remark for remark in bench.remarks if "in small pieces" in remark] == bench.remarks
            assert len(bench.remarks) == 1
            assert done.spliced < done.copied
    assert target.content == content
    assert done.copied + done.zeroed == SIZE


def sleeps(bench: CopyBench) -> None:
    """Nothing turns in vain while nothing comes: not the loop, and no lane."""
    began, wall = time.process_time(), time.monotonic()
    bench.stays_quiet(0.2)
    assert time.process_time() - began < (time.monotonic() - wall) / 4


@pytest.mark.parametrize(("length", "piece"), [(9, REQUEST), (100_000, 512)])
@EACH_WAY
def test_nothing_turns_while_a_source_pauses_in_a_payload(ring: str, way: str, length: int, piece: int) -> None:
    """Also when the pipe was full already, and the rest goes into memory."""
    source, target = PausesInAReply(bytearray(DENSE)), Double(old())
    source.length, source.piece = length, piece
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two, PLAIN)
        bench.begin()
        bench.until("the pause", source.paused.is_set)
        sleeps(bench)
        source.released.set()
        bench.finish()
    assert target.content == DENSE


@EACH_CONTENT
@EACH_WAY
def test_nothing_turns_while_a_destination_takes_nothing(ring: str, way: str, content: bytes) -> None:
    source, target = Double(bytearray(content)), Hesitates(old(), CMD_WRITE)
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        bench.begin()
        bench.until("the first write", lambda: target.count(CMD_WRITE))
        sleeps(bench)
        target.released.set()
        bench.finish()
    assert target.content == content


# -- servers that are too slow ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [9, 100_000])
@EACH_WAY
def test_a_source_that_stops_in_a_payload_is_given_up_by_its_name(ring: str, way: str, length: int) -> None:
    source, target = PausesInAReply(bytearray(DENSE)), Double(old())
    source.length = length
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        bench.begin()
        bench.until("the pause", source.paused.is_set)
        assert bench.time_out() is bench.source
        source.released.set()


@EACH_CONTENT
@EACH_WAY
def test_a_destination_that_takes_nothing_is_given_up_by_its_name(ring: str, way: str, content: bytes) -> None:
    source, target = Double(bytearray(content)), Hesitates(old(), CMD_WRITE)
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        bench.begin()
        bench.until("the first write", lambda: target.count(CMD_WRITE))
        assert bench.time_out() is bench.target
        target.released.set()


@EACH_WAY
def test_a_destination_that_acknowledges_ahead_and_then_takes_nothing_is_given_up(ring: str, way: str) -> None:
    source, target = Double(bytearray(DENSE)), AcknowledgesAhead(old())
    target.goes_on_until = FAULT_AT
    with copy_bench(ring, way) as bench, double(source) as one, double(target) as two:
        bench.connect(one, two)
        bench.begin()
        bench.until("the last that is taken", lambda: target.count(CMD_WRITE) > 2)
        assert bench.time_out() is bench.target
        target.released.set()
