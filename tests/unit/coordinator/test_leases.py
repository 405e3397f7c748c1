"""The ledger's own corners; its whole behaviour is held against a model in tests/model."""

from __future__ import annotations

import tracemalloc

import pytest
from msgspec.structs import replace

from nbdshard.common.errors import BugError, IllegalEvent
from nbdshard.common.limits import GIB, KIB, MIB
from nbdshard.common.messages import Counters, EndpointDescription
from nbdshard.common.ranges import Range
from nbdshard.coordinator.leases import Intervals, Ledger
from nbdshard.coordinator.planner import OFFSET_MAX, check_job
from support.schedules import job, server

UNIT = 64 * KIB
STREAM = EndpointDescription(peer="standard input", size=None, is_stream=True)


def ledger(units: int) -> Ledger:
    end = server(units * UNIT)
    return Ledger(check_job(job(range_size=UNIT), end, end))


def stream_ledger() -> Ledger:
    return Ledger(check_job(job(destination_grows=True), STREAM, server(0)))


def test_an_empty_export_has_nothing_to_hand_out() -> None:
    empty = ledger(0)
    assert (empty.pending, empty.unwritten, empty.size) == (False, False, 0)
    empty.validate()
    with pytest.raises(BugError):
        empty.grant("w")


def test_a_range_that_came_back_is_leased_under_a_new_number() -> None:
    two = ledger(2)
    first = two.grant("a")
    two.give_back(first, attempt=False)
    again = two.grant("b")
    assert (first.number, again.number, again.range) == (1, 2, Range(0, UNIT))


def test_a_lease_is_written_only_once() -> None:
    one = ledger(1)
    granted = one.grant("a")
    one.wrote(granted, Counters(copied=UNIT), None)
    with pytest.raises(IllegalEvent):
        one.wrote(granted, Counters(copied=UNIT), None)
    one.validate()


def test_what_could_not_be_read_is_known_while_its_range_counts() -> None:
    two = ledger(2)
    first, second = two.grant("a"), two.grant("a")
    two.wrote(first, Counters(copied=UNIT), None, (Range(0, 512),))
    two.wrote(second, Counters(copied=UNIT), None, (Range(UNIT, UNIT + 512), Range(UNIT + 1024, UNIT + 4096)))
    two.cover(first, 1)
    assert list(two.unreadable) == [Range(0, 512), Range(UNIT, UNIT + 512), Range(UNIT + 1024, UNIT + 4096)]
    two.give_back(second, attempt=False)
    assert list(two.unreadable) == [Range(0, 512)]
    two.demote(0)
    assert list(two.unreadable) == []


def test_what_an_earlier_run_could_not_read_is_known_as_far_as_its_range_is_not_copied_again() -> None:
    end = server(4 * UNIT)
    plan = check_job(job(range_size=UNIT), end, end)
    resumed = Ledger(plan, [Range(0, 2 * UNIT - 1)], [Range(512, 1024), Range(UNIT, UNIT + 512)])
    assert list(resumed.unreadable) == [Range(512, 1024)]


def test_of_too_many_places_only_one_a_lease_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdshard.coordinator.leases.UNREADABLE_MAX", 2)
    two = ledger(2)
    first, second = two.grant("a"), two.grant("a")
    two.wrote(first, Counters(copied=UNIT), None, (Range(0, 512), Range(1024, 4096)))
    two.wrote(second, Counters(copied=UNIT), None, (Range(UNIT, UNIT + 512), Range(UNIT + 1024, UNIT + 4096)))
    assert list(two.unreadable) == [Range(0, 512), Range(1024, 4096), Range(UNIT, UNIT + 4096)]
    two.cover(first, 1)
    two.cover(second, 1)
    assert [granted.unreadable for granted in two.confirm(2)][1] == (Range(UNIT, UNIT + 4096),)


def test_a_stream_is_one_lease_until_its_end() -> None:
    stream = stream_ledger()
    granted = stream.grant("w")
    assert (granted.until_end, granted.range) == (True, Range(0, OFFSET_MAX))
    assert stream.size is None
    stream.wrote(granted, Counters(copied=5000), 5000)
    assert (stream.size, stream.unsettled_bytes, stream.unwritten) == (5000, 5000, False)
    stream.validate()
    stream.settle(granted)
    stream.validate()


def test_a_stream_may_be_empty() -> None:
    stream = stream_ledger()
    granted = stream.grant("w")
    stream.wrote(granted, Counters(), 0)
    stream.settle(granted)
    assert (stream.size, stream.unwritten) == (0, False)
    stream.validate()


def test_validate_finds_an_overlap() -> None:
    broken = ledger(3)
    first = broken.grant("a")
    first.range = Range(0, 2 * UNIT)
    broken.grant("a")
    with pytest.raises(BugError, match="overlap at offset 65536"):
        broken.validate()


def test_validate_finds_a_gap() -> None:
    broken = ledger(3)
    granted = broken.grant("a")
    granted.range = Range(0, UNIT // 2)
    with pytest.raises(BugError, match="leave a gap at offset 32768"):
        broken.validate()


def test_validate_finds_a_wrong_count() -> None:
    broken = ledger(3)
    broken.leased_count = 1
    with pytest.raises(BugError, match="counts"):
        broken.validate()


def test_intervals_merge_with_their_neighbours_on_both_sides() -> None:
    intervals = Intervals()
    for start in (4, 0, 8, 2, 6):
        intervals.add(start, start + 2)
    assert list(intervals) == [(0, 10)]
    assert intervals.total == 10


def test_ranges_that_became_durable_in_order_cost_no_memory() -> None:
    end = server(1_000_000 * UNIT)
    many = Ledger(replace(check_job(job(range_size=UNIT), end, end), range_size_min=UNIT))
    whole = Counters(copied=UNIT)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            granted = many.grant("w")
            many.wrote(granted, whole, None)
            many.settle(granted)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 100_000
    many.validate()


def lengths(of: Ledger, copied: list[int]) -> list[int]:
    """How long the ranges of one worker are, in MiB, that finds so many bytes of data in each."""
    found = []
    for data in copied:
        granted = of.grant("w")
        found.append(granted.range.length // MIB)
        of.wrote(granted, Counters(copied=data, zeroed=granted.range.length - data), None)
    of.validate()
    return found


def test_a_worker_that_meets_no_data_is_leased_more_at_a_time_and_no_more_once_it_does() -> None:
    end = server(100 * GIB)
    sparse = Ledger(check_job(job(), end, end))
    assert lengths(sparse, [0, 0, 0, 0, 1, 5, 0, 0]) == [128, 256, 512, 512, 512, 128, 128, 256]


def test_ranges_of_the_size_that_was_asked_for_do_not_grow() -> None:
    end = server(100 * GIB)
    asked = Ledger(check_job(job(range_size=128 * MIB), end, end))
    assert lengths(asked, [0, 0, 0, 0]) == [128, 128, 128, 128]
