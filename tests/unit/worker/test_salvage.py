"""What the source cannot read is cut down to what is really bad, and zeroes are written there."""

from __future__ import annotations

import msgspec
import pytest

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import LANE_BYTES_MIN, RETRY_DELAY_SECONDS_MAX, UNREADABLE_PER_LEASE_MAX
from nbdshard.common.messages import Counters, EndpointDescription, Failed, JobOptions, Written
from nbdshard.common.ranges import Range
from nbdshard.worker.stretch import Outcome
from support.copier_bench import EIO, EPOCH, JOB, KIB, Bench, Call, Recorder, splicing
from support.lanes_bench import REQUEST, LanesBench

BLOCK = 4 * KIB
OPTIONS = JobOptions(
    request_size=64 * KIB, requests=4, queue_size=256 * KIB, sparse_unit=0, extents=False, attempts=3, salvage=True
)
LONG = 1e6
NO_SPACE = RequestError("ENOSPC", 28)


def options(**changes: object) -> JobOptions:
    return msgspec.structs.replace(OPTIONS, **changes)


def is_bad(call: Call, bad: list[Range]) -> bool:
    assert call.where is not None
    return call.name == "read" and "source" in call.connection.name and any(call.where.overlaps(piece) for piece in bad)


def run(bench: Bench, bad: list[Range], error: RequestError = EIO) -> dict[Range, bytes]:
    """Answer everything: reads that touch `bad` with `error`. Time passes as soon as nothing else happens.

    Returns what was written as data.
    """
    written: dict[Range, bytes] = {}
    for _ in range(100_000):
        recorders = (*bench.sources, *bench.targets)
        call = next((recorder.open[0] for recorder in recorders if recorder.open), None)
        if call is not None:
            if call.name == "write" and call.where is not None:
                written[call.where] = call.payload
            bench.answer(call, error if is_bad(call, bad) else None)
        elif (due := bench.copier.deadline()) is not None:
            bench.pump(due - bench.now)
        else:
            return written
    raise AssertionError("the copier never comes to an end")


def refuse(bench: Bench, end: Recorder, error: RequestError = EIO) -> None:
    """What `end` is asked first fails as often as it is tried."""
    for _ in range(OPTIONS.attempts):
        bench.answer(end.open[0], error)
        bench.pump(RETRY_DELAY_SECONDS_MAX)


def failure(bench: Bench) -> Failed:
    """How the one lease failed."""
    (failed,) = bench.told(Failed)
    assert isinstance(failed, Failed)
    return failed


def unreadable(bench: Bench) -> tuple[Range, ...]:
    """What could not be read of the one lease, which was written."""
    (told,) = bench.told(Written)
    assert isinstance(told, Written)
    return told.unreadable


def tries(bench: Bench, where: Range) -> int:
    return bench.source.made("read").count(where)


def test_only_the_block_that_is_bad_is_lost_and_only_it_is_tried_again_and_again() -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 128 * KIB, seconds=LONG)
    bad = Range.of(20 * KIB, BLOCK)
    written = run(bench, [Range.of(22 * KIB, 512)])
    assert bench.told(Written) == [Written(JOB, EPOCH, 1, Counters(copied=128 * KIB), None, (bad,))]
    assert tries(bench, Range(0, 64 * KIB)) == 3
    halves = [Range(0, 32 * KIB), Range(32 * KIB, 64 * KIB), Range(0, 16 * KIB), Range(16 * KIB, 32 * KIB)]
    assert [tries(bench, half) for half in halves] == [1, 1, 1, 1]
    assert tries(bench, bad) == 3
    assert written.pop(bad) == bytes(BLOCK)
    assert all(set(payload) == {ord("d")} for payload in written.values())


def test_neighbours_that_are_bad_are_one_place() -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 64 * KIB, seconds=LONG)
    run(bench, [Range(30 * KIB, 34 * KIB)])
    assert unreadable(bench) == (Range(28 * KIB, 36 * KIB),)


