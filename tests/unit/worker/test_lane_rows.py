"""worker/lane_rows.py: how much a lane asks for at a time. What it asks with is held in test_lane.py."""

from __future__ import annotations

import pytest

from nbdshard.common.limits import LANE_STRETCH_BYTES, LANE_TRIAL_STRETCHES, MIB
from nbdshard.worker.lane_rows import RequestSizes


def sizes_of_turns(of: RequestSizes, seconds_of: dict[int, float], turns: int) -> list[int]:
    """The size in each turn, where a stretch takes as long as its size bids."""
    now, found = 0.0, []
    of.begin_stretch(LANE_STRETCH_BYTES, now)
    for _ in range(turns):
        found.append(of.size)
        for _ in range(LANE_TRIAL_STRETCHES):
            now += seconds_of[of.size]
            of.begin_stretch(LANE_STRETCH_BYTES, now)
    return found


@pytest.mark.parametrize(("seconds", "kept"), [((1.0, 2.0), MIB), ((2.0, 1.0), MIB // 2), ((1.0, 1.0), MIB)])
def test_both_sizes_have_two_turns_and_the_faster_one_is_kept(seconds: tuple[float, float], kept: int) -> None:
    sizes = RequestSizes(MIB, varies=True)
    took = {MIB: seconds[0], MIB // 2: seconds[1]}
    assert sizes_of_turns(sizes, took, 6) == [MIB, MIB // 2, MIB, MIB // 2, kept, kept]


def test_the_size_that_was_asked_for_is_the_only_one() -> None:
    assert set(sizes_of_turns(RequestSizes(MIB, varies=False), {MIB: 1.0}, 6)) == {MIB}


def test_one_slow_turn_does_not_decide() -> None:
    sizes = RequestSizes(MIB, varies=True)
    now = 0.0
    sizes.begin_stretch(LANE_STRETCH_BYTES, now)
    for seconds in (9.0, 2.0, 1.0, 2.0):  # a turn each: 1 MiB, half, 1 MiB, half
        for _ in range(LANE_TRIAL_STRETCHES):
            now += seconds
            sizes.begin_stretch(LANE_STRETCH_BYTES, now)
    assert sizes.size == MIB


@pytest.mark.parametrize("disturb", ["pause", "short"])
def test_a_turn_that_was_interrupted_begins_anew(disturb: str) -> None:
    sizes = RequestSizes(MIB, varies=True)
    for now in range(LANE_TRIAL_STRETCHES):  # one more would end the turn
        sizes.begin_stretch(LANE_STRETCH_BYTES, float(now))
    if disturb == "pause":
        sizes.pause()
    else:
        sizes.begin_stretch(LANE_STRETCH_BYTES - 1, 10.0)
    for now in range(100, 100 + LANE_TRIAL_STRETCHES):
        sizes.begin_stretch(LANE_STRETCH_BYTES, float(now))
        assert sizes.size == MIB
    sizes.begin_stretch(LANE_STRETCH_BYTES, 200.0)
    assert sizes.size == MIB // 2
