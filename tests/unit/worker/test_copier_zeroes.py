"""The copier alone: block status, and what becomes of zeroes."""

from __future__ import annotations

import pytest

from nbdshard.common.limits import GIB, RETRIES, RETRY_DELAY_SECONDS, ZERO_RUNS_MAX
from nbdshard.common.messages import Counters, EndpointDescription, ErrorReport, Failed, JobOptions, Written
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range
from support.copier_bench import EINVAL, EIO, ENOTSUP, EPOCH, JOB, KIB, Bench

BLOCK = 4 * KIB
CANNOT_ZERO = EndpointDescription("here", 1 << 30, can_flush=True)


def options(**changes: object) -> JobOptions:
    """Requests of four blocks; zero detection by blocks; block status asked."""
    defaults: dict[str, object] = {
        "request_size": 4 * BLOCK,
        "requests": 8,
        "queue_size": 64 * BLOCK,
        "sparse_unit": BLOCK,
    }
    return JobOptions(**(defaults | changes))  # type: ignore[arg-type]


def blocks(start: int, end: int) -> Range:
    return Range(start * BLOCK, end * BLOCK)


def content(pattern: str) -> bytes:
    """A block of zeroes for each "0", of anything for each other letter."""
    return b"".join(bytes(BLOCK) if letter == "0" else letter.encode() * BLOCK for letter in pattern)


# -- block status ------------------------------------------------------------------------------------------------------


def test_block_status_is_asked_of_the_leased_range_before_anything_is_read() -> None:
    bench = Bench(options())
    bench.lease(0, 8 * BLOCK)
    (call,) = bench.source.open
    assert (call.name, call.where) == ("extents", blocks(0, 8))


def test_what_reads_as_zeroes_is_zeroed_and_never_read() -> None:
    bench = Bench(options())
    bench.lease(0, 8 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 4), STATE_ZERO | STATE_HOLE), (blocks(4, 8), 0)])
    bench.answer_all()
    assert bench.source.made("read") == [blocks(4, 8)]
    assert bench.target.made("zero") == [blocks(0, 4)]
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=4 * BLOCK, zeroed=4 * BLOCK))]


def test_a_hole_of_unknown_content_is_read() -> None:
    bench = Bench(options())
    bench.lease(0, 4 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 4), STATE_HOLE)])
    assert bench.source.made("read") == [blocks(0, 4)]


def test_block_status_that_fails_means_data() -> None:
    bench = Bench(options())
    bench.lease(0, 8 * BLOCK)
    bench.answer(bench.source.open[0], EIO)
    assert bench.source.made("read") == [blocks(0, 4), blocks(4, 8)]
    assert bench.source.made("extents") == [blocks(0, 8)]


def test_block_status_that_is_short_is_asked_again_for_the_rest() -> None:
    bench = Bench(options())
    bench.lease(0, 8 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 2), STATE_ZERO)])
    assert bench.source.made("extents") == [blocks(0, 8), blocks(2, 8)]
    bench.answer(bench.source.pending("extents")[0], extents=[(blocks(2, 8), 0)])
    bench.answer_all()
    assert bench.target.made("zero") == [blocks(0, 2)]
    assert bench.source.made("read") == [blocks(2, 4), blocks(4, 8)]


def test_data_moves_while_the_extents_of_the_next_lease_are_asked() -> None:
    bench = Bench(options())
    bench.lease(0, 4 * BLOCK, number=1)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 4), 0)])
    bench.lease(4 * BLOCK, 8 * BLOCK, number=2)
    assert [call.name for call in bench.source.open] == ["read", "extents"]


def test_a_source_without_block_status_is_read() -> None:
    bench = Bench(options(), source=EndpointDescription("there", 1 << 20))
    bench.lease(0, 4 * BLOCK)
    assert [call.name for call in bench.source.open] == ["read"]


# -- zeroes in data ----------------------------------------------------------------------------------------------------


def test_zeroes_in_data_split_the_write() -> None:
    bench = Bench(options(extents=False))
    bench.lease(0, 4 * BLOCK)
    bench.answer(bench.source.open[0], data=content("a0bb"))
    bench.answer_all()
    assert bench.target.made("write") == [blocks(0, 1), blocks(2, 4)]
    assert bench.target.made("zero") == [blocks(1, 2)]
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=3 * BLOCK, zeroed=BLOCK))]


def test_a_read_of_nothing_but_zeroes_writes_nothing_and_frees_its_row_at_once() -> None:
    bench = Bench(options(extents=False, requests=1))
    bench.lease(0, 8 * BLOCK)
    bench.answer(bench.source.open[0], data=content("0000"))
    assert bench.target.calls == []
    assert bench.source.open[0].where == blocks(4, 8)


def test_zeroes_are_looked_for_by_the_unit_that_was_asked_for() -> None:
    bench = Bench(options(extents=False, sparse_unit=2 * BLOCK))
    bench.lease(0, 4 * BLOCK)
    bench.answer(bench.source.open[0], data=content("a00a"))
    assert bench.target.made("write") == [blocks(0, 4)]


def test_zero_detection_can_be_switched_off() -> None:
    bench = Bench(options(extents=False, sparse_unit=0))
    bench.lease(0, 4 * BLOCK)
    bench.answer(bench.source.open[0], data=content("0000"))
    assert bench.target.made("write") == [blocks(0, 4)]