def test_a_range_that_is_bad_as_a_whole_comes_to_an_end() -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 128 * KIB, seconds=LONG)
    run(bench, [Range(0, 128 * KIB)])
    assert unreadable(bench) == (Range(0, 128 * KIB),)
    reads = bench.source.made("read")
    assert len(reads) == 2 * (3 + 2 + 4 + 8 + 16 * 3)


@pytest.mark.parametrize(
    ("source", "destination", "lost"),
    [
        (EndpointDescription("a", 1 << 30, block_minimum=16 * KIB), {}, Range(16 * KIB, 32 * KIB)),
        (EndpointDescription("a", 1 << 30, block_minimum=512), {}, Range(20 * KIB, 24 * KIB)),
        (None, {"block_minimum": 8 * KIB}, Range(16 * KIB, 24 * KIB)),
    ],
)
def test_the_smallest_piece_suits_both_sides(
    source: EndpointDescription | None, destination: dict[str, int], lost: Range
) -> None:
    there = EndpointDescription("b", 1 << 30, can_zero=True, can_flush=True, **destination)
    bench = Bench(OPTIONS, source=source, destination=there)
    bench.lease(0, 64 * KIB, seconds=LONG)
    run(bench, [Range.of(22 * KIB, 512)])
    assert unreadable(bench) == (lost,)


def test_an_odd_tail_is_lost_alone() -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 64 * KIB + 100, seconds=LONG)
    run(bench, [Range.of(64 * KIB + 99, 1)])
    assert unreadable(bench) == (Range(64 * KIB, 64 * KIB + 100),)


def test_an_odd_tail_inside_a_block_of_the_destination_leaves_what_is_behind_it() -> None:
    destination = EndpointDescription("b", 1 << 30, can_zero=True, can_flush=True, block_minimum=512)
    bench = Bench(OPTIONS, destination=destination)
    bench.lease(0, 64 * KIB + 100, seconds=LONG)
    written = run(bench, [Range.of(64 * KIB + 99, 1)])
    assert written[Range.of(64 * KIB, 512)] == bytes(100) + b"d" * 412


def test_zeroes_take_the_cheap_way_where_there_is_one() -> None:
    bench = Bench(options(sparse_unit=4 * KIB))
    bench.lease(0, 64 * KIB, seconds=LONG)
    run(bench, [Range(0, 100)])
    assert bench.target.made("zero") == [Range(0, BLOCK)]


@pytest.mark.parametrize("name", ["EIO", "ENODATA", "EBADMSG", "EUCLEAN", "EILSEQ", "EREMOTEIO"])
def test_what_says_that_the_medium_is_bad_is_forgiven(name: str) -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 64 * KIB, seconds=LONG)
    run(bench, [Range(0, 100)], RequestError(name, 5))
    assert bench.told(Failed) == []


@pytest.mark.parametrize("name", ["EPERM", "EINVAL", "ENOMEM", "ENOTSUP", "EOVERFLOW", "ESHUTDOWN", "ENOSPC"])
def test_what_says_something_else_fails_the_lease(name: str) -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 64 * KIB, seconds=LONG)
    run(bench, [Range(0, 100)], RequestError(name, 22))
    assert failure(bench).error.text.endswith(f"read of 65536 bytes at offset 0 failed 3 times: {name}")


