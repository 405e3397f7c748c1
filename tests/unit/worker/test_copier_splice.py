"""The copier alone, with payload in real pipes: what is spliced, what is not, and what becomes of it if things fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import (
    KIB,
    RETRIES,
    RETRY_DELAY_SECONDS,
    SPLICE_BYTES_MIN,
    SPLICED_BYTES_PER_SECOND,
    SPLICED_PER_CONNECTION,
)
from nbdshard.common.messages import EndpointDescription, ErrorReport, Failed, JobOptions, Written
from nbdshard.common.ranges import Range
from nbdshard.worker.plumbing import SystemPlumbing
from support.copier_bench import EIO, Bench, path_of, splicing
from support.images import random_bytes
from support.piped import Counted, Shallow

SIZE = SPLICE_BYTES_MIN  # of every request
UNIT = 4 * KIB  # of zero detection, where there is any
DENSE = random_bytes(SIZE)
ZEROES = bytes(SIZE)
MIXED = DENSE[: SIZE // 2] + bytes(SIZE // 2)


@contextlib.contextmanager
def bench(
    plumbing: SystemPlumbing | None = None,
    *,
    requests: int = 2,
    sparse_unit: int = 0,
    sources: int = 1,
    block_minimum: int = 1,
    **changes: object,
) -> Iterator[Bench]:
    """Requests of SIZE bytes, all of it data."""
    options = JobOptions(
        request_size=SIZE, requests=requests, queue_size=64 * SIZE, sparse_unit=sparse_unit, extents=False
    )
    destination = EndpointDescription("here", 1 << 30, can_zero=True, can_flush=True, block_minimum=block_minimum)
    with splicing(SIZE, plumbing) as pipes:
        yield Bench(options, destination=destination, splicing=pipes, sources=sources, **changes)  # type: ignore[arg-type]


def paths(one: Bench) -> list[str]:
    """Where the payload of the reads was to go, in the order they were asked."""
    return [path_of(call) for call in one.source.calls]


def read(one: Bench, data: bytes = DENSE) -> None:
    """The oldest read succeeds."""
    one.answer(one.source.pending("read")[0], data=data)


# -- what is spliced --------------------------------------------------------------------------------------------------


def test_what_was_read_into_a_pipe_is_written_from_it() -> None:
    with bench() as one:
        one.lease(0, SIZE)
        (asked,) = one.source.open
        assert path_of(asked) == "pipe"
        read(one)
        (write,) = one.target.open
        assert write.piped is asked.piped
        assert one.target.made("write") == [Range(0, SIZE)]
        one.answer(write)
        assert write.payload == DENSE


def test_no_write_is_queued_before_all_of_the_payload_is_in_the_pipe() -> None:
    with bench() as one:
        one.lease(0, SIZE)
        (asked,) = one.source.open
        listener = one.source.listener
        assert asked.piped is not None and listener is not None and one.splicing is not None
        listener.sent(asked.handle)
        listener.arriving(asked.handle)
        one.splicing.source.fill(asked.piped, DENSE)
        one.pump()
        assert one.target.calls == []
        listener.done(asked.handle, None, SIZE, None)
        assert len(one.target.calls) == 1


def test_a_pipe_is_used_again_when_its_write_is_confirmed() -> None:
    plumbing = Counted()
    with bench(plumbing) as one:
        one.lease(0, 6 * SIZE)
        for _ in range(3):
            assert paths(one)[-2:] == ["pipe", "pipe"]
            read(one)
            read(one)
            assert len(plumbing.pipes) == 2
            for write in list(one.target.open):
                one.answer(write)
                assert write.payload == DENSE
        assert len(plumbing.pipes) == 2
        assert all(pipe.held == 0 for pipe in plumbing.pipes)
        assert len(one.told(Written)) == 1


def test_no_more_operations_are_under_way_than_stay_in_the_cache() -> None:
    with bench(requests=64) as one:
        one.lease(0, 64 * SIZE)
        assert paths(one) == ["pipe"] * SPLICED_PER_CONNECTION


def test_a_source_that_is_slow_to_answer_is_asked_for_more_at_a_time() -> None:
    with bench(requests=64) as one:
        one.lease(0, 128 * SIZE)
        assert one.source.listener is not None
        one.source.listener.sent(one.source.open[0].handle)
        one.pump(30 * SIZE / SPLICED_BYTES_PER_SECOND)
        one.source.listener.arriving(one.source.open[0].handle)
        one.pump()
        assert paths(one) == ["pipe"] * 30


def test_each_connection_has_pipes_of_its_own() -> None:
    plumbing = Counted()
    with bench(plumbing, requests=3, sources=2) as one:
        one.lease(0, 64 * SIZE)
        assert len(plumbing.pipes) == 6


def test_short_payload_goes_through_a_buffer() -> None:
    with bench() as one:
        one.lease(SIZE - UNIT, 2 * SIZE + UNIT)
        one.answer_all()
        assert one.source.made("read") == [
            Range(SIZE - UNIT, SIZE),
            Range(SIZE, 2 * SIZE),
            Range(2 * SIZE, 2 * SIZE + UNIT),
        ]
        assert paths(one) == ["buffer", "pipe", "buffer"]


def test_payload_that_is_put_together_with_the_end_of_a_block_goes_through_a_buffer() -> None:
    with bench(block_minimum=2 * SIZE) as one:  # so requests are that long, and the last one is worth splicing
        one.lease(0, 3 * SIZE + 1)
        assert paths(one) == ["pipe", "buffer"]
        assert one.source.made("read") == [Range(0, 2 * SIZE), Range(2 * SIZE, 3 * SIZE + 1)]


def test_where_a_side_cannot_splice_everything_goes_through_buffers() -> None:
    options = JobOptions(request_size=SIZE, requests=2, queue_size=64 * SIZE, sparse_unit=0, extents=False)
    one = Bench(options)
    one.lease(0, 2 * SIZE)
    assert paths(one) == ["buffer", "buffer"]


def test_where_no_pipe_can_be_had_a_buffer_does() -> None:
    plumbing = Counted(open_max=1)
    with bench(plumbing, requests=4) as one:
        one.lease(0, 8 * SIZE)
        assert paths(one) == ["pipe", "buffer", "buffer", "buffer"]
        assert one.splicing is not None
        assert one.splicing.pipes.limited == "no more than 1 pipes can be opened"
        read(one)
        one.answer(one.target.open[0])
        assert paths(one)[4:] == ["pipe"]  # the one there is goes on being used
        read(one)
        one.answer(one.target.open[0])
        assert paths(one)[5:] == ["buffer"]
        one.answer_all()
        assert len(one.told(Written)) == 1
    assert plumbing.attempts == 2


def test_what_was_spliced_is_counted_when_it_is_acknowledged() -> None:
    with bench() as one:
        one.lease(0, 2 * SIZE + 100)
        read(one)
        assert one.copier.leases[1].counters.spliced == 0
        one.answer(one.target.open[0])
        assert (one.copier.leases[1].copied, one.copier.leases[1].spliced) == (SIZE, SIZE)
        one.answer_all()
        (written,) = one.told(Written)
        assert isinstance(written, Written)
        assert (written.done.copied, written.done.spliced) == (2 * SIZE + 100, 2 * SIZE)


# -- reads that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("came", [b"", DENSE[: SIZE // 2], DENSE], ids=["nothing", "half of it", "all of it"])
def test_a_failed_read_is_asked_again_into_a_buffer_and_its_pipe_is_used_by_others(came: bytes) -> None:
    plumbing = Counted()
    with bench(plumbing, requests=1) as one:
        one.lease(0, 2 * SIZE)
        (first,) = one.source.open
        one.answer(first, EIO, data=came)
        (pipe,) = plumbing.pipes
        assert pipe.held == 0
        assert one.source.made("read") == [Range(0, SIZE)]
        one.pump(RETRY_DELAY_SECONDS)
        assert one.source.made("read") == [Range(0, SIZE)] * 2
        assert paths(one) == ["pipe", "buffer"]
        read(one)
        assert path_of(one.target.open[0]) == "buffer"
        one.answer(one.target.open[0])
        assert one.target.calls[0].payload == DENSE
        assert paths(one)[2:] == ["pipe"]
        read(one, DENSE[::-1])
        one.answer(one.target.open[0])
        assert one.target.calls[1].payload == DENSE[::-1]  # and nothing that was left in it
        assert plumbing.attempts == 1


def test_reads_that_fail_for_ever_fail_the_lease_and_leave_no_pipe_behind() -> None:
    plumbing = Counted()
    with bench(plumbing, requests=1) as one:
        one.lease(0, SIZE, seconds=1000.0)
        for attempt in range(RETRIES + 1):
            one.answer(one.source.open[0], EIO, data=DENSE[:1000] if attempt == 0 else b"")
            one.pump(10.0)
        assert paths(one) == ["pipe"] + ["buffer"] * RETRIES
        (failed,) = one.told(Failed)
        assert isinstance(failed, Failed)
        assert failed.error.side == "source"
        assert one.target.calls == []
        assert [pipe.held for pipe in plumbing.pipes] == [0]
        assert one.copier.idle


# -- writes that fail -------------------------------------------------------------------------------------------------


def test_what_a_failed_write_has_lost_is_read_again_into_a_buffer_and_written_from_there() -> None:
    with bench(requests=1) as one:
        one.lease(0, SIZE)
        read(one)
        one.answer(one.target.open[0], EIO)
        assert len(one.source.calls) == 1  # not at once
        one.pump(RETRY_DELAY_SECONDS)
        assert one.source.made("read") == [Range(0, SIZE)] * 2
        assert paths(one) == ["pipe", "buffer"]
        read(one, DENSE[::-1])  # the source may have changed: what is written is what was read last
        assert path_of(one.target.open[0]) == "buffer"
        one.answer(one.target.open[0])
        assert one.target.calls[1].payload == DENSE[::-1]
        (written,) = one.told(Written)
        assert isinstance(written, Written)
        assert (written.done.copied, written.done.spliced) == (SIZE, 0)


def test_a_write_that_fails_from_the_buffer_too_is_sent_again_without_another_read() -> None:
    with bench(requests=1) as one:
        one.lease(0, SIZE, seconds=1000.0)
        read(one)
        one.answer(one.target.open[0], EIO)
        one.pump(10.0)
        read(one)
        one.answer(one.target.open[0], EIO)
        one.pump(10.0)
        assert len(one.source.calls) == 2
        one.answer(one.target.open[0])
        assert one.target.calls[-1].payload == DENSE
        assert len(one.told(Written)) == 1


def test_writes_that_fail_for_ever_are_counted_together_spliced_or_not() -> None:
    with bench(requests=1) as one:
        one.lease(0, SIZE, seconds=1000.0)
        read(one)
        one.answer(one.target.open[0], EIO)
        one.pump(10.0)
        read(one)
        for _ in range(RETRIES):
            one.answer(one.target.open[0], EIO)
            one.pump(10.0)
        assert len(one.target.calls) == RETRIES + 1
        assert [path_of(call) for call in one.target.calls] == ["pipe"] + ["buffer"] * RETRIES
        (failed,) = one.told(Failed)
        assert isinstance(failed, Failed)
        assert failed.error.text == (
            f"destination here: write of {SIZE} bytes at offset 0 failed {RETRIES + 1} times: EIO"
        )
        assert one.copier.idle


def test_a_pause_before_another_try_doubles_whether_the_read_or_the_write_is_repeated() -> None:
    with bench(requests=1) as one:
        one.lease(0, SIZE)
        read(one)
        one.answer(one.target.open[0], EIO)
        assert one.copier.deadline() == pytest.approx(one.now + RETRY_DELAY_SECONDS)
        one.pump(RETRY_DELAY_SECONDS)
        read(one)
        one.answer(one.target.open[0], EIO)
        assert one.copier.deadline() == pytest.approx(one.now + 2 * RETRY_DELAY_SECONDS)


def test_a_read_that_fails_after_a_lost_write_has_tries_of_its_own() -> None:
    with bench(requests=1) as one:
        one.lease(0, SIZE, seconds=1000.0)
        read(one)
        one.answer(one.target.open[0], EIO)
        for _ in range(RETRIES):
            one.pump(10.0)
            one.answer(one.source.open[0], EIO)
        one.pump(10.0)
        read(one)
        for _ in range(RETRIES - 1):
            one.answer(one.target.open[0], EIO)
            one.pump(10.0)
        assert one.told(Failed) == []
        one.answer(one.target.open[0])
        assert one.target.calls[-1].payload == DENSE
        assert len(one.told(Written)) == 1


def test_zeroes_found_in_what_had_to_be_read_again_are_not_written() -> None:
    with bench(requests=1, sparse_unit=UNIT) as one:
        one.lease(0, SIZE)
        read(one)
        one.answer(one.target.open[0], EIO)
        one.pump(RETRY_DELAY_SECONDS)
        read(one, MIXED)
        one.answer(one.target.pending("write")[0])
        assert one.target.made("write") == [Range(0, SIZE), Range(0, SIZE // 2)]
        assert one.target.made("zero") == [Range(SIZE // 2, SIZE)]


# -- leases that end --------------------------------------------------------------------------------------------------


def test_an_expired_lease_writes_nothing_and_gives_its_pipes_back() -> None:
    plumbing = Counted()
    with bench(plumbing) as one:
        one.lease(0, 2 * SIZE, seconds=10.0)
        one.pump(10.0)
        read(one)
        read(one)
        assert one.target.calls == []
        assert [pipe.held for pipe in plumbing.pipes] == [0, 0]
        (failed,) = one.told(Failed)
        assert isinstance(failed, Failed)
        assert failed.error.text == "the lease expired"
        one.lease(2 * SIZE, 3 * SIZE, number=2)
        assert paths(one)[2:] == ["pipe"]
        assert plumbing.attempts == 2


def test_a_lease_revoked_while_its_payload_arrives_gives_its_pipes_back() -> None:
    plumbing = Counted()
    with bench(plumbing) as one:
        one.lease(0, 2 * SIZE)
        one.copier.revoke(1)
        read(one)
        one.answer(one.source.open[0], EIO, data=DENSE[:5000])
        assert [pipe.held for pipe in plumbing.pipes] == [0, 0]
        assert one.target.calls == []
        assert one.copier.idle


def test_a_lease_revoked_while_its_payload_leaves_waits_for_that() -> None:
    plumbing = Counted()
    with bench(plumbing, requests=1) as one:
        one.lease(0, 2 * SIZE)
        read(one)
        one.copier.revoke(1)
        assert not one.copier.idle
        assert [pipe.held for pipe in plumbing.pipes] == [SIZE]
        one.answer(one.target.open[0])
        assert one.copier.idle
        assert [pipe.held for pipe in plumbing.pipes] == [0]
        assert len(one.told(Failed)) == 1


@pytest.mark.parametrize("error", [None, EIO], ids=["succeeds", "fails"])
def test_a_copier_that_drains_finishes_what_is_leaving_and_reads_nothing_again(error: RequestError | None) -> None:
    with bench(requests=2) as one:
        one.lease(0, 4 * SIZE)
        read(one)
        one.copier.drain()
        one.answer(one.target.open[0], error)
        assert not one.copier.idle
        read(one)
        one.pump(10.0)
        assert one.copier.idle
        assert (len(one.source.calls), len(one.target.calls)) == (2, 1)


def test_an_operation_that_waits_for_its_second_read_ends_with_its_lease() -> None:
    with bench(requests=1) as one:
        one.lease(0, SIZE)
        read(one)
        one.answer(one.target.open[0], EIO)
        one.copier.revoke(1)
        one.pump(RETRY_DELAY_SECONDS)
        assert len(one.source.calls) == 1
        assert one.copier.idle
        assert len(one.told(Failed)) == 1


def test_a_copier_whose_connections_are_gone_leaves_pipes_that_can_be_closed() -> None:
    plumbing = Counted()
    with bench(plumbing) as one:
        one.lease(0, 4 * SIZE)
        read(one)
        one.copier.abort(ErrorReport(kind="connection", text="gone"))
        assert len(one.told(Failed)) == 1
        assert sorted(pipe.held for pipe in plumbing.pipes) == [0, SIZE]
    assert plumbing.pipes == []


# -- zeroes -----------------------------------------------------------------------------------------------------------


def test_dense_payload_that_was_searched_for_zeroes_stays_spliced() -> None:
    with bench(requests=1, sparse_unit=UNIT) as one:
        one.lease(0, 3 * SIZE)
        for number in range(3):
            read(one)
            (write,) = one.target.open
            assert (path_of(write), write.where) == ("pipe", Range.of(number * SIZE, SIZE))
            one.answer(write)
            assert write.payload == DENSE
        assert one.target.made("zero") == []


def test_payload_that_is_all_zeroes_is_dropped_and_its_pipe_emptied() -> None:
    plumbing = Counted()
    with bench(plumbing, requests=1, sparse_unit=UNIT) as one:
        one.lease(0, SIZE)
        read(one, ZEROES)
        assert plumbing.pipes[0].held == 0
        one.answer_all()
        assert one.target.made("write") == []
        assert one.target.made("zero") == [Range(0, SIZE)]
        (written,) = one.told(Written)
        assert isinstance(written, Written)
        assert (written.done.copied, written.done.zeroed, written.done.spliced) == (0, SIZE, 0)


def test_payload_with_zeroes_in_it_goes_on_from_the_copy_and_gives_its_pipe_back_at_once() -> None:
    plumbing = Counted()
    with bench(plumbing, requests=1, sparse_unit=UNIT) as one:
        one.lease(0, SIZE)
        read(one, MIXED)
        assert plumbing.pipes[0].held == 0
        (write,) = one.target.pending("write")
        assert (path_of(write), write.where) == ("buffer", Range(0, SIZE // 2))
        assert write.payload == DENSE[: SIZE // 2]
        one.answer_all()
        assert one.target.made("zero") == [Range(SIZE // 2, SIZE)]


def test_a_write_of_the_copy_that_fails_is_sent_again_from_it() -> None:
    with bench(requests=1, sparse_unit=UNIT) as one:
        one.lease(0, SIZE)
        read(one, MIXED)
        one.answer(one.target.pending("write")[0], EIO)
        one.pump(RETRY_DELAY_SECONDS)
        assert len(one.source.calls) == 1
        assert one.target.made("write") == [Range(0, SIZE // 2)] * 2
        assert one.target.pending("write")[0].payload == DENSE[: SIZE // 2]


def test_after_payload_with_zeroes_in_it_the_next_goes_through_a_buffer_until_it_is_dense_again() -> None:
    with bench(requests=1, sparse_unit=UNIT) as one:
        one.lease(0, 5 * SIZE)
        for data in (DENSE, MIXED, MIXED, DENSE, DENSE):
            read(one, data)
            one.answer(one.target.pending("write")[0])
        assert paths(one) == ["pipe", "pipe", "buffer", "buffer", "pipe"]


def test_a_look_that_does_not_see_all_of_it_goes_on_from_the_copy() -> None:
    with bench(Shallow(5000), requests=1, sparse_unit=UNIT) as one:
        one.lease(0, 2 * SIZE)
        for data in (DENSE, DENSE[::-1]):
            read(one, data)
            (write,) = one.target.open
            assert path_of(write) == "buffer"
            assert write.payload == data
            one.answer(write)


def test_the_zeroes_around_a_lease_that_begins_off_the_grid_are_found() -> None:
    start = SIZE + UNIT // 2
    with bench(requests=1, sparse_unit=UNIT) as one:
        one.lease(start, 3 * SIZE)
        assert [call.where for call in one.source.open] == [Range(start, 2 * SIZE)]
        read(one, DENSE[: SIZE - UNIT // 2])
        assert path_of(one.target.open[0]) == "buffer"
        one.answer(one.target.open[0])
        read(one, bytes(UNIT) + DENSE[UNIT:])
        assert one.target.made("write")[-1] == Range(2 * SIZE + UNIT, 3 * SIZE)
        assert one.target.pending("write")[0].payload == DENSE[UNIT:]
