"""worker/link.py and worker/direct.py on real sockets: spliced connections that end, stop, or make us wait."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from nbdshard.common.errors import ConnectionLost, NbdshardError, ProtocolError
from nbdshard.common.limits import DISCONNECT_SECONDS
from nbdshard.common.ranges import Range
from nbdshard.worker.dialing import LinkState
from nbdshard.worker.piped import PipedPayload
from support.doubles import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    REPLY_OFFSET_DATA,
    Double,
    Request,
    Talk,
    double,
)
from support.failing import GOINGS, GoesInAReply, GoesInAWrite, PausesInAReply
from support.hesitant import Hesitates
from support.hostile import LYING_DESTINATIONS, LYING_SOURCES
from support.images import KIB, MIB, random_bytes
from support.link_bench import Answer, End, LinkBench, link_bench
from support.waiting import WAIT_SECONDS, wait_for

SIZE = 8 * MIB  # more than the buffers of a socket take
CONTENT = random_bytes(SIZE)


def source_double() -> Double:
    return Double(bytearray(CONTENT))


def lost(bench: LinkBench, end: End) -> NbdshardError:
    """Why the connection ended: told once, and the descriptor is closed."""
    bench.until("the connection to be lost", lambda: end.lost)
    bench.until("the link to be closed", lambda: end.link.closed)
    bench.settle()
    (error,) = end.lost
    return error


# -- a server that goes away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("going", GOINGS)
@pytest.mark.parametrize("length", [0, 9, 28, 50_000, 28 + 100_000 - 1])
def test_a_source_that_goes_within_its_answer_is_lost_once(
    bench: LinkBench, tcp: bool, going: str, length: int
) -> None:
    server = GoesInAReply(bytearray(CONTENT))
    server.length, server.go_away = length, GOINGS[going]
    with double(server, tcp=tcp) as uri:
        source = bench.open(uri, "source")
        answers = [source.read(handle, Range.of(handle * MIB, 100_000), bench.room(100_000)) for handle in range(2)]
        error = lost(bench, source)
    assert isinstance(error, ConnectionLost)
    assert "waiting for 2 replies" in str(error)
    assert [answer.done for answer in answers] == [0, 0]


@pytest.mark.parametrize("going", GOINGS)
def test_the_end_that_comes_with_the_last_bytes_is_noticed(bench: LinkBench, tcp: bool, going: str) -> None:
    """Both may be one edge: who stops reading when the answer is whole never hears of the end."""
    server = GoesInAReply(bytearray(CONTENT))
    server.length, server.go_away = 28 + 1000, GOINGS[going]
    with double(server, tcp=tcp) as uri:
        source = bench.open(uri, "source")
        payload = bench.room(1000)
        answer = source.read(0, Range.of(0, 1000), payload)
        error = lost(bench, source)
        assert isinstance(error, ConnectionLost)
        if going == "resets":
            assert answer.done <= 1  # what had not been read by then is gone
        else:
            assert (answer.done, answer.error) == (1, None)
            assert bench.bytes_of(payload) == CONTENT[:1000]
            assert "while copying" in str(error)


class FillsAPipe(Double):
    """Sends as many short pieces of its answer as a pipe has slots, and goes."""

    slots = 0

    def read(self, talk: Talk, request: Request) -> None:
        header = talk.chunk_header(request, REPLY_OFFSET_DATA, request.length + 8)
        talk.socket.sendall(header + struct.pack(">Q", request.offset))
        for at in range(self.slots):
            talk.socket.sendall(bytes(self.content[at * 100 : at * 100 + 100]))
        talk.hang_up()


def test_the_end_behind_a_pipe_that_is_just_full_is_noticed(ring: str) -> None:
    """The pipe takes nothing, nothing is left to take, and the end is no more than an edge."""
    server = FillsAPipe(bytearray(CONTENT))
    with link_bench(ring, pipe_size=64 * KIB) as bench, double(server) as uri:
        source = bench.open(uri, "source")
        payload = bench.room(64 * KIB)
        server.slots = payload.pipe.capacity // 4096
        answer = source.read(0, Range.of(0, 64 * KIB), payload)
        error = lost(bench, source)
        assert isinstance(error, ConnectionLost)
        assert payload.spilled_at == server.slots * 100
        assert answer.done == 0


def test_a_source_that_has_gone_before_the_loop_looks_has_given_all_it_sent(bench: LinkBench, tcp: bool) -> None:
    """All of it, end included, is there when the socket is looked at for the first time."""
    gone = threading.Event()

    def go(talk: Talk) -> None:
        talk.socket.shutdown(socket.SHUT_WR)
        gone.set()
        talk.socket.recv(1)

    server = GoesInAReply(bytearray(CONTENT))
    server.length, server.go_away = 28 + 1000, go
    with double(server, tcp=tcp) as uri:
        source = bench.open(uri, "source")
        payload = bench.room(1000)
        answer = source.read(0, Range.of(0, 1000), payload)
        source.link.pump(0.0)  # sends it
        assert gone.wait(WAIT_SECONDS)
        error = lost(bench, source)
    assert "while copying" in str(error)
    assert (answer.done, answer.error) == (1, None)
    assert bench.bytes_of(payload) == CONTENT[:1000]


@pytest.mark.parametrize("going", ["hangs up", "resets"])
@pytest.mark.parametrize("length", [0, 1, 500_000])
def test_a_destination_that_goes_within_a_payload_is_lost_once(
    bench: LinkBench, tcp: bool, going: str, length: int
) -> None:
    server = GoesInAWrite(bytearray(SIZE))
    server.length, server.go_away = length, GOINGS[going]
    with double(source_double(), tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        payloads = [bench.read_piped(source, handle, Range.of(handle * MIB, MIB)) for handle in range(3)]
        answers = [target.write(each, Range.of(each * MIB, MIB), payload) for each, payload in enumerate(payloads)]
        error = lost(bench, target)
        assert isinstance(error, ConnectionLost)
        assert "waiting for 3 replies" in str(error)
        assert [answer.done for answer in answers] == [0, 0, 0]
        assert source.lost == []
        for payload in payloads:
            bench.pool.give(payload)
            assert payload.pipe.held == 0
        again = bench.read_piped(source, 4, Range.of(0, MIB))
        assert bench.bytes_of(again) == CONTENT[:MIB]


@pytest.mark.parametrize("name", LYING_SOURCES)
def test_a_source_that_breaks_the_protocol_is_blamed_once(bench: LinkBench, name: str) -> None:
    with double(LYING_SOURCES[name](bytearray(CONTENT))) as uri:
        source = bench.open(uri, "source")
        payload = bench.room(100_000)
        source.read(0, Range.of(512, 100_000), payload)
        assert isinstance(lost(bench, source), ProtocolError)
        bench.pool.give(payload)
        assert payload.pipe.held == 0


@pytest.mark.parametrize("name", LYING_DESTINATIONS)
def test_a_destination_that_breaks_the_protocol_is_blamed_once(bench: LinkBench, name: str) -> None:
    with double(source_double()) as one, double(LYING_DESTINATIONS[name](bytearray(SIZE))) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        payload = bench.read_piped(source, 0, Range.of(0, MIB))
        target.write(0, Range.of(0, MIB), payload)
        assert isinstance(lost(bench, target), ProtocolError)
        bench.pool.give(payload)


# -- a server that makes us wait --------------------------------------------------------------------------------------


def test_a_destination_that_reads_nothing_for_a_while_gets_all_of_it_then(bench: LinkBench, tcp: bool) -> None:
    server = Hesitates(bytearray(SIZE), CMD_WRITE)
    with double(source_double(), tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        pieces = list(Range(0, SIZE).split(MIB))
        payloads = [bench.read_piped(source, handle, where) for handle, where in enumerate(pieces)]
        answers = [target.write(handle, where, payloads[handle]) for handle, where in enumerate(pieces)]
        bench.stays_quiet()
        assert [answer.done for answer in answers] == [0] * 8
        assert sum(payload.pipe.held for payload in payloads) > 0
        server.released.set()
        bench.done(*answers)
    assert server.content == CONTENT


def test_the_loop_sleeps_while_a_source_is_silent(bench: LinkBench, tcp: bool) -> None:
    server = Hesitates(bytearray(CONTENT), CMD_READ)
    with double(server, tcp=tcp) as uri:
        source = bench.open(uri, "source")
        bench.stays_quiet()
        answer = source.read(0, Range.of(0, MIB), bench.room(MIB))
        bench.stays_quiet()
        assert (answer.sent, answer.done) == (1, 0)
        server.released.set()
        bench.done(answer)
        bench.stays_quiet()


@pytest.mark.parametrize(("length", "piece"), [(9, MIB), (28, MIB), (50_000, MIB), (50_000, 512)])
def test_the_loop_sleeps_in_the_middle_of_a_payload(ring: str, tcp: bool, length: int, piece: int) -> None:
    """Also when the pipe was full already, and the rest goes into memory."""
    server = PausesInAReply(bytearray(CONTENT))
    server.length, server.piece = length, piece
    with link_bench(ring, pipe_size=128 * KIB) as bench, double(server, tcp=tcp) as uri:
        source = bench.open(uri, "source")
        payload = bench.room(128 * KIB)
        answer = source.read(0, Range.of(0, 128 * KIB), payload)
        bench.until("a part of the payload", server.paused.is_set)
        bench.stays_quiet()
        assert answer.done == 0
        server.released.set()
        bench.done(answer)
        assert bench.bytes_of(payload) == CONTENT[: 128 * KIB]


def test_a_source_that_goes_on_while_the_destination_is_stuck_is_heard(bench: LinkBench) -> None:
    server = Hesitates(bytearray(SIZE), CMD_WRITE)
    with double(source_double()) as one, double(server) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        stuck = target.write(0, Range.of(0, MIB), bench.read_piped(source, 0, Range.of(0, MIB)))
        for handle in range(1, 4):
            bench.read_piped(source, handle, Range.of(handle * MIB, MIB))
        assert not stuck.done
        server.released.set()
        bench.done(stuck)


def test_a_server_that_answers_while_it_is_sent_to_is_heard(bench: LinkBench, tcp: bool) -> None:
    """One connection that reads and writes: neither direction waits for the other."""

    class ReadsLate(Double):
        """Has one thread for what it is sent and one for its answers: it answers reads while a WRITE is stuck."""

        def transmit(self, talk: Talk) -> None:
            while True:
                request = self.receive_request(talk)
                if request.command == CMD_WRITE:
                    for offset in range(0, request.length, 64 * KIB):  # answers nothing, but goes on reading
                        talk.receive(min(64 * KIB, request.length - offset))
                    talk.done(request)
                else:
                    self.answer(talk, request)

    with double(ReadsLate(bytearray(CONTENT)), tcp=tcp) as uri:
        end = bench.open(uri, "destination")
        payloads = [bench.read_piped(end, handle, Range.of(handle * MIB, MIB)) for handle in range(3)]
        answers = [end.write(handle, Range.of(0, MIB), payload) for handle, payload in enumerate(payloads)]
        fresh = bench.room(MIB)
        answers.append(end.read(4, Range.of(3 * MIB, MIB), fresh))
        bench.done(*answers)
        assert bench.bytes_of(fresh) == CONTENT[3 * MIB : 4 * MIB]


# -- leaving ----------------------------------------------------------------------------------------------------------


def eight_writes(bench: LinkBench, source: End, target: End) -> tuple[list[PipedPayload], list[Answer]]:
    """More than the sockets hold, of a destination that takes nothing: some of it is left in the pipes."""
    payloads = [bench.read_piped(source, handle, Range.of(handle * MIB, MIB)) for handle in range(8)]
    answers = [target.write(each, Range.of(each * MIB, MIB), payload) for each, payload in enumerate(payloads)]
    bench.settle()
    assert sum(payload.pipe.held for payload in payloads) > 0
    return payloads, answers


def test_a_close_with_half_a_payload_sent_ends_the_connection_there(bench: LinkBench, tcp: bool) -> None:
    """Nothing more of the payload leaves: a server that waits for the rest sees the end of the stream."""
    ended = threading.Event()

    class Counts(Hesitates):
        taken = 0

        def answer(self, talk: Talk, request: Request) -> None:
            if request.command == CMD_WRITE:
                assert self.released.wait(WAIT_SECONDS)
                while part := talk.socket.recv(1 << 16):
                    self.taken += len(part)
                ended.set()
                raise EOFError
            super().answer(talk, request)

    server = Counts(bytearray(SIZE))
    with double(source_double(), tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        payloads, answers = eight_writes(bench, source, target)
        target.link.close()
        bench.until("the link to be closed", lambda: target.link.closed)
        server.released.set()
        assert ended.wait(WAIT_SECONDS)
        bench.stays_quiet()
        assert [answer.done for answer in answers] == [0] * 8
        assert target.lost == []
        assert server.taken <= SIZE + 8 * 28 - sum(payload.pipe.held for payload in payloads)
        for payload in payloads:
            bench.pool.give(payload)
            assert payload.pipe.held == 0


def test_a_close_with_half_a_payload_received_leaves_a_pipe_that_can_be_used_again(bench: LinkBench) -> None:
    server = PausesInAReply(bytearray(CONTENT))
    with double(server) as one, double(source_double()) as two:
        source = bench.open(one, "source")
        payload = bench.room(MIB)
        answer = source.read(0, Range.of(0, MIB), payload)
        bench.until("half a payload", server.paused.is_set)
        bench.settle()
        source.link.close()
        bench.until("the link to be closed", lambda: source.link.closed)
        bench.pool.give(payload)
        other = bench.open(two, "source")
        again = bench.read_piped(other, 0, Range.of(MIB, MIB))
        assert again.pipe is payload.pipe
        assert bench.bytes_of(again) == CONTENT[MIB : 2 * MIB]
        assert (answer.done, source.lost) == (0, [])
        server.released.set()


def test_a_soft_end_with_half_a_payload_sent_finishes_it_first(bench: LinkBench, tcp: bool) -> None:
    server = Hesitates(bytearray(SIZE), CMD_WRITE)
    with double(source_double(), tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        _, answers = eight_writes(bench, source, target)
        target.link.disconnect()
        bench.stays_quiet()
        target.link.disconnect()  # once more: it is leaving already
        assert target.link.state is LinkState.LEAVING
        server.released.set()
        bench.until("the link to be closed", lambda: target.link.closed)
        assert [(answer.sent, answer.done, answer.error) for answer in answers] == [(1, 1, None)] * 8
        assert target.lost == []
        wait_for("the soft disconnect", lambda: server.count(CMD_DISC) == 1)
    assert server.content == CONTENT


def test_a_soft_end_with_half_a_payload_received_takes_the_rest_first(bench: LinkBench, tcp: bool) -> None:
    server = PausesInAReply(bytearray(CONTENT))
    with double(server, tcp=tcp) as uri:
        source = bench.open(uri, "source")
        payload = bench.room(MIB)
        answer = source.read(0, Range.of(0, MIB), payload)
        bench.until("half a payload", server.paused.is_set)
        bench.settle()
        source.link.disconnect()
        bench.stays_quiet()
        server.released.set()
        bench.until("the link to be closed", lambda: source.link.closed)
        assert (answer.done, answer.error, source.lost) == (1, None, [])
        assert bench.bytes_of(payload) == CONTENT[:MIB]


@pytest.mark.parametrize("splice", [True, False], ids=["spliced", "buffered"])
def test_a_soft_end_that_comes_with_the_last_answer_is_told_to_the_server(
    bench: LinkBench, tcp: bool, splice: bool
) -> None:
    """Who hears of the answer, or of another connection's loss right before it, may have had enough."""
    server = source_double()
    with double(server, tcp=tcp) as uri:
        end = bench.open(uri, "source", splice=splice)
        end.on_done = lambda _handle: end.link.disconnect()
        end.read(0, Range.of(0, 1000), bench.room(1000) if splice else memoryview(bytearray(1000)))
        bench.until("the link to be closed", lambda: end.link.closed)
        wait_for("the soft disconnect", lambda: server.count(CMD_DISC) == 1, 2.0)
    assert end.lost == []