def test_lanes_rest_while_reads_are_cut() -> None:
    lanes = options(request_size=REQUEST, requests=8, queue_size=8 * REQUEST, attempts=1)
    with splicing(REQUEST) as pipes:
        bench = LanesBench(lanes, pipes)
        bench.lease(0, 3 * LANE_BYTES_MIN, seconds=LONG)
        stretch = bench.lane.take()
        asked = bench.lane.ask(stretch, 0)
        bench.lane.feed.appendleft(stretch)
        bench.end(Outcome(reads=[asked], source_bytes=b"an error"))
        (adopted,) = bench.source.pending("adopted read")
        assert (bench.lane.loans, bench.lane.is_out) == (1, False)
        bench.reply(adopted, EIO)
        run(bench, [Range.of(22 * KIB, 512)])
        assert bench.source.made("read")[:2] == [Range(0, REQUEST // 2), Range(REQUEST // 2, REQUEST)]
        assert (bench.lane.loans, bench.lane.is_out) == (2, True)
        bench.lane.copy_all()
        bench.end()
        run(bench, [])
    assert unreadable(bench) == (Range.of(20 * KIB, BLOCK),)


def test_a_half_that_fails_for_another_reason_has_all_its_tries() -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 64 * KIB, seconds=LONG)
    refuse(bench, bench.source)
    for _ in range(3):
        half = next(call for call in bench.source.open if call.where == Range(0, 32 * KIB))
        bench.answer(half, RequestError("ENOMEM", 12))
        bench.pump(RETRY_DELAY_SECONDS_MAX)
    for call in list(bench.source.open):
        bench.answer(call)
    bench.answer_all()
    assert failure(bench).error.text.endswith("read of 32768 bytes at offset 0 failed 3 times: ENOMEM")


def test_without_the_option_the_first_read_fails_the_lease() -> None:
    bench = Bench(options(salvage=False))
    bench.lease(0, 64 * KIB, seconds=LONG)
    run(bench, [Range(0, 100)])
    assert len(bench.told(Failed)) == 1
    assert len(bench.source.calls) == 3


@pytest.mark.parametrize("error", [EIO, NO_SPACE])
def test_a_write_that_fails_is_never_forgiven(error: RequestError) -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 64 * KIB, seconds=LONG)
    bench.answer(bench.source.open[0])
    refuse(bench, bench.target, error)
    assert failure(bench).error.side == "destination"


def test_a_merge_that_cannot_read_the_destination_is_not_forgiven() -> None:
    destination = EndpointDescription("b", 1 << 30, can_zero=True, can_flush=True, block_minimum=512)
    bench = Bench(OPTIONS, destination=destination)
    bench.lease(0, 100, seconds=LONG)
    bench.answer(bench.source.open[0])
    refuse(bench, bench.target)
    assert failure(bench).error.side == "destination"


def test_a_stream_is_not_salvaged() -> None:
    bench = Bench(OPTIONS, source=EndpointDescription("-", None, is_stream=True))
    bench.lease(0, 1 << 20, until_end=True, seconds=LONG)
    run(bench, [Range(0, 1 << 20)])
    assert len(bench.told(Failed)) == 1


def test_a_lease_that_is_given_up_leaves_nothing_to_be_cut() -> None:
    bench = Bench(OPTIONS)
    bench.lease(0, 64 * KIB, seconds=LONG)
    refuse(bench, bench.source)
    bench.copier.revoke(1)
    for call in list(bench.source.open):
        bench.answer(call, EIO)
    assert len(bench.told(Failed)) == 1
    assert bench.copier.idle


def test_a_spliced_read_that_may_be_tried_once_is_cut_too() -> None:
    once = options(request_size=512 * KIB, queue_size=2048 * KIB, attempts=1)
    with splicing(512 * KIB) as pipes:
        bench = Bench(once, splicing=pipes)
        bench.lease(0, 512 * KIB, seconds=LONG)
        run(bench, [Range(0, 100)])
    assert unreadable(bench) == (Range(0, BLOCK),)


def test_of_many_places_those_near_one_another_are_told_as_one() -> None:
    end = 2 * BLOCK * (UNREADABLE_PER_LEASE_MAX + 10)
    bench = Bench(options(attempts=1))
    bench.lease(0, end, seconds=LONG)
    run(bench, [Range.of(at, 1) for at in range(0, end, 2 * BLOCK)])
    assert len(unreadable(bench)) == UNREADABLE_PER_LEASE_MAX
    assert sum(piece.length for piece in unreadable(bench)) == end // 2 + 10 * BLOCK


def test_one_copier_s_halves_are_read_in_order_where_order_matters() -> None:
    bench = Bench(options(synchronous=True))
    bench.lease(0, 128 * KIB, seconds=LONG)
    run(bench, [Range.of(22 * KIB, 512)])
    starts = [where.start for where in bench.target.made("write") if where is not None]
    assert starts == sorted(starts)
    assert unreadable(bench) == (Range.of(20 * KIB, BLOCK),)
