"""The copier with a checksum: every byte of the source once, as it was read, whatever happens to it afterwards."""

from __future__ import annotations

import pytest

from nbdshard.common.blkhash import Root
from nbdshard.common.limits import LEAF_BYTES, RETRY_DELAY_SECONDS
from nbdshard.common.messages import Counters, JobOptions, LeafRun, Leaves, Written
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range
from support.blkhash import blkhash
from support.copier_bench import EIO, KIB, Bench

HOLE = STATE_HOLE | STATE_ZERO


def options(**changes: object) -> JobOptions:
    defaults: dict[str, object] = {
        "request_size": 64 * KIB,
        "requests": 4,
        "queue_size": 1024 * KIB,
        "sparse_unit": 0,
        "extents": False,
        "checksum": True,
    }
    return JobOptions(**(defaults | changes))  # type: ignore[arg-type]


def told(bench: Bench) -> tuple[list[LeafRun], Written]:
    """The digests, which come before Written and are as many as it says."""
    kinds = [type(message) for message in bench.copier.outbox if isinstance(message, Leaves | Written)]
    assert kinds == sorted(kinds, key=lambda kind: kind is Written)
    (written,) = bench.told(Written)
    assert isinstance(written, Written)
    runs = [run for message in bench.told(Leaves) for run in message.runs]  # type: ignore[union-attr]
    assert sum(run.count for run in runs) == written.leaves
    return runs, written


def checksum(runs: list[LeafRun], size: int) -> str:
    root, at = Root(), 0
    for run in runs:
        root.zeroes((run.start - at) // LEAF_BYTES)
        root.data(run.digests)
        at = run.end
    root.zeroes(max(0, size - at) // LEAF_BYTES)
    return root.finish(size)


@pytest.mark.parametrize("request_size", [4, 16, 64, 256], ids=lambda size: f"{size}k")
@pytest.mark.parametrize("size", [1, 100 * KIB, 256 * KIB, 256 * KIB + 5])
def test_the_lease_has_the_digests_of_what_was_read(request_size: int, size: int) -> None:
    bench = Bench(options(request_size=request_size * KIB))
    bench.lease(0, size)
    bench.answer_all()
    runs, written = told(bench)
    assert checksum(runs, size) == blkhash(b"d" * size)
    assert written.done == Counters(copied=size)


def test_replies_in_any_order_make_the_same_digests() -> None:
    bench = Bench(options(request_size=16 * KIB, requests=8))
    bench.lease(0, 128 * KIB)
    for call in reversed(list(bench.source.open)):
        assert call.where is not None
        bench.answer(call, data=bytes([call.where.start // KIB + 1]) * call.where.length)
    bench.answer_all()
    expected = b"".join(bytes([at + 1]) * 16 * KIB for at in range(0, 128, 16))
    assert checksum(told(bench)[0], 128 * KIB) == blkhash(expected)


def test_holes_are_not_read_and_have_no_digests() -> None:
    size, hole = 1024 * KIB, Range(192 * KIB, 832 * KIB)
    bench = Bench(options(extents=True))
    bench.lease(0, size)
    (asked,) = bench.source.pending("extents")
    data = [(Range(0, hole.start), 0), (hole, HOLE), (Range(hole.end, size), 0)]
    bench.answer(asked, extents=data)
    bench.answer_all()
    assert not any(where.overlaps(hole) for where in bench.source.made("read") if where is not None)
    runs, _ = told(bench)
    assert sum(run.count for run in runs) == (size - hole.length) // LEAF_BYTES
    assert checksum(runs, size) == blkhash(b"d" * hole.start + bytes(hole.length) + b"d" * (size - hole.end))


def test_a_leaf_that_an_extent_cuts_is_put_together() -> None:
    size, hole = 512 * KIB, Range(100 * KIB + 512, 300 * KIB - 512)
    bench = Bench(options(extents=True, request_size=256 * KIB))
    bench.lease(0, size)
    (asked,) = bench.source.pending("extents")
    bench.answer(asked, extents=[(Range(0, hole.start), 0), (hole, HOLE), (Range(hole.end, size), 0)])
    bench.answer_all()
    assert any(where is not None and where.end == hole.start for where in bench.source.made("read"))
    expected = b"d" * hole.start + bytes(hole.length) + b"d" * (size - hole.end)
    assert checksum(told(bench)[0], size) == blkhash(expected)


def test_a_read_that_failed_and_one_that_was_repeated_count_once() -> None:
    bench = Bench(options())
    bench.lease(0, 64 * KIB)
    bench.answer(bench.source.open[0], EIO)
    bench.pump(RETRY_DELAY_SECONDS)
    bench.answer(bench.source.open[0], data=b"x")
    bench.answer_all()
    assert checksum(told(bench)[0], 64 * KIB) == blkhash(b"x" * 64 * KIB)


def test_a_write_that_is_repeated_is_not_looked_at_again() -> None:
    bench = Bench(options())
    bench.lease(0, 64 * KIB)
    bench.answer(bench.source.open[0], data=b"x")
    bench.answer(bench.target.open[0], EIO)
    bench.pump(RETRY_DELAY_SECONDS)
    bench.answer_all()
    assert checksum(told(bench)[0], 64 * KIB) == blkhash(b"x" * 64 * KIB)


def test_what_is_salvaged_counts_as_the_zeroes_that_are_written() -> None:
    bench = Bench(options(salvage=True, attempts=1))
    bench.lease(0, 128 * KIB)
    bad = Range(64 * KIB, 68 * KIB)
    for _ in range(100):
        if not (bench.source.open or bench.target.open):
            break
        call = (bench.source.open or bench.target.open)[0]
        is_bad = call.name == "read" and call.where is not None and call.where.overlaps(bad)
        bench.answer(call, EIO if is_bad else None)
        bench.pump(RETRY_DELAY_SECONDS)
    runs, written = told(bench)
    assert written.unreadable == (bad,)
    assert checksum(runs, 128 * KIB) == blkhash(b"d" * bad.start + bytes(bad.length) + b"d" * (128 * KIB - bad.end))


def test_without_a_checksum_nothing_is_looked_at() -> None:
    bench = Bench(options(checksum=False))
    bench.lease(0, 64 * KIB)
    bench.answer_all()
    assert bench.told(Leaves) == []
    assert bench.told(Written)[0].leaves == 0  # type: ignore[union-attr]


def test_nothing_is_spliced() -> None:
    assert not Bench(options(request_size=1024 * KIB)).shape.splice