def test_a_soft_end_that_the_server_does_not_let_come_is_a_hard_one_after_its_time(bench: LinkBench) -> None:
    server = Hesitates(bytearray(SIZE), CMD_WRITE)
    with double(source_double()) as one, double(server) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        answer = target.write(0, Range.of(0, MIB), bench.read_piped(source, 0, Range.of(0, MIB)))
        bench.settle()
        target.link.disconnect()
        bench.settle()
        target.link.tick(DISCONNECT_SECONDS - 0.1)
        assert target.link.state is LinkState.LEAVING
        target.link.tick(DISCONNECT_SECONDS)
        bench.until("the link to be closed", lambda: target.link.closed)
        assert (answer.done, target.lost) == (0, [])
        server.released.set()


def test_a_server_that_takes_no_more_of_a_payload_is_timed_out(bench: LinkBench) -> None:
    server = Hesitates(bytearray(SIZE), CMD_WRITE)
    with double(source_double()) as one, double(server) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        target.write(0, Range.of(0, MIB), bench.read_piped(source, 0, Range.of(0, MIB)))
        bench.settle()
        target.link.tick(30.9)
        assert target.lost == []
        target.link.tick(31.0)  # 30 s, and one for the MiB
        assert "timed out while writing: no answer within 31 s" in str(lost(bench, target))
        server.released.set()


def test_a_flush_after_spliced_writes_is_answered_after_them(bench: LinkBench) -> None:
    server = Double(bytearray(SIZE))
    with double(source_double()) as one, double(server) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        payload = bench.read_piped(source, 0, Range.of(0, MIB))
        written, flushed = target.write(0, Range.of(0, MIB), payload), target.flush(1)
        bench.done(written, flushed)
    assert [request.command for request in server.requests] == [CMD_WRITE, CMD_FLUSH]
