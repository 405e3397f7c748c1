"""Rounds of commands in alternation: real ones, that do little."""

from __future__ import annotations

import math

from benchmarks.series import SLOW_ROUNDS, Runner, alternate


def test_each_command_has_its_turn_in_every_round() -> None:
    runners = [Runner("one", ["sleep", "0.1"]), Runner("other", ["sleep", "0.1"])]
    found = alternate(runners, 3, math.inf, lambda: None)
    assert [len(series.samples) for series in found] == [3, 3]


def test_a_command_that_is_slower_than_the_others_by_far_leaves_the_later_rounds_to_them() -> None:
    runners = [Runner("quick", ["true"]), Runner("slow", ["sleep", "0.5"])]
    found = alternate(runners, 4, math.inf, lambda: None)
    assert [len(series.samples) for series in found] == [4, SLOW_ROUNDS]


def test_a_command_alone_is_never_slow() -> None:
    assert len(alternate([Runner("alone", ["sleep", "0.05"])], 4, math.inf, lambda: None)[0].samples) == 4


def test_a_command_with_fewer_rounds_leaves_the_later_ones_to_the_others() -> None:
    runners = [Runner("one", ["sleep", "0.1"]), Runner("other", ["sleep", "0.1"], 2)]
    found = alternate(runners, 4, math.inf, lambda: None)
    assert [len(series.samples) for series in found] == [4, 2]


def test_a_command_that_failed_is_not_run_again() -> None:
    found = alternate([Runner("broken", ["false"])], 3, math.inf, lambda: None)
    assert (len(found[0].samples), bool(found[0].failed)) == (0, True)
