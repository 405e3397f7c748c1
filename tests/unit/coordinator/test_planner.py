"""The planner: what cannot be copied, and how the rest is cut up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from msgspec.structs import replace as replace_record

from nbdshard.common.errors import UserError
from nbdshard.common.limits import GIB, KIB, MIB
from nbdshard.common.messages import EndpointDescription
from nbdshard.coordinator.planner import OFFSET_MAX, Plan, check_job
from support.schedules import OPTIONS, job, server

STREAM = EndpointDescription(peer="standard input", size=None, is_stream=True)
NULL = EndpointDescription(peer="null:", size=None, can_multi_conn=True)
SYNCHRONOUS = replace_record(OPTIONS, synchronous=True)


def lengths(plan: Plan, most: float | None = None) -> list[int]:
    """The ranges of the whole export, handed out in order, `most` bytes at a time."""
    found, start = [], 0
    while start < plan.bound:
        found.append(plan.next_length(plan.bound - start, start, plan.bound, most=most))
        start += found[-1]
    return found


# -- what cannot be done -----------------------------------------------------------------------------------------------


def refusal(source: EndpointDescription, destination: EndpointDescription) -> str:
    with pytest.raises(UserError) as caught:
        check_job(job(), source, destination)
    return str(caught.value)


def test_a_smaller_destination_is_refused() -> None:
    assert refusal(server(100), server(99)) == (
        "nbd://server: the destination is smaller than the source: 99 bytes, 100 are needed"
    )


def test_a_read_only_destination_is_refused() -> None:
    assert refusal(server(100), server(100, read_only=True)) == "nbd://server: the destination is read-only"


def test_a_source_tail_that_its_block_size_makes_unreachable_is_refused() -> None:
    assert refusal(server(4097, block_minimum=4096), server(8192)) == (
        "nbd://server: the tail of 1 bytes is unreachable: the size of 4097 bytes is not a multiple of the minimum "
        "block size 4096"
    )


def test_a_tail_without_room_for_a_whole_block_of_the_destination_is_refused() -> None:
    assert refusal(server(1000), server(1023, block_minimum=512)) == (
        "nbd://server: the tail of 488 bytes cannot be written: the minimum block size is 512 and the size of "
        "1023 bytes leaves no room for a whole block"
    )


def test_a_tail_with_room_for_a_whole_block_of_the_destination_is_taken() -> None:
    assert check_job(job(), server(1000), server(1024, block_minimum=512)).size == 1000


@pytest.mark.parametrize("minimum", [0, 3, 4095])
def test_a_minimum_block_size_that_is_no_power_of_two_is_refused(minimum: int) -> None:
    text = f"nbd://server: the minimum block size {minimum} is not a power of two"
    assert refusal(server(4096, block_minimum=minimum), server(4096)) == text
    assert refusal(server(4096), server(4096, block_minimum=minimum)) == text


def test_a_stream_into_a_destination_of_size_0_is_refused() -> None:
    assert refusal(STREAM, server(0)) == "nbd://server: the destination has no room: its size is 0"


@pytest.mark.parametrize("size", [0, 5])
def test_a_destination_that_grows_may_be_smaller(size: int) -> None:
    assert check_job(job(destination_grows=True), server(100), server(size)).size == 100


def test_null_takes_any_size() -> None:
    assert check_job(job(), server(100 * GIB), NULL).size == 100 * GIB


def test_an_empty_export_is_a_valid_copy_of_nothing() -> None:
    plan = check_job(job(), server(0), server(0))
    assert (plan.size, plan.worker_count, lengths(plan)) == (0, 1, [])


# -- how many workers and connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (31 * MIB, 1), (32 * MIB, 2), (100 * MIB, 4), (100 * GIB, 4)])
def test_a_small_copy_gets_fewer_workers(size: int, workers: int) -> None:
    assert check_job(job(workers=4), server(size), server(size)).worker_count == workers


def test_no_more_workers_than_connections() -> None:
    assert check_job(job(workers=9, connections=3), server(GIB), server(GIB)).worker_count == 3


def test_a_range_size_chosen_by_the_user_lets_small_copies_have_workers() -> None:
    plan = check_job(job(workers=4, range_size=100_000), server(MIB), server(MIB))
    assert (plan.worker_count, plan.range_size) == (4, 128 * KIB)
    assert lengths(plan) == [128 * KIB] * 8


def test_one_writer_is_fed_by_all_the_source_connections() -> None:
    plan = check_job(job(workers=4), server(GIB), server(GIB, can_multi_conn=False))
    assert (plan.single_writer, plan.worker_count, plan.source_limit, plan.destination_limit) == (True, 1, 4, 1)


def test_a_source_without_multi_conn_is_read_by_one_worker() -> None:
    plan = check_job(job(workers=4), server(GIB, can_multi_conn=False), server(GIB))
    assert (plan.single_writer, plan.worker_count, plan.source_limit, plan.destination_limit) == (False, 1, 1, 4)


def test_synchronous_means_one_worker_one_connection_and_whole_ranges() -> None:
    plan = check_job(job(workers=4, options=SYNCHRONOUS), server(GIB), server(GIB))
    assert (plan.in_order, plan.repeatable, plan.worker_count) == (True, True, 1)
    assert (plan.source_limit, plan.destination_limit) == (1, 1)
    assert lengths(plan) == [128 * MIB] * 8


def test_a_stream_source_is_one_range_without_a_known_end() -> None:
    plan = check_job(job(workers=4), STREAM, NULL)
    assert (plan.size, plan.bound, plan.worker_count, plan.in_order, plan.repeatable) == (
        None,
        OFFSET_MAX,
        1,
        True,
        False,
    )
    assert lengths(plan) == [OFFSET_MAX]


def test_a_stream_source_is_bounded_by_the_destination() -> None:
    assert check_job(job(), STREAM, server(10 * MIB)).bound == 10 * MIB


def test_a_stream_is_not_let_into_the_unwritable_tail_of_the_destination() -> None:
    assert check_job(job(), STREAM, server(10_000, block_minimum=4096)).bound == 8192


def test_a_stream_into_less_than_one_block_is_refused() -> None:
    assert "4095 bytes is less than its minimum block size 4096" in refusal(STREAM, server(4095, block_minimum=4096))


def test_a_stream_into_a_file_is_not_bounded_by_its_old_size() -> None:
    assert check_job(job(destination_grows=True), STREAM, server(10)).bound == OFFSET_MAX


def test_a_stream_destination_is_written_in_order_and_only_once() -> None:
    plan = check_job(job(workers=4, destination_grows=True), server(GIB), STREAM)
    assert (plan.in_order, plan.repeatable, plan.worker_count) == (True, False, 1)


# -- the ranges --------------------------------------------------------------------------------------------------------


def test_the_tail_is_split_so_that_workers_finish_together() -> None:
    plan = check_job(job(workers=2), server(GIB + 100), server(GIB + 100))
    in_mib = [128] * 5 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 3 + [4] * 5
    assert lengths(plan)[:-1] == [length * MIB for length in in_mib]
    assert lengths(plan)[-1] == 4 * MIB + 100


def test_a_small_export_gets_several_ranges_for_each_worker() -> None:
    plan = check_job(job(workers=4), server(256 * MIB), server(256 * MIB))
    assert plan.range_size == 16 * MIB


def test_the_unit_of_ranges_follows_the_larger_minimum_block_size() -> None:
    plan = check_job(job(range_size=1), server(MIB), server(MIB, block_minimum=128 * KIB))
    assert (plan.alignment, plan.granularity, plan.range_size) == (128 * KIB, 128 * KIB, 128 * KIB)


@given(
    size=st.integers(1, 4 * GIB),
    workers=st.integers(1, 40),
    connections=st.integers(1, 40),
    range_size=st.one_of(st.none(), st.integers(16 * MIB, 2 * GIB)),
    minimums=st.tuples(st.sampled_from([1, 512, 65536]), st.sampled_from([1, 4096, 1 << 20])),
)
def test_ranges_are_aligned_bounded_and_cover_every_byte(
    size: int, workers: int, connections: int, range_size: int | None, minimums: tuple[int, int]
) -> None:
    size = -(-size // minimums[0]) * minimums[0]
    what = replace(job(), workers=workers, connections=connections, range_size=range_size)
    source, destination = server(size, block_minimum=minimums[0]), server(8 * GIB, block_minimum=minimums[1])
    plan = check_job(what, source, destination)
    found = lengths(plan)
    assert sum(found) == size
    assert all(length % plan.granularity == 0 for length in found[:-1])
    assert all(plan.granularity <= length <= plan.range_size for length in found[:-1])
    assert found[-1] < plan.range_size + plan.granularity
    assert 1 <= plan.worker_count <= min(workers, connections)
    assert plan.source_limit <= connections
    assert plan.destination_limit <= connections
    assert plan.worker_count <= min(plan.source_limit, plan.destination_limit)


# -- what is slow ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    size=st.integers(0, 300 * MIB),
    workers=st.integers(1, 9),
    minimum=st.sampled_from([1, 4096, 256 * KIB]),
    request_size=st.sampled_from([64 * KIB, 300 * KIB, MIB, 32 * MIB]),
    most=st.floats(0, 400 * MIB),
)
def test_parts_of_ranges_are_cut_where_every_server_allows_it(
    size: int, workers: int, minimum: int, request_size: int, most: float
) -> None:
    size -= size % minimum
    end = server(size, block_minimum=minimum)
    what = job(workers=workers, connections=workers, options=replace(OPTIONS, request_size=request_size))
    plan = check_job(what, end, end)
    parts, start = lengths(plan, most), 0
    assert sum(parts) == size
    for part in parts:
        assert start % max(64 * KIB, minimum) == 0
        assert part <= max(most, plan.lease_size_min) + plan.granularity
        last = start + part - 1
        is_rest = start + part == size
        assert is_rest or start // plan.range_size == last // plan.range_size, "no part crosses a range's end"
        start += part


def test_the_smallest_part_is_a_request_or_the_whole_of_a_smaller_range() -> None:
    end = server(GIB)
    assert lengths(check_job(job(), end, end), 0)[0] == OPTIONS.request_size
    assert check_job(job(range_size=64 * KIB), end, end).lease_size_min == 64 * KIB