def test_zeroes_are_held_back_until_the_reads_are_over_and_leave_as_one() -> None:
    bench = Bench(options(extents=False))
    bench.lease(0, 12 * BLOCK)
    first, second, third = bench.source.open
    bench.answer(third, data=content("0aaa"))
    bench.answer(first, data=content("aaa0"))
    assert bench.target.made("zero") == []
    bench.answer(second, data=content("0000"))
    assert bench.target.made("zero") == []  # two writes still hold their rows
    for write in list(bench.target.open):
        bench.answer(write)
    assert bench.target.made("zero") == [blocks(3, 9)]


def test_runs_that_are_held_back_are_bounded() -> None:
    bench = Bench(options(extents=True))
    pieces = 2 * ZERO_RUNS_MAX + 4
    bench.lease(0, pieces * BLOCK)
    extents = [(blocks(at, at + 1), STATE_ZERO if at % 2 else 0) for at in range(pieces)]
    bench.answer(bench.source.open[0], extents=extents)
    while bench.source.open and not bench.target.made("zero"):
        bench.answer(bench.source.open[0])
        for call in [call for call in bench.target.open if call.name == "write"]:
            bench.answer(call)
    assert bench.target.made("zero") == [blocks(1, 2)]
    assert bench.source.open
    bench.answer_all()
    assert len(bench.target.made("zero")) == ZERO_RUNS_MAX + 2


def test_more_zeroes_than_one_request_can_carry_leave_as_several() -> None:
    bench = Bench(options())
    bench.lease(0, 3 * GIB)
    while bench.source.open:
        (call,) = bench.source.open
        assert call.where is not None
        bench.answer(call, extents=[(call.where, STATE_ZERO)])
    assert bench.target.made("zero") == [Range(0, GIB), Range(GIB, 2 * GIB), Range(2 * GIB, 3 * GIB)]


# -- by options and by what the destination can ------------------------------------------------------------------------


def test_a_destination_that_is_zero_already_is_left_alone() -> None:
    bench = Bench(options(destination_is_zero=True))
    bench.lease(0, 8 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 4), STATE_ZERO), (blocks(4, 8), 0)])
    bench.answer(bench.source.open[0], data=content("a00a"))
    bench.answer_all()
    assert bench.target.made("zero") == []
    assert bench.target.made("write") == [blocks(4, 5), blocks(7, 8)]
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=2 * BLOCK, skipped=6 * BLOCK))]


def test_allocated_zeroes_leave_no_hole() -> None:
    bench = Bench(options(allocated=True))
    bench.lease(0, 4 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 4), STATE_ZERO)])
    (call,) = bench.target.open
    assert (call.name, call.allocated) == ("zero", True)


def test_a_destination_that_cannot_zero_is_written_zeroes() -> None:
    bench = Bench(options(), destination=CANNOT_ZERO)
    bench.lease(0, 6 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 6), STATE_ZERO)])
    assert [(call.name, call.where) for call in bench.target.open] == [("write", blocks(0, 4)), ("write", blocks(4, 6))]
    assert bench.target.open[1].payload == bytes(2 * BLOCK)
    bench.answer_all()
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(zeroed=6 * BLOCK))]


@pytest.mark.parametrize("error", [ENOTSUP, EINVAL], ids=str)
def test_zeroing_that_is_refused_falls_back_to_writing_zeroes(error: Exception) -> None:
    bench = Bench(options())
    bench.lease(0, 6 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 6), STATE_ZERO)])
    bench.answer(bench.target.open[0], error)  # type: ignore[arg-type]
    assert [(call.name, call.where) for call in bench.target.open] == [("write", blocks(0, 4)), ("write", blocks(4, 6))]
    bench.answer_all()
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(zeroed=6 * BLOCK))]


def test_zeroing_that_fails_is_tried_again_and_then_fails_the_lease() -> None:
    bench = Bench(options())
    bench.lease(0, 4 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 4), STATE_ZERO)])
    for attempt in range(RETRIES + 1):
        assert bench.target.made("zero") == [blocks(0, 4)] * (attempt + 1)
        bench.answer(bench.target.open[0], EIO)
        bench.pump(RETRY_DELAY_SECONDS * (1 << attempt))
    text = f"destination here: zero of {4 * BLOCK} bytes at offset 0 failed 5 times: EIO"
    report = ErrorReport("request", text, "destination", "here", 0, 4 * BLOCK, "EIO")
    assert bench.told(Failed) == [Failed(JOB, EPOCH, 1, report)]


def test_zeroing_in_several_requests_may_be_refused_in_one_and_fail_in_another() -> None:
    bench = Bench(options(request_size=32 << 20))
    bench.lease(0, 2 * GIB)
    while bench.source.open:
        (call,) = bench.source.open
        assert call.where is not None
        bench.answer(call, extents=[(call.where, STATE_ZERO)])
    first, second = bench.target.open
    bench.answer(first, ENOTSUP)
    bench.answer(second, EIO)
    bench.pump(1.0)
    bench.answer_all()
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(zeroed=2 * GIB))]


def test_synchronous_zeroes_in_its_turn_before_the_next_read() -> None:
    bench = Bench(options(synchronous=True))
    bench.lease(0, 8 * BLOCK)
    bench.answer(bench.source.open[0], extents=[(blocks(0, 4), STATE_ZERO), (blocks(4, 8), 0)])
    assert bench.source.open == []
    assert bench.target.made("zero") == [blocks(0, 4)]
    bench.answer(bench.target.open[0])
    assert bench.source.made("read") == [blocks(4, 8)]
