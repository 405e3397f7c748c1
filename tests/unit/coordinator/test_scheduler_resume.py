"""A copy that goes on where an earlier one ended: what is not copied again, and what is told about it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import UserError
from nbdshard.common.limits import GIB, KIB, MIB
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.job import Verdict
from nbdshard.coordinator.leases import Ledger
from nbdshard.coordinator.planner import check_job
from support.schedules import (
    Stage,
    ended,
    flushed,
    flushes_in,
    goodbye,
    job,
    leases_in,
    server,
    stops,
    wanted,
    written,
)

UNIT = 4 * MIB
DISK = server(8 * UNIT)
STREAM = EndpointDescription(peer="standard input", size=None, is_stream=True)


def units(first: int, end: int) -> Range:
    return Range(first * UNIT, end * UNIT)


def resumed(*durable: Range) -> Stage:
    stage = Stage(job(range_size=UNIT, durable=durable))
    stage.start()
    stage.join("a", DISK, DISK)
    return stage


def handed_out(durable: tuple[Range, ...], size: int, range_size: int | None = None, workers: int = 1) -> list[Range]:
    """All leases of a resumed copy, in order."""
    disk = server(size)
    what = job(durable=durable, range_size=range_size, workers=workers)
    ledger = Ledger(check_job(what, disk, disk), what.durable)
    found = []
    while ledger.pending:
        found.append(ledger.grant("w").range)
        ledger.validate()
    return found


def test_only_the_gaps_are_copied_and_the_copy_is_complete() -> None:
    stage = resumed(units(0, 3), units(5, 6))
    done = []
    while granted := leases_in(stage.say("a", wanted(2))):
        followed = stage.say("a", *[written(item) for item in granted])
        done += granted
    assert [item.range for item in done] == [units(3, 4), units(4, 5), units(6, 7), units(7, 8)]
    (flush,) = flushes_in(followed)
    stage.say("a", flushed(flush, *done))
    assert ended(stage, "a") == (Verdict.COMPLETE, "")
    outcome = stage.outcome
    assert (outcome.counters.total, outcome.resumed, outcome.done) == (4 * UNIT, 4 * UNIT, outcome.size)


def test_workers_elsewhere_are_given_nothing_before_leases_of_the_run_before_have_ended() -> None:
    """Its coordinator was killed, and they may write on under them; nobody knows who they are."""
    stage = Stage(job(range_size=UNIT, is_resumed=True, local_workers=False, lease_seconds=10.0))
    stage.start()
    stage.join("a", DISK, DISK)
    began = stage.now
    assert any("an earlier run may write for 10 s more" in note for note in stage.scheduler.take_notes())
    assert leases_in(stage.say("a", wanted(1))) == []
    assert stage.scheduler.deadline() <= began + 10.0
    assert leases_in(stage.wait(9.0, "a")) == []
    assert len(leases_in(stage.wait(1.5, "a"))) == 1


def test_local_workers_died_with_their_coordinator_and_nobody_waits() -> None:
    stage = Stage(job(range_size=UNIT, is_resumed=True))
    stage.start()
    stage.join("a", DISK, DISK)
    assert len(leases_in(stage.say("a", wanted(1)))) == 1


def test_progress_begins_where_the_earlier_copy_was() -> None:
    status = resumed(units(0, 3)).scheduler.status()
    assert (status.counters.total, status.resumed, status.done) == (0, 3 * UNIT, 3 * UNIT)


def test_a_user_who_stops_is_told_how_far_both_copies_came() -> None:
    stage = resumed(units(0, 3))
    stage.stop()
    assert ended(stage, "a") == (Verdict.STOPPED, f"stopped after {3 * UNIT} of {8 * UNIT} bytes")


def test_a_copy_that_was_complete_looks_at_both_ends_and_is_complete() -> None:
    stage = Stage(job(range_size=UNIT, durable=(units(0, 8),), workers=4))
    stage.start()
    assert stops(stage.join("a", DISK, DISK)) == [("a", "the copy is complete")]
    stage.say("a", goodbye())
    assert (stage.outcome.verdict, stage.outcome.resumed, stage.outcome.durable) == (Verdict.COMPLETE, 8 * UNIT, True)


@pytest.mark.parametrize(
    ("source", "destination", "line"),
    [
        (
            server(7 * UNIT),
            DISK,
            "nbd://server: its size is 29360128 bytes, but the bytes up to 33554432 are said to be",
        ),
        (STREAM, DISK, "standard input: a copy can be resumed only between two ends that keep their bytes"),
        (
            DISK,
            EndpointDescription(peer="null:", size=None),
            "null:: a copy can be resumed only between two ends that keep their bytes",
        ),
    ],
    ids=["smaller source", "stream", "null"],
)
def test_ends_that_cannot_be_resumed_are_refused(
    source: EndpointDescription, destination: EndpointDescription, line: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_job(job(durable=(units(0, 8),)), source, destination)
    assert line in str(caught.value)


def test_a_destination_file_that_became_smaller_is_refused() -> None:
    with pytest.raises(UserError, match="its size is 0 bytes, but"):
        check_job(job(durable=(units(0, 1),), destination_grows=True), DISK, server(0))


# -- how the gaps are cut ----------------------------------------------------------------------------------------------


def test_gaps_are_cut_where_the_whole_was() -> None:
    durable = (Range(3 * MIB, 5 * MIB), Range(13 * MIB, 14 * MIB))
    expected = [(0, 3), (5, 8), (8, 12), (12, 13), (14, 16), (16, 20)]
    assert handed_out(durable, 20 * MIB, UNIT) == [Range(start * MIB, end * MIB) for start, end in expected]


def test_what_is_durable_may_come_unordered_and_in_pieces() -> None:
    assert handed_out((units(2, 3), units(0, 1), units(1, 2)), 4 * UNIT, UNIT) == [units(3, 4)]


def test_only_whole_blocks_are_left_out() -> None:
    durable = (Range(1000, 200 * KIB), Range(MIB - 5, MIB + 100))
    assert handed_out(durable, MIB + 100, MIB) == [Range(0, 64 * KIB), Range(192 * KIB, MIB)]


def test_an_odd_tail_that_is_durable_is_left_out() -> None:
    assert handed_out((Range(MIB, 2 * MIB + 100),), 2 * MIB + 100, MIB) == [Range(0, MIB)]


def test_the_last_of_the_gaps_are_split_so_that_workers_finish_together() -> None:
    start = GIB - 384 * MIB
    whole = handed_out((), GIB, workers=2)
    assert handed_out((Range(0, start),), GIB, workers=2) == [piece for piece in whole if piece.start >= start]


@given(
    size=st.integers(1, 64 * MIB),
    cuts=st.lists(st.integers(0, 64 * MIB), max_size=12),
    range_size=st.sampled_from([None, 64 * KIB * 7, UNIT]),
    workers=st.integers(1, 4),
)
def test_every_byte_is_either_taken_over_or_copied_once(
    size: int, cuts: list[int], range_size: int | None, workers: int
) -> None:
    ends = sorted({min(cut, size) for cut in cuts})
    durable = tuple(Range(start, end) for start, end in list(pairwise(ends))[::2])
    found = handed_out(durable, size, range_size, workers)
    assert sorted(found) == found
    covered = RangeSet(durable)
    for piece in found:
        covered.add(piece)
    assert list(covered) == [Range(0, size)]
    again = sum(piece.length for piece in found) + sum(piece.length for piece in durable) - size
    assert again <= 2 * len(durable) * 64 * KIB, "no more is copied again than whole blocks ask for"


def test_a_small_rest_needs_fewer_workers() -> None:
    whole = job(workers=4)
    assert check_job(whole, server(GIB), server(GIB)).worker_count == 4
    rest = job(workers=4, durable=(Range(0, GIB - 32 * MIB),))
    assert check_job(rest, server(GIB), server(GIB)).worker_count == 2
