"""A lane on real sockets: what it copies arrives byte for byte, and the first thing that is not plain ends the loan."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from errno import ECONNRESET, EPIPE

import pytest

from nbdshard.common.ranges import Range
from nbdshard.worker.stretch import Outcome
from support.doubles import EIO, ENOSPC, REPLY_OFFSET_HOLE
from support.images import KIB, MIB, random_bytes
from support.lane_bench import MODES, UNIT, lane_bench, ranges
from support.pipes import Ends, reset, tcp_ends, unix_ends
from support.waiting import wait_for

SECTOR = 4 * KIB  # the unit of zero detection
ENDS = pytest.mark.parametrize("ends", [unix_ends, tcp_ends], ids=["unix", "tcp"])
EACH_MODE = pytest.mark.parametrize("mode", MODES)


def content_with_zeroes(length: int) -> bytes:
    """Data, with zeroes of all kinds: some sectors, less than one, across requests, and a whole request."""
    content = bytearray(random_bytes(length))
    for start, end in (
        (2 * SECTOR, 5 * SECTOR),
        (7 * SECTOR + 100, 8 * SECTOR - 100),
        (UNIT - SECTOR, UNIT + SECTOR),
        (3 * UNIT, 4 * UNIT),
        (length - 3 * SECTOR, length),
    ):
        content[start:end] = bytes(end - start)
    return bytes(content)


# -- all goes well -----------------------------------------------------------------------------------------------------


@EACH_MODE
@ENDS
@pytest.mark.parametrize("start", [0, SECTOR, 5000])
def test_what_is_fed_arrives_byte_for_byte(mode: str, ends: Callable[[], Ends], start: int) -> None:
    end = 9 * UNIT + 777
    content = random_bytes(end)
    with lane_bench(mode, ends=ends) as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((start, 5 * UNIT), (5 * UNIT, end))
        assert bench.end() == Outcome()
        assert bench.store(end)[start:] == content[start:]
        assert [stretch.copied for stretch in bench.lane.finished] == [5 * UNIT - start, 4 * UNIT + 777]
        assert all(asked.start // UNIT == (asked.where.end - 1) // UNIT for asked in bench.written)
        assert bench.lane.copied == end - start


@EACH_MODE
@ENDS
@pytest.mark.parametrize("start", [0, SECTOR, 5000])
def test_zeroes_that_are_found_are_noted_and_not_written(mode: str, ends: Callable[[], Ends], start: int) -> None:
    end = 9 * UNIT + 777
    content = content_with_zeroes(end)
    with lane_bench(mode, sparse_unit=SECTOR, ends=ends) as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((start, 5 * UNIT), (5 * UNIT, end))
        assert bench.end() == Outcome()
        held = bytearray(bench.store(end))
        zeroes = [each for stretch in bench.stretches for each in stretch.zeroes]
        for zero_start, zero_end in zeroes:
            assert held[zero_start:zero_end] == b"\xee" * (zero_end - zero_start), "zeroes were written, too"
            held[zero_start:zero_end] = bytes(zero_end - zero_start)
        assert held[start:] == content[start:]
    for at in range(start + -start % SECTOR, end - SECTOR, SECTOR):
        if content[at : at + SECTOR] == bytes(SECTOR):
            assert any(a <= at and at + SECTOR <= b for a, b in zeroes), f"the zeroes at {at} were missed"


def test_one_payload_is_cut_into_writes_around_its_zeroes() -> None:
    with lane_bench(sparse_unit=SECTOR) as bench:
        bench.begin((0, 2 * UNIT))
        one, two = bench.source.reads(2)
        bench.source.send(bench.source.data(one, b"a" * SECTOR + bytes(2 * SECTOR) + b"b" * (UNIT - 3 * SECTOR)))
        writes = [bench.target.write(), bench.target.write()]
        assert [(each.where, each.payload[:1]) for each in writes] == [
            (Range(0, SECTOR), b"a"),
            (Range(3 * SECTOR, UNIT), b"b"),
        ]
        bench.source.send(bench.source.data(two, bytes(UNIT)))
        bench.target.send(*map(bench.target.ack, writes))
        assert bench.end() == Outcome()
        assert bench.stretches[0].zeroes == [(SECTOR, 3 * SECTOR), (UNIT, 2 * UNIT)]
        assert bench.stretches[0].copied == UNIT - 2 * SECTOR


def test_a_stretch_of_nothing_but_zeroes_is_finished_without_a_write() -> None:
    with lane_bench(sparse_unit=SECTOR) as bench:
        bench.serve_reads(bytes(4 * UNIT))
        bench.begin((0, 4 * UNIT))
        assert bench.end() == Outcome()
        assert list(bench.lane.finished) == bench.stretches
        assert bench.untaken() == 0


def test_dense_payload_is_spliced_and_what_had_to_be_cut_is_not() -> None:
    with lane_bench(sparse_unit=SECTOR) as bench:
        bench.serve_reads(random_bytes(UNIT) + b"a" * SECTOR + bytes(SECTOR) + b"b" * (UNIT - 2 * SECTOR))
        bench.serve_writes()
        bench.begin((0, UNIT), (UNIT, 2 * UNIT))
        assert bench.end() == Outcome()
        assert [stretch.spliced for stretch in bench.stretches] == [UNIT, 0]


@EACH_MODE
def test_replies_may_come_in_any_order(mode: str) -> None:
    content = random_bytes(4 * UNIT)
    with lane_bench(mode) as bench:
        bench.serve_writes()
        bench.begin((0, 4 * UNIT))
        for asked in reversed(bench.source.reads(4)):
            bench.source.send(bench.source.data(asked, content[asked.start :][: asked.length]))
        assert bench.end() == Outcome()
        assert bench.store(4 * UNIT) == content


@EACH_MODE
@pytest.mark.parametrize("head", [1, 5, 15])
def test_acknowledgements_may_come_in_any_pieces(mode: str, head: int) -> None:
    with lane_bench(mode) as bench:
        bench.serve_reads(random_bytes(3 * UNIT))
        bench.begin((0, 3 * UNIT))
        acks = b"".join(bench.target.ack(bench.target.write()) for _ in range(3))
        whole = len(acks) // 3
        for piece in (acks[:head], acks[head : whole + head], acks[whole + head :]):
            bench.target.send(piece)
            bench.taken_by_lane(1)
        assert bench.end() == Outcome()
        assert bench.stretches[0].copied == 3 * UNIT


@pytest.mark.parametrize("sparse_unit", [0, SECTOR])
def test_a_pipe_that_is_full_early_is_told_of_and_the_copy_is_the_same(sparse_unit: int) -> None:
    content = content_with_zeroes(6 * UNIT)
    with lane_bench(sparse_unit=sparse_unit) as bench:
        bench.serve_reads(content, pieces=512)  # each takes a slot of the pipe, which has one for each 4 KiB
        bench.serve_writes()
        bench.begin((0, 6 * UNIT))
        assert bench.end() == Outcome()
        zeroes = bench.stretches[0].zeroes
        held = bytearray(bench.store(6 * UNIT))
        for start, end in zeroes:
            held[start:end] = bytes(end - start)
        assert held == content
        (remark,) = bench.lane.remarks
        assert re.fullmatch(
            r"its data comes in small pieces: a pipe of 65536 bytes was full with \d{4,5}; "
            "the rest of such payload goes through a buffer",
            remark,
        )
        assert bool(zeroes) is bool(sparse_unit)
        assert bench.stretches[0].spliced < bench.stretches[0].copied


@ENDS
def test_a_destination_that_takes_nothing_for_a_while_gets_it_all(ends: Callable[[], Ends]) -> None:
    content = random_bytes(16 * MIB)
    with lane_bench(unit=MIB, ends=ends) as bench:
        bench.fill_up_soon()
        bench.serve_reads(content)
        bench.begin((0, 16 * MIB))
        bench.until_full()
        bench.serve_writes()
        assert bench.end() == Outcome()
        assert bench.store(16 * MIB) == content


def test_a_lane_is_lent_again_and_again() -> None:
    content = random_bytes(6 * UNIT)
    with lane_bench() as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        for index in range(3):
            bench.begin((index * 2 * UNIT, (index + 1) * 2 * UNIT))
            assert bench.end() == Outcome()
            assert bench.lane.copied == 2 * UNIT
        assert bench.store(6 * UNIT) == content


def test_a_lane_that_has_little_left_asks_for_more_once() -> None:
    with lane_bench() as bench:
        bench.lane.feed_low = 1
        bench.begin((0, UNIT), (UNIT, 2 * UNIT), (2 * UNIT, 8 * UNIT))
        bench.source.reads(4)
        assert bench.wakes == 1
        bench.lane.look()
        bench.lane.stop()
        bench.end()
        assert bench.wakes == 2  # it is over


def test_what_is_unanswered_shows_while_it_is() -> None:
    with lane_bench() as bench:
        assert bench.lane.oldest_read() == (float("inf"), 0)
        bench.begin((0, 4 * UNIT))
        asked = bench.source.reads(4)
        assert bench.lane.oldest_read() == (100.0, 4 * UNIT)
        bench.now = 101.0
        bench.source.send(bench.source.data(asked[0], bytes(UNIT)))
        bench.target.write()
        assert bench.lane.oldest_read() == (100.0, 3 * UNIT)
        assert bench.lane.oldest_write() == (101.0, UNIT)
        assert bench.lane.stretches_written() == bench.stretches


def test_no_more_is_asked_for_than_the_queue_holds() -> None:
    with lane_bench(queue_bytes=2 * UNIT) as bench:
        bench.begin((0, 8 * UNIT))
        asked = bench.source.reads(2)
        assert bench.lane.oldest_read()[1] == 2 * UNIT
        bench.source.send(bench.source.data(asked[0], bytes(UNIT)))
        bench.source.reads(1)
        assert bench.lane.oldest_read()[1] == 2 * UNIT


def test_no_more_is_written_without_an_answer_than_the_queue_holds() -> None:
    content = random_bytes(8 * UNIT)
    with lane_bench(queue_bytes=2 * UNIT) as bench:
        bench.serve_reads(content)
        bench.begin((0, 8 * UNIT))
        asked = [bench.target.write(), bench.target.write()]
        for _ in range(6):
            wait_for("the next payload", lambda: bench.lane.oldest_write()[1] == 2 * UNIT)
            assert bench.untaken() == 0
            bench.target.send(bench.target.ack(asked.pop(0)))
            asked.append(bench.target.write())
        bench.target.send(*map(bench.target.ack, asked))
        assert bench.end() == Outcome()


def test_one_request_is_under_way_however_small_the_queue() -> None:
    content = random_bytes(4 * UNIT)
    with lane_bench(queue_bytes=1) as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((0, 4 * UNIT))
        assert bench.end() == Outcome()
        assert bench.store(4 * UNIT) == content


# -- a reply that is not plain -----------------------------------------------------------------------------------------


@EACH_MODE
@pytest.mark.parametrize("message", [b"", b"no", b"something is the matter"])
def test_an_error_in_the_place_of_data_ends_the_loan_with_what_is_unanswered(mode: str, message: bytes) -> None:
    with lane_bench(mode) as bench:
        bench.begin((0, 3 * UNIT), (3 * UNIT, 9 * UNIT))
        asked = bench.source.reads(4)
        bench.source.send(bench.source.data(asked[1], random_bytes(UNIT)))
        write = bench.target.write()
        reply = bench.source.refusal(asked[0], EIO, message)
        bench.source.send(reply)
        outcome = bench.end()
        assert ranges(outcome.reads)[0] == (0, UNIT)
        assert [each.cookie for each in outcome.writes] == [write.cookie]
        assert ranges(outcome.writes) == [(UNIT, 2 * UNIT)]
        assert outcome.unwritten == []
        assert outcome.lost is None
        assert outcome.source_bytes
        assert reply.startswith(outcome.source_bytes)
        left = len(reply) - len(outcome.source_bytes)
        assert (bench.ours[0].recv(100) if left else b"") == reply[len(outcome.source_bytes) :]


@pytest.mark.parametrize("mode", ["structured", "extended"])
def test_a_hole_ends_the_loan(mode: str) -> None:
    with lane_bench(mode) as bench:
        bench.begin((0, 2 * UNIT))
        one, two = bench.source.reads(2)
        reply = bench.source.chunk(one, REPLY_OFFSET_HOLE, struct.pack(">QI", one.start, one.length))
        bench.source.send(reply)
        outcome = bench.end()
        assert [(each.cookie, each.where) for each in outcome.reads] == [
            (each.cookie, each.where) for each in (one, two)
        ]
        assert outcome.source_bytes + bench.ours[0].recv(100) == reply


@EACH_MODE
def test_an_error_in_the_place_of_an_acknowledgement_ends_the_loan(mode: str) -> None:
    with lane_bench(mode) as bench:
        bench.serve_reads(random_bytes(2 * UNIT))
        bench.begin((0, 2 * UNIT))
        one, two = bench.target.write(), bench.target.write()
        reply = bench.target.refusal(two, ENOSPC) + bench.target.ack(one)
        bench.target.send(reply)
        outcome = bench.end()
        assert [(each.cookie, each.where) for each in outcome.writes] == [
            (each.cookie, each.where) for each in (one, two)
        ]
        assert (outcome.reads, outcome.lost, outcome.target_bytes) == ([], None, reply)


@EACH_MODE
def test_a_second_acknowledgement_beside_the_first_is_handed_over(mode: str) -> None:
    with lane_bench(mode) as bench:
        bench.serve_reads(random_bytes(2 * UNIT))
        bench.begin((0, 2 * UNIT))
        one, _ = bench.target.write(), bench.target.write()
        bench.target.send(bench.target.ack(one) * 2)
        outcome = bench.end()
        assert (outcome.lost, outcome.target_bytes) == (None, bench.target.ack(one))
        assert ranges(outcome.writes) == [(UNIT, 2 * UNIT)]


@EACH_MODE
def test_what_was_acknowledged_in_front_of_an_error_counts(mode: str) -> None:
    with lane_bench(mode) as bench:
        bench.serve_reads(random_bytes(2 * UNIT))
        bench.begin((0, 2 * UNIT))
        one, two = bench.target.write(), bench.target.write()
        reply = bench.target.refusal(two, ENOSPC)
        bench.target.send(bench.target.ack(one), reply)
        outcome = bench.end()
        assert ranges(outcome.writes) == [(UNIT, 2 * UNIT)]
        assert outcome.target_bytes == reply
        assert bench.stretches[0].copied == UNIT


@pytest.mark.parametrize("sparse_unit", [0, SECTOR])
def test_payload_that_waits_for_a_row_when_a_write_fails_is_handed_back(sparse_unit: int) -> None:
    with lane_bench(rows=4, sparse_unit=sparse_unit) as bench:  # two of them for writes
        bench.begin((0, 6 * UNIT))
        asked = bench.source.reads(2)
        for each in asked:
            bench.source.send(bench.source.data(each, random_bytes(UNIT)))
        writes = [bench.target.write() for _ in asked]
        # No row is free: what comes now is held.
        (third,) = bench.source.reads(1)
        bench.source.send(bench.source.data(third, random_bytes(UNIT)))
        bench.taken_by_lane(0)
        bench.target.send(bench.target.refusal(writes[0], EIO))
        outcome = bench.end()
        assert ranges(outcome.writes) == [(0, UNIT), (UNIT, 2 * UNIT)]
        held = [(where.start, where.end) for _, where in outcome.unwritten]
        assert held + ranges(outcome.reads) == [(2 * UNIT, 3 * UNIT), (3 * UNIT, 4 * UNIT)]


@EACH_MODE
@pytest.mark.parametrize("count", [1, 15])
def test_the_beginning_of_a_reply_and_then_nothing_is_handed_over(mode: str, count: int) -> None:
    with lane_bench(mode) as bench:
        bench.begin((0, UNIT))
        (asked,) = bench.source.reads(1)
        reply = bench.source.data(asked, random_bytes(UNIT))
        bench.source.send(reply[:count])
        outcome = bench.end()
        assert outcome.source_bytes == reply[:count]
        assert (ranges(outcome.reads), outcome.lost) == ([(0, UNIT)], None)


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_to_what_was_never_asked_is_handed_over(mode: str) -> None:
    with lane_bench(mode) as bench:
        bench.serve_reads(random_bytes(UNIT))
        bench.begin((0, UNIT))
        asked = bench.target.write()
        nonsense = bench.target.ack(type(asked)(asked.command, asked.cookie + 1, asked.start, asked.length))
        bench.target.send(nonsense)
        outcome = bench.end()
        assert outcome.target_bytes == nonsense
        assert ranges(outcome.writes) == [(0, UNIT)]


# -- a connection that ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_unit", [0, SECTOR])
@pytest.mark.parametrize("sent", [0, 1, UNIT // 2])
def test_a_source_that_closes_in_front_of_or_inside_payload_is_lost(sent: int, sparse_unit: int) -> None:
    with lane_bench(sparse_unit=sparse_unit) as bench:
        bench.begin((0, 2 * UNIT))
        asked = bench.source.reads(2)
        reply = bench.source.data(asked[0], random_bytes(UNIT))
        bench.source.send(reply[: len(reply) - UNIT + sent] if sent else b"")
        bench.theirs[0].close()
        outcome = bench.end()
        assert (outcome.lost, outcome.error, outcome.failed_write) == ("source", 0, None)
        assert ranges(outcome.reads) == [(0, UNIT), (UNIT, 2 * UNIT)]
        assert outcome.unwritten == []


def test_a_source_that_is_reset_inside_payload_is_lost_with_its_error() -> None:
    with lane_bench(ends=tcp_ends) as bench:
        bench.begin((0, UNIT))
        (asked,) = bench.source.reads(1)
        bench.source.send(bench.source.data(asked, random_bytes(UNIT))[: UNIT // 2])
        bench.taken_by_lane(0)
        reset(bench.theirs[0])
        outcome = bench.end()
        assert (outcome.lost, outcome.error) == ("source", ECONNRESET)
        assert ranges(outcome.reads) == [(0, UNIT)]


@pytest.mark.parametrize("content", [random_bytes(MIB), b"a" * SECTOR + bytes(SECTOR) + b"b" * (MIB - 2 * SECTOR)])
def test_a_destination_that_closes_inside_a_write_is_lost(content: bytes) -> None:
    with lane_bench(unit=MIB, sparse_unit=SECTOR) as bench:
        bench.serve_reads(content)
        bench.begin((0, MIB))
        asked = bench.target.take_header()
        while asked.length < MIB // 2:  # a socket would hold it
            bench.target.end.recv(asked.length)
            asked = bench.target.take_header()
        bench.theirs[1].close()
        outcome = bench.end()
        assert (outcome.lost, outcome.error, outcome.failed_write) == ("destination", EPIPE, asked.cookie)
        assert outcome.writes[-1].where == asked.where
        assert (outcome.reads, outcome.unwritten) == ([], [])


def test_a_destination_that_closes_between_two_writes_is_lost() -> None:
    with lane_bench() as bench:
        bench.serve_reads(random_bytes(UNIT))
        bench.begin((0, UNIT))
        bench.target.write()
        bench.theirs[1].close()
        outcome = bench.end()
        assert (outcome.lost, outcome.error, outcome.failed_write) == ("destination", 0, None)
        assert ranges(outcome.writes) == [(0, UNIT)]
