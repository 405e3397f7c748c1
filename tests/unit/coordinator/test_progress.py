"""Progress displays and the summary line, fed with statuses by hand."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from nbdshard.common.limits import UNREADABLE_SHOWN_MAX
from nbdshard.common.messages import Counters
from nbdshard.common.ranges import Range
from nbdshard.coordinator.job import Outcome, Status, Verdict
from nbdshard.coordinator.progress import (
    DelayedDisplay,
    Display,
    JsonDisplay,
    Meter,
    NoDisplay,
    PercentDisplay,
    summary,
)
from support.statuses import OUTCOME, STATUS, done

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def lines(read_end: int) -> list[str]:
    try:
        return os.read(read_end, 65536).decode().splitlines()
    except BlockingIOError:
        return []


# -- the meter ---------------------------------------------------------------------------------------------------------


def test_what_was_done_never_falls() -> None:
    meter = Meter(0.0)
    meter.take(done(500), 1.0)
    meter.take(done(300), 2.0)
    assert meter.done == 500
    meter.take(done(700), 3.0)
    assert meter.done == 700


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    meter = Meter(0.0)
    for second in range(1, 31):
        meter.take(done(10_000 if second > 15 else 0), float(second))
    assert meter.rate == 0
    for second in range(31, 42):
        meter.take(done(10_000 + (second - 30) * 100), float(second))
    assert meter.rate == pytest.approx(100)


def test_the_time_left_follows_from_the_rate() -> None:
    meter = Meter(0.0)
    assert meter.seconds_left(1000) is None
    meter.take(done(100), 2.0)
    assert meter.seconds_left(1000) == pytest.approx(18)
    assert meter.seconds_left(None) is None


# -- N/100 -------------------------------------------------------------------------------------------------------------


def test_percent_lines_come_when_they_change_and_100_only_after_success(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = PercentDisplay(write_end)
    for count in (0, 5, 9, 10, 500, 400, 999, 1000):
        display.show(done(count), 0.0)
    assert lines(read_end) == ["0/100", "1/100", "50/100", "99/100"]
    display.end(done(1000), OUTCOME, 0.0)
    assert lines(read_end) == ["100/100"]


@pytest.mark.parametrize("verdict", [Verdict.FAILED, Verdict.STOPPED, Verdict.UNFENCED])
def test_without_success_there_is_no_100(verdict: Verdict, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = PercentDisplay(write_end)
    display.show(done(1000), 0.0)
    display.end(done(1000), replace(OUTCOME, verdict=verdict), 0.0)
    assert lines(read_end) == ["99/100"]


def test_an_unknown_size_has_no_percent_until_the_end(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = PercentDisplay(write_end)
    display.show(done(10, size=None), 0.0)
    assert lines(read_end) == []
    display.end(done(10, size=None), OUTCOME, 0.0)
    assert lines(read_end) == ["100/100"]


def test_an_empty_source_goes_from_0_to_100(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = PercentDisplay(write_end)
    display.show(done(0, size=0), 0.0)
    display.end(done(0, size=0), OUTCOME, 0.0)
    assert lines(read_end) == ["0/100", "100/100"]


def test_a_reader_that_makes_no_room_gets_the_next_line_instead(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, b"x" * 4096)
    display = PercentDisplay(write_end)
    display.show(done(100), 0.0)
    while lines(read_end):
        pass
    display.show(done(100), 0.0)
    assert lines(read_end) == ["10/100"]


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_objects_come_once_a_second_and_hold_every_field(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = JsonDisplay(100.0, write_end)
    assert display.due() == 100.0
    display.show(done(0), 100.0)
    display.show(done(50), 100.5)
    assert display.due() == 101.0
    status = replace(STATUS, counters=Counters(copied=100, zeroed=60, skipped=40, spliced=90))
    display.show(status, 102.0)
    first, second = map(json.loads, lines(read_end))
    assert first["bytes_done"] == 0
    assert first["eta_seconds"] is None
    assert second == {
        "phase": "copying",
        "bytes_total": 1000,
        "bytes_done": 200,
        "bytes_copied": 100,
        "bytes_zeroed": 60,
        "bytes_skipped": 40,
        "bytes_spliced": 90,
        "bytes_resumed": 0,
        "bytes_compared": 0,
        "bytes_verified": None,
        "verified": None,
        "bytes_unreadable": 0,
        "rate_bytes_per_second": 100,
        "rate_limit_bytes_per_second": None,
        "eta_seconds": 8.0,
        "elapsed_seconds": 2.0,
        "workers": 2,
        "connections": 4,
        "waiting_for": None,
        "waiting_seconds": None,
        "checksum": None,
    }


def test_json_objects_count_what_an_earlier_run_did(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    JsonDisplay(100.0, write_end).show(replace(STATUS, counters=Counters(copied=100), resumed=300), 100.0)
    (record,) = map(json.loads, lines(read_end))
    assert (record["bytes_done"], record["bytes_copied"], record["bytes_resumed"]) == (400, 100, 300)


def test_the_last_json_object_names_what_could_not_be_read_up_to_a_bound(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    places = tuple(Range.of(8192 * n, 512) for n in range(1000))
    status = replace(STATUS, unreadable_bytes=512_000)
    JsonDisplay(100.0, write_end).end(status, replace(OUTCOME, unreadable=places), 101.0)
    (record,) = map(json.loads, lines(read_end))
    assert (record["bytes_unreadable"], record["unreadable_places"]) == (512_000, 1000)
    assert record["unreadable"][:2] == [{"offset": 0, "length": 512}, {"offset": 8192, "length": 512}]
    assert len(record["unreadable"]) == UNREADABLE_SHOWN_MAX


def test_json_objects_tell_what_is_waited_for(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = JsonDisplay(100.0, write_end)
    display.show(replace(STATUS, waiting_for="source nbd://a: lost", waiting_seconds=2.04), 100.0)
    (record,) = map(json.loads, lines(read_end))
    assert (record["waiting_for"], record["waiting_seconds"]) == ("source nbd://a: lost", 2.0)


def test_what_is_read_back_is_counted_anew_and_the_answer_comes_last(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = JsonDisplay(100.0, write_end)
    copied = replace(STATUS, counters=Counters(copied=1000), verifies=True)
    reading = replace(copied, phase="verifying", verified=0)
    display.show(copied, 100.0)
    display.show(reading, 101.0)
    display.show(replace(reading, verified=300), 102.0)
    display.show(replace(reading, verified=200), 103.0)  # a range is compared again: not told
    for verdict in (Verdict.COMPLETE, Verdict.DIFFERENT, Verdict.STOPPED):
        display.end(replace(reading, verified=1000), replace(OUTCOME, verdict=verdict), 104.0)
    records = list(map(json.loads, lines(read_end)))
    assert [record["bytes_done"] for record in records] == [1000, 0, 300, 300, 1000, 1000, 1000]
    assert [record["bytes_verified"] for record in records] == [None, 0, 300, 200, 1000, 1000, 1000]
    assert [record["verified"] for record in records[3:]] == [None, True, False, None]
    assert records[2]["rate_bytes_per_second"] == 300
    assert all(record["bytes_copied"] == 1000 for record in records)


def test_what_is_read_back_is_the_second_half_of_the_percents(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = PercentDisplay(write_end)
    for copied in (0, 500, 1000):
        display.show(replace(done(copied), verifies=True), 0.0)
    for verified in (0, 500, 1000):
        display.show(replace(done(1000), verifies=True, phase="verifying", verified=verified), 0.0)
    display.end(replace(done(1000), verifies=True, verified=1000), OUTCOME, 0.0)
    assert lines(read_end) == ["0/100", "25/100", "50/100", "75/100", "99/100", "100/100"]


@pytest.mark.parametrize(
    ("verdict", "phase"),
    [
        (Verdict.COMPLETE, "done"),
        (Verdict.FAILED, "failed"),
        (Verdict.STOPPED, "stopped"),
        (Verdict.PAUSED, "lost"),
        (Verdict.UNFENCED, "unfenced"),
    ],
)
def test_the_last_json_object_says_how_it_ended(verdict: Verdict, phase: str, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    display = JsonDisplay(0.0, write_end)
    gone = replace(done(1000), workers=0, source_connections=0, destination_connections=0)
    display.end(gone, replace(OUTCOME, verdict=verdict), 4.0)
    (record,) = map(json.loads, lines(read_end))
    assert (record["phase"], record["bytes_done"], record["elapsed_seconds"]) == (phase, 1000, 4.0)
    assert (record["workers"], record["connections"]) == (2, 4)


# -- a display that comes later ----------------------------------------------------------------------------------------


class Recording(NoDisplay):
    """Notes what it is told."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.told: list[str] = []

    def due(self) -> float:
        return 7.0

    def show(self, status: Status, now: float) -> None:
        self.told.append(f"show {now}")

    def end(self, status: Status, outcome: Outcome, now: float) -> None:
        self.told.append(f"end {now}")

    def close(self) -> None:
        self.told.append("close")


