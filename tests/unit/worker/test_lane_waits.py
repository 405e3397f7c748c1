"""Which side a lane waits for, as those see it who look at the clock; and how much it leaves unanswered."""

from __future__ import annotations

import math

import pytest

from nbdshard.common.limits import LANE_ROWS_MAX
from nbdshard.worker.stretch import Outcome
from support.images import KIB, MIB, random_bytes
from support.lane_bench import UNIT, lane_bench
from support.waiting import wait_for

SECTOR = 4 * KIB
IN_TURN = (b"a" * SECTOR + bytes(SECTOR)) * (UNIT // SECTOR // 2)


def test_while_the_destination_takes_nothing_no_read_of_the_source_grows_old() -> None:
    content = random_bytes(8 * MIB)
    with lane_bench(unit=MIB) as bench:
        bench.fill_up_soon()
        bench.serve_reads(content)
        bench.begin((0, 8 * MIB))
        bench.until_full()
        wait_for("the destination to be waited for", lambda: bench.lane.oldest_read() == (math.inf, 0))
        assert bench.lane.oldest_write()[0] == bench.now
        bench.serve_writes()
        assert bench.end() == Outcome()


def test_while_half_a_payload_is_awaited_no_write_and_no_flush_grows_old() -> None:
    with lane_bench() as bench:
        bench.begin((0, 4 * UNIT))
        first, second = bench.source.reads(4)[:2]
        bench.source.send(bench.source.data(first, random_bytes(UNIT)))
        assert bench.target.write().start == 0  # whose answer is not sent
        bench.lane.wants_flush = True
        reply = bench.source.data(second, random_bytes(UNIT))
        bench.source.send(reply[: len(reply) // 2])
        wait_for("the source to be waited for", lambda: bench.lane.oldest_write() == (math.inf, 0))
        assert bench.lane.flush_sent == 0.0
        assert bench.lane.oldest_read()[0] == bench.now
        bench.source.send(reply[len(reply) // 2 :])
        wait_for("the first write to age again", lambda: bench.lane.oldest_write()[0] == bench.now)


@pytest.mark.parametrize("content", [random_bytes(UNIT), IN_TURN], ids=["one request", "several in one call"])
def test_a_request_that_finds_no_room_for_its_first_byte_grows_old(content: bytes) -> None:
    """A destination that has answered everything and takes nothing any more would be waited for without end."""
    with lane_bench(sparse_unit=SECTOR, zeroes=True) as bench:
        bench.fill_up()
        bench.serve_reads(content)
        bench.begin((0, UNIT))
        wait_for("the request to be tried", lambda: bench.lane.oldest_write()[0] == 100.0)
        bench.now = 131.0
        looks = len(bench.looks)
        wait_for("it to be tried again", lambda: len(bench.looks) > looks + 1)
        assert bench.lane.oldest_write()[0] == 100.0


def test_a_source_that_says_nothing_is_what_grows_old() -> None:
    with lane_bench() as bench:
        bench.begin((0, 4 * UNIT))
        bench.source.reads(4)
        assert bench.lane.oldest_read() == (bench.now, 4 * UNIT)
        assert bench.lane.oldest_write() == (math.inf, 0)


def test_however_many_requests_are_allowed_a_lane_leaves_no_more_than_a_socket_holds_answers_for() -> None:
    """A server that cannot send its answers reads no requests: both would wait for ever."""
    content = b"".join(random_bytes(SECTOR) + bytes(SECTOR) for _ in range(128))
    with lane_bench(unit=MIB, sparse_unit=SECTOR, rows=1024) as bench:
        bench.serve_reads(content)
        bench.begin((0, MIB))
        most = LANE_ROWS_MAX // 2
        writes = [bench.target.write() for _ in range(most)]
        wait_for("the rows to be used up", lambda: len(bench.lane.stretches_written()) == most)
        for write in writes:
            bench.target.send(bench.target.ack(write))
        for _ in range(128 - most):
            bench.target.send(bench.target.ack(bench.target.write()))
        assert bench.end() == Outcome()
        assert bench.lane.flush_cookie == LANE_ROWS_MAX
