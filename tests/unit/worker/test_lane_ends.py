"""A lane on real sockets: when it is told to stop, when a lease ends under it, and when it is asked to flush."""

from __future__ import annotations

import termios

import pytest

from nbdshard.worker.lane_ends import SocketTarget
from nbdshard.worker.pipes import Pipe
from nbdshard.worker.stretch import Outcome
from support.doubles import CMD_FLUSH, EIO
from support.images import KIB, MIB, random_bytes
from support.lane_bench import EXPIRES, MODES, UNIT, LaneBench, lane_bench, ranges
from support.listening import receive_exactly
from support.pipes import waiting_in
from support.waiting import wait_for

SECTOR = 4 * KIB
CUT = b"a" * SECTOR + bytes(SECTOR) + b"b" * (MIB - 2 * SECTOR)  # it is searched, and goes on from memory
EACH_MODE = pytest.mark.parametrize("mode", MODES)


# -- stopping ----------------------------------------------------------------------------------------------------------


@EACH_MODE
def test_a_lane_that_waits_for_data_stops_and_names_what_it_asked(mode: str) -> None:
    with lane_bench(mode) as bench:
        bench.begin((0, 3 * UNIT), (3 * UNIT, 9 * UNIT), (9 * UNIT, 10 * UNIT))
        asked = bench.source.reads(4)
        bench.lane.stop()
        outcome = bench.end()
        assert [(each.cookie, each.where) for each in outcome.reads] == [(each.cookie, each.where) for each in asked]
        assert (outcome.writes, outcome.unwritten, outcome.lost) == ([], [], None)
        assert (outcome.source_bytes, outcome.target_bytes) == (b"", b"")
        assert [(stretch.at, stretch.end) for stretch in bench.lane.feed] == [
            (4 * UNIT, 9 * UNIT),
            (9 * UNIT, 10 * UNIT),
        ]


def test_a_lane_that_waits_for_acknowledgements_stops_and_names_what_it_wrote() -> None:
    with lane_bench() as bench:
        bench.serve_reads(random_bytes(2 * UNIT))
        bench.begin((0, 2 * UNIT))
        writes = [bench.target.write() for _ in range(2)]
        bench.lane.stop()
        outcome = bench.end()
        assert [(each.cookie, each.where) for each in outcome.writes] == [(each.cookie, each.where) for each in writes]
        assert (outcome.reads, outcome.unwritten, outcome.lost) == ([], [], None)