def test_a_short_copy_never_makes_the_delayed_display() -> None:
    made: list[Recording] = []

    def make(start: float) -> Display:
        made.append(Recording(start))
        return made[-1]

    display = DelayedDisplay(10.0, 0.5, make)
    assert display.due() == 10.5
    display.show(STATUS, 10.4)
    display.end(STATUS, OUTCOME, 10.45)
    display.close()
    assert made == []


def test_a_longer_copy_gets_the_display_with_its_own_start_time() -> None:
    made: list[Recording] = []

    def make(start: float) -> Display:
        made.append(Recording(start))
        return made[-1]

    display = DelayedDisplay(10.0, 0.5, make)
    display.show(STATUS, 10.5)
    assert display.due() == 7.0
    display.show(STATUS, 11.0)
    display.end(STATUS, OUTCOME, 12.0)
    display.close()
    assert len(made) == 1
    assert made[0].start == 10.0
    assert made[0].told == ["show 10.5", "show 11.0", "end 12.0", "close"]


# -- the summary -------------------------------------------------------------------------------------------------------


def test_the_summary_of_a_complete_copy() -> None:
    assert summary(OUTCOME, 9.0) == (
        "3 GiB copied, 1 GiB zeroed, 512 MiB skipped in 9.00 s (512 MiB/s); 2 workers; 4+4 connections; "
        "buffered; io_uring; flushed"
    )


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ({"durable": False}, "durability unknown: the destination has no flush"),
        ({"durable": False, "flush_asked": False}, "not flushed"),
        (
            {"workers": 1, "rings": frozenset({"epoll", "io_uring"})},
            "1 worker; 4+4 connections; buffered; epoll, io_uring; flushed",
        ),
        ({"rings": frozenset()}, "4+4 connections; buffered; flushed"),
        ({"counters": Counters(copied=8, spliced=8)}, "spliced; io_uring; flushed"),
        ({"counters": Counters(copied=8, zeroed=2, spliced=7)}, "87 % spliced; io_uring; flushed"),
        (
            {"unreadable": (Range(4096, 8192),)},
            "4096 bytes unreadable in 1 place, zeroes instead (4096 at offset 4096); io_uring; flushed",
        ),
        (
            {"unreadable": tuple(Range.of(1000 * n, n) for n in range(1, 6))},
            "15 bytes unreadable in 5 places, zeroes instead "
            "(1 at offset 1000, 2 at offset 2000, 3 at offset 3000 and 2 more); io_uring; flushed",
        ),
        ({"counters": Counters(zeroed=8)}, "4+4 connections; io_uring; flushed"),
    ],
)
def test_the_summary_says_how_safe_it_is_and_who_did_it(change: dict[str, object], end: str) -> None:
    assert summary(replace(OUTCOME, **change), 9.0).endswith(f"; {end}")  # type: ignore[arg-type]


def test_the_summary_of_a_stopped_copy_says_how_far_it_got() -> None:
    stopped = replace(OUTCOME, verdict=Verdict.STOPPED, size=9 * GIB)
    line = summary(stopped, 9.0)
    assert line.startswith("stopped at 4.5 GiB of 9 GiB (50 %): 3 GiB copied, ")
    assert "flushed" not in line


def test_the_summary_of_a_copy_stopped_before_its_size_was_known() -> None:
    stopped = replace(OUTCOME, verdict=Verdict.STOPPED, size=None, counters=Counters(), workers=0, rings=frozenset())
    assert summary(stopped, 0.0).startswith("stopped at 0 B: 0 B copied, ")


def test_the_summary_of_an_unfenced_copy_warns_first() -> None:
    assert summary(replace(OUTCOME, verdict=Verdict.UNFENCED), 1.0).startswith("not safe to use yet: ")
