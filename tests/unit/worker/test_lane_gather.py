"""A payload that is data and zeroes in turn leaves as WRITEs and WRITE_ZEROES together, in few calls."""

from __future__ import annotations

from collections.abc import Callable
from errno import ENOSPC, EPIPE

import pytest

from nbdshard.common.limits import LANE_GATHER_SHARE
from nbdshard.worker.lane_payload import rest_of
from nbdshard.worker.stretch import Outcome
from support.doubles import CMD_WRITE, CMD_WRITE_ZEROES, EIO
from support.images import KIB, MIB, random_bytes
from support.lane_bench import EXPIRES, MODES, UNIT, Asked, LaneBench, lane_bench, ranges
from support.listening import receive_exactly
from support.pipes import Ends, tcp_ends, unix_ends
from support.waiting import wait_for

SECTOR = 4 * KIB  # the unit of zero detection


def in_turn(length: int, *, step: int = SECTOR, first: int = 0) -> bytes:
    """Data and zeroes in turn, `step` bytes of each; `first`: 1 if it begins with zeroes."""
    content = bytearray(random_bytes(length))
    for start in range((1 - first) * step, length, 2 * step):
        end = min(length, start + step)
        content[start:end] = bytes(end - start)
    return bytes(content)


def kinds(asked: list[Asked]) -> list[tuple[int, int, int]]:
    return [(each.command, each.start, each.length) for each in asked]


# -- what is sent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("rows", [4, 16, 128])
@pytest.mark.parametrize("ends", [unix_ends, tcp_ends], ids=["unix", "tcp"])
@pytest.mark.parametrize("mode", MODES)
def test_data_and_zeroes_in_turn_arrive_as_they_are(mode: str, ends: Callable[[], Ends], rows: int, first: int) -> None:
    end = 6 * UNIT + SECTOR + 77
    content = in_turn(end, first=first)
    with lane_bench(mode, sparse_unit=SECTOR, rows=rows, ends=ends, zeroes=True) as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((0, 3 * UNIT), (3 * UNIT, end))
        assert bench.end() == Outcome()
        assert bench.store(end) == content
        assert [stretch.zeroes for stretch in bench.stretches] == [[], []]
        assert sum(stretch.zeroed for stretch in bench.stretches) == sum(
            each.length for each in bench.written if each.command == CMD_WRITE_ZEROES
        )
        assert bench.lane.copied == sum(each.length for each in bench.written if each.command == CMD_WRITE)


def test_more_runs_than_go_into_one_call_arrive() -> None:
    content = in_turn(MIB)
    assert MIB // SECTOR > 2 * (128 // 2 // LANE_GATHER_SHARE)
    with lane_bench(unit=MIB, sparse_unit=SECTOR, rows=128, zeroes=True) as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((0, MIB))
        assert bench.end() == Outcome()
        assert bench.store(MIB) == content
        assert len(bench.written) == MIB // SECTOR


def test_requests_of_one_payload_come_in_order_and_a_payload_of_zeroes_is_left() -> None:
    with lane_bench(sparse_unit=SECTOR, zeroes=True) as bench:
        content = bytes(SECTOR) + b"a" * SECTOR + bytes(UNIT - 3 * SECTOR) + b"b" * SECTOR + bytes(UNIT)
        bench.serve_reads(content)
        bench.begin((0, 2 * UNIT))
        asked = [bench.target.take() for _ in range(4)]
        assert kinds(asked) == [
            (CMD_WRITE_ZEROES, 0, SECTOR),
            (CMD_WRITE, SECTOR, SECTOR),
            (CMD_WRITE_ZEROES, 2 * SECTOR, UNIT - 3 * SECTOR),
            (CMD_WRITE, UNIT - SECTOR, SECTOR),
        ]
        bench.target.send(*map(bench.target.ack, asked))
        assert bench.end() == Outcome()
        (stretch,) = bench.stretches
        assert stretch.zeroes == [(UNIT, 2 * UNIT)]
        assert (stretch.copied, stretch.zeroed) == (2 * SECTOR, UNIT - 2 * SECTOR)


def test_a_destination_that_takes_little_at_a_time_gets_it_all() -> None:
    content = in_turn(4 * MIB, step=64 * KIB)
    with lane_bench(unit=MIB, sparse_unit=SECTOR, rows=128, zeroes=True) as bench:
        bench.fill_up_soon()
        bench.serve_reads(content)
        bench.begin((0, 4 * MIB))
        bench.until_full()
        bench.serve_writes()
        assert bench.end() == Outcome()
        assert bench.store(4 * MIB) == content


def test_what_went_through_memory_does_not_count_as_spliced() -> None:
    content = random_bytes(4 * UNIT) + in_turn(4 * UNIT)
    with lane_bench(sparse_unit=SECTOR, zeroes=True) as bench:
        bench.serve_reads(content)
        bench.serve_writes()
        bench.begin((0, 4 * UNIT), (4 * UNIT, 8 * UNIT))  # the same rows, one after the other
        assert bench.end() == Outcome()
        dense, fragments = bench.stretches
        assert (dense.spliced, fragments.spliced) == (4 * UNIT, 0)
        assert (fragments.copied, fragments.zeroed) == (2 * UNIT, 2 * UNIT)


def test_a_call_leaves_rows_for_the_next_before_it_is_answered() -> None:
    with lane_bench(sparse_unit=SECTOR, rows=32, zeroes=True) as bench:  # as many as two payloads have runs
        bench.serve_reads(in_turn(2 * UNIT))
        bench.begin((0, 2 * UNIT))
        asked = [bench.target.take() for _ in range(32)]  # nothing is answered yet
        bench.target.send(*map(bench.target.ack, asked))
        assert bench.end() == Outcome()