@EACH_MODE
@pytest.mark.parametrize("sparse_unit", [0, SECTOR])
def test_a_lane_stops_only_when_the_payload_that_moves_is_whole_and_sent(mode: str, sparse_unit: int) -> None:
    content = random_bytes(UNIT)
    with lane_bench(mode, sparse_unit=sparse_unit) as bench:
        bench.begin((0, 2 * UNIT))
        asked = bench.source.reads(2)
        reply = bench.source.data(asked[0], content)
        bench.source.send(reply[: UNIT // 2])
        bench.taken_by_lane(0)
        bench.lane.stop()
        bench.source.send(reply[UNIT // 2 :])
        write = bench.target.write()
        assert write.payload == content
        outcome = bench.end()
        assert (ranges(outcome.reads), ranges(outcome.writes)) == ([(UNIT, 2 * UNIT)], [(0, UNIT)])
        assert (outcome.source_bytes, outcome.unwritten) == (b"", [])


def test_a_lane_that_was_stopped_is_lent_again_and_goes_on() -> None:
    content = random_bytes(2 * UNIT)
    with lane_bench() as bench:
        bench.begin((0, 2 * UNIT))
        asked = bench.source.reads(2)
        bench.lane.stop()
        left = bench.end()
        assert ranges(left.reads) == [(0, UNIT), (UNIT, 2 * UNIT)]
        for each in asked:  # somebody else receives what was asked before
            reply = bench.source.data(each, bytes(UNIT))
            bench.source.send(reply)
            bench.ours[0].setblocking(True)
            receive_exactly(bench.ours[0], len(reply))
        bench.stretches.clear()
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((0, 2 * UNIT))
        assert bench.end() == Outcome()
        assert bench.store(2 * UNIT) == content


# -- leases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [random_bytes(UNIT), b"a" * SECTOR + bytes(SECTOR) + b"b" * (UNIT - 2 * SECTOR)])
def test_under_a_lease_that_is_over_no_write_begins(content: bytes) -> None:
    with lane_bench(sparse_unit=SECTOR) as bench:
        bench.begin((0, 2 * UNIT))
        asked = bench.source.reads(2)
        bench.now = EXPIRES
        bench.source.send(bench.source.data(asked[0], content))
        outcome = bench.end()
        assert bench.untaken() == 0
        assert [(where.start, where.end) for _, where in outcome.unwritten] == [(0, UNIT)]
        assert (ranges(outcome.reads), outcome.writes) == ([(UNIT, 2 * UNIT)], [])
        assert (outcome.is_late, outcome.lost, outcome.failed_write) == (False, None, None)


def test_payload_that_was_held_when_a_loan_ended_is_not_in_the_next() -> None:
    content = random_bytes(2 * UNIT)
    with lane_bench() as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.now = EXPIRES
        bench.begin((0, UNIT))
        (held,) = bench.end().unwritten
        assert held[1].length == UNIT
        bench.now = 100.0
        bench.stretches.clear()
        bench.begin((UNIT, 2 * UNIT))
        assert bench.end() == Outcome()
        assert bench.store(2 * UNIT)[UNIT:] == content[UNIT:]


def test_a_lease_that_was_renewed_meanwhile_goes_on() -> None:
    with lane_bench() as bench:
        bench.begin((0, UNIT))
        (asked,) = bench.source.reads(1)
        bench.lease.expires = EXPIRES + 10.0
        bench.now = EXPIRES + 9.0
        bench.source.send(bench.source.data(asked, random_bytes(UNIT)))
        bench.target.send(bench.target.ack(bench.target.write()))
        assert bench.end() == Outcome()


def stuck(bench: LaneBench, content: bytes) -> None:
    """A WRITE has begun to leave, and there is no room for the rest of it."""
    bench.fill_up_soon()
    bench.serve_reads(content)
    bench.begin((0, MIB))
    bench.until_full()


@pytest.mark.parametrize("content", [random_bytes(MIB), CUT], ids=["pipe", "memory"])
def test_a_lease_that_ends_inside_a_write_sends_no_more_of_it(content: bytes) -> None:
    with lane_bench(unit=MIB, sparse_unit=SECTOR) as bench:
        stuck(bench, content)
        bench.now = EXPIRES
        outcome = bench.end()
        assert (outcome.is_late, outcome.lost) == (True, None)
        last = outcome.writes[-1]
        assert (outcome.failed_write, last.where.end) == (last.cookie, MIB)
        assert outcome.unwritten == []
        sent = bench.untaken()
        assert 0 < sent < last.where.length
        bench.target.end.recv(sent)
        assert bench.untaken() == 0  # there is room now, and nothing more comes


@pytest.mark.parametrize("content", [random_bytes(MIB), CUT], ids=["pipe", "memory"])
def test_a_lease_that_is_renewed_inside_a_write_sends_the_rest(content: bytes) -> None:
    with lane_bench(unit=MIB, sparse_unit=SECTOR) as bench:
        stuck(bench, content)
        bench.lease.expires = EXPIRES + 10.0
        bench.now = EXPIRES
        bench.serve_writes()
        assert bench.end() == Outcome()
        held = bytearray(bench.store(MIB))
        for start, end in bench.stretches[0].zeroes:
            held[start:end] = bytes(end - start)
        assert held == content


def test_a_lease_that_ends_while_the_request_waits_for_room_is_not_late() -> None:
    with lane_bench() as bench:
        sent = bench.fill_up()
        bench.serve_reads(random_bytes(UNIT))
        bench.begin((0, UNIT))
        wait_for("the write to be tried", lambda: bench.lane.oldest_write()[1] > 0)
        bench.now = EXPIRES
        outcome = bench.end()
        assert not outcome.is_late
        assert [(where.start, where.end) for _, where in outcome.unwritten] == [(0, UNIT)]
        receive_exactly(bench.target.end, sent)
        assert bench.untaken() == 0


class StoppedBehindTheRequest(SocketTarget):
    """The process is stopped for long, right when the header has left."""

    bench: LaneBench

    def begin(self, cookie: int, start: int, length: int, payload: memoryview | None) -> int:
        count = super().begin(cookie, start, length, payload)
        self.bench.now = EXPIRES
        return count


class StoppedBehindThePipe(SocketTarget):
    """The process is stopped for long, right when a piece of the payload has left."""

    bench: LaneBench

    def drain(self, pipe: Pipe, count: int) -> int:
        moved = super().drain(pipe, count)
        self.bench.now = EXPIRES
        return moved


@pytest.mark.parametrize(
    ("kind", "pieces", "sent_max"),
    [
        (StoppedBehindTheRequest, 1 << 30, 28),
        (StoppedBehindThePipe, 512, UNIT - 1),  # the pipe is full early, the rest is in memory
    ],
)
def test_the_clock_is_looked_at_between_any_two_pieces(
    kind: type[StoppedBehindTheRequest | StoppedBehindThePipe], pieces: int, sent_max: int
) -> None:
    with lane_bench() as bench:
        bench.serve_reads(random_bytes(UNIT), pieces)
        target = kind(bench.ours[1].fileno(), bench.target_end().quick)
        target.bench = bench
        bench.begin((0, UNIT), target=target)
        outcome = bench.end()
        assert outcome.is_late
        assert 0 < bench.untaken() <= sent_max


# -- flushing ----------------------------------------------------------------------------------------------------------


@EACH_MODE
def test_a_flush_that_is_asked_for_in_the_middle_is_sent_and_answered(mode: str) -> None:
    content = random_bytes(6 * UNIT)
    with lane_bench(mode) as bench:
        bench.begin((0, 6 * UNIT))
        asked = bench.source.reads(4)
        bench.lane.wants_flush = True
        bench.now = 110.0
        bench.source.send(bench.source.data(asked[0], content[:UNIT]))
        write, flush = bench.target.write(), bench.target.flush()
        assert (flush.start, flush.length) == (0, 0)
        assert bench.lane.flush_sent == 110.0
        assert not bench.lane.flushed
        bench.target.send(bench.target.ack(write), bench.target.ack(flush))
        for each in asked[1:]:
            bench.source.send(bench.source.data(each, content[each.start :][:UNIT]))
        bench.serve_reads(content)
        bench.serve_writes()
        assert bench.end() == Outcome()
        assert bench.lane.flushed
        assert not bench.lane.wants_flush
        assert bench.lane.flush_sent == 0.0
        assert bench.stretches[0].copied == 6 * UNIT


def flush_behind_a_write(bench: LaneBench) -> None:
    """Four reads are asked, the first one is answered, and behind its write a flush is sent."""
    bench.begin((0, 6 * UNIT))
    asked = bench.source.reads(4)
    bench.lane.wants_flush = True
    bench.source.send(bench.source.data(asked[0], random_bytes(UNIT)))


def test_a_flush_is_answered_while_the_source_says_nothing() -> None:
    with lane_bench() as bench:
        flush_behind_a_write(bench)
        write, flush = bench.target.write(), bench.target.flush()
        bench.target.send(bench.target.ack(write))
        wait_for("the write to count", lambda: bench.lane.copied == UNIT)
        bench.target.send(bench.target.ack(flush))
        wait_for("the flush to be over", lambda: bench.lane.flushed)
        assert bench.wakes >= 1


def test_a_lane_ends_only_when_its_flush_is_answered() -> None:
    with lane_bench() as bench:
        bench.begin((0, UNIT))
        (asked,) = bench.source.reads(1)
        bench.lane.wants_flush = True
        bench.source.send(bench.source.data(asked, random_bytes(UNIT)))
        write, flush = bench.target.write(), bench.target.flush()
        bench.target.send(bench.target.ack(write))
        wait_for("the write to count", lambda: bench.lane.copied == UNIT)
        assert bench.lane.outcome is None
        bench.target.send(bench.target.ack(flush))
        assert bench.end() == Outcome()
        assert bench.lane.flushed


@EACH_MODE
def test_a_flush_that_fails_is_handed_back_with_its_answer(mode: str) -> None:
    with lane_bench(mode) as bench:
        flush_behind_a_write(bench)
        write, flush = bench.target.write(), bench.target.flush()
        reply = bench.target.refusal(flush, EIO)
        bench.target.send(reply)
        outcome = bench.end()
        assert outcome.is_flushing
        assert outcome.target_bytes == reply
        assert [each.cookie for each in outcome.writes] == [write.cookie]
        assert not bench.lane.flushed


def test_a_flush_that_is_under_way_when_the_lane_stops_is_handed_back() -> None:
    with lane_bench() as bench:
        flush_behind_a_write(bench)
        assert bench.target.write().start == 0
        assert bench.target.flush().command == CMD_FLUSH
        bench.lane.stop()
        outcome = bench.end()
        assert (outcome.is_flushing, outcome.target_bytes, outcome.lost) == (True, b"", None)
        assert not bench.lane.wants_flush


def test_a_flush_that_was_not_begun_when_the_lane_stopped_is_still_wanted() -> None:
    with lane_bench() as bench:
        bench.begin((0, 6 * UNIT))
        bench.source.reads(4)
        bench.lane.stop()
        bench.lane.wants_flush = True
        outcome = bench.end()
        assert not outcome.is_flushing
        assert bench.lane.wants_flush
        assert waiting_in(bench.theirs[1], termios.FIONREAD) == 0