@pytest.mark.parametrize("count", range(8))
def test_what_is_left_of_several_pieces(count: int) -> None:
    pieces = [b"ab", memoryview(b"c"), b"", memoryview(b"defg")]
    assert b"".join(rest_of(pieces, count)) == b"abcdefg"[count:]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("failing", range(4))
def test_a_request_that_fails_ends_the_loan_with_all_that_follow_it(mode: str, failing: int) -> None:
    content = in_turn(4 * SECTOR)
    with lane_bench(mode, sparse_unit=SECTOR, zeroes=True) as bench:
        bench.serve_reads(content)
        bench.begin((0, 4 * SECTOR))
        asked = [bench.target.take() for _ in range(4)]
        replies = [bench.target.ack(each) for each in asked]
        replies[failing] = bench.target.refusal(asked[failing], ENOSPC if failing % 2 else EIO)
        bench.target.send(*replies)
        outcome = bench.end()
        assert outcome.target_bytes == b"".join(replies[failing:])
        assert [(each.cookie, each.is_zero) for each in outcome.writes] == [
            (each.cookie, each.command == CMD_WRITE_ZEROES) for each in asked[failing:]
        ]
        assert ranges(outcome.writes) == [(each.start, each.start + each.length) for each in asked[failing:]]


def stuck(bench: LaneBench, content: bytes) -> None:
    """Some of the requests of one payload have left, and there is no room for the rest."""
    bench.fill_up_soon()
    bench.serve_reads(content)
    bench.begin((0, MIB))
    bench.until_full()


def test_a_lease_that_ends_among_the_requests_sends_no_more_of_them() -> None:
    with lane_bench(unit=MIB, sparse_unit=SECTOR, rows=128, zeroes=True) as bench:
        stuck(bench, in_turn(MIB, step=64 * KIB))
        bench.now = EXPIRES
        outcome = bench.end()
        assert outcome.is_late
        assert ranges(outcome.writes) == [(start, start + 64 * KIB) for start in range(0, MIB, 64 * KIB)]
        sent = bench.untaken()
        assert 0 < sent < MIB // 2
        receive_exactly(bench.target.end, sent)
        assert bench.untaken() == 0  # there is room now, and nothing more comes


def test_a_lease_that_is_renewed_among_the_requests_sends_the_rest() -> None:
    content = in_turn(MIB, step=64 * KIB)
    with lane_bench(unit=MIB, sparse_unit=SECTOR, rows=128, zeroes=True) as bench:
        stuck(bench, content)
        bench.lease.expires = EXPIRES + 10.0
        bench.now = EXPIRES
        bench.serve_writes()
        assert bench.end() == Outcome()
        assert bench.store(MIB) == content


def test_a_lease_that_ends_in_front_of_the_requests_leaves_the_payload_to_be_read_again() -> None:
    with lane_bench(sparse_unit=SECTOR, zeroes=True) as bench:
        bench.begin((0, UNIT))
        (asked,) = bench.source.reads(1)
        bench.now = EXPIRES
        bench.source.send(bench.source.data(asked, in_turn(UNIT)))
        outcome = bench.end()
        assert (outcome.is_late, outcome.writes, bench.untaken()) == (False, [], 0)
        assert [(where.start, where.end) for _, where in outcome.unwritten] == [(0, UNIT)]


def test_a_lease_that_ends_between_two_calls_leaves_what_the_second_would_have_sent() -> None:
    with lane_bench(sparse_unit=SECTOR, rows=8, zeroes=True) as bench:  # four of them with payload
        bench.begin((0, UNIT))
        (asked,) = bench.source.reads(1)
        bench.source.send(bench.source.data(asked, in_turn(UNIT)))
        first = [bench.target.take() for _ in range(8)]
        bench.now = EXPIRES
        bench.target.send(*map(bench.target.ack, first))
        outcome = bench.end()
        assert (outcome.is_late, outcome.writes, bench.untaken()) == (False, [], 0)
        assert [(where.start, where.end) for _, where in outcome.unwritten] == [(8 * SECTOR, UNIT)]
        assert (bench.stretches[0].copied, bench.stretches[0].zeroed) == (4 * SECTOR, 4 * SECTOR)


def test_a_destination_that_closes_among_the_requests_is_lost() -> None:
    with lane_bench(unit=MIB, sparse_unit=SECTOR, rows=128, zeroes=True) as bench:
        stuck(bench, in_turn(MIB, step=64 * KIB))
        bench.theirs[1].close()
        outcome = bench.end()
        assert (outcome.lost, outcome.error) == ("destination", EPIPE)
        assert ranges(outcome.writes) == [(start, start + 64 * KIB) for start in range(0, MIB, 64 * KIB)]
        assert (outcome.reads, outcome.unwritten) == ([], [])


def test_requests_show_before_the_clock_is_looked_at_for_them() -> None:
    with lane_bench(sparse_unit=SECTOR, zeroes=True) as bench:
        bench.begin((0, 4 * SECTOR))
        (asked,) = bench.source.reads(1)
        wait_for("the lane to be quiet", lambda: bench.lane.oldest_read()[1] > 0)
        looks = len(bench.looks)
        bench.source.send(bench.source.data(asked, in_turn(4 * SECTOR)))
        written = [bench.target.take() for _ in range(4)]
        assert 4 in bench.looks[looks:]
        bench.target.send(*map(bench.target.ack, written))
        assert bench.end() == Outcome()
