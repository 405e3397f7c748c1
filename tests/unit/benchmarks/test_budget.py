"""How time is shared out among the parts of a run, and how many rounds fit."""

from __future__ import annotations

import pytest

from benchmarks.budget import ROUNDS_SHARE, Budget, Rounds, alternating


def test_a_part_gets_its_share_of_what_is_left() -> None:
    budget = Budget(100.0, {"long": 3.0, "short": 1.0}, now=1000.0)
    assert budget.begin("long", 1000.0) == pytest.approx(1000.0 + 75.0 * ROUNDS_SHARE)
    assert budget.begin("short", 1075.0) == pytest.approx(1075.0 + 25.0 * ROUNDS_SHARE)


def test_what_a_part_leaves_over_is_the_next_ones() -> None:
    budget = Budget(100.0, {"first": 1.0, "second": 1.0}, now=0.0)
    budget.begin("first", 0.0)
    assert budget.begin("second", 10.0) == pytest.approx(10.0 + 90.0 * ROUNDS_SHARE)


def test_a_part_that_begins_too_late_gets_no_time() -> None:
    budget = Budget(10.0, {"first": 1.0, "second": 1.0}, now=0.0)
    budget.begin("first", 0.0)
    assert budget.begin("second", 20.0) == 20.0


def test_a_budget_is_spent_at_its_end() -> None:
    budget = Budget(10.0, {"only": 1.0}, now=5.0)
    assert not budget.is_spent(14.9)
    assert budget.is_spent(15.0)


def made(wanted: int, deadline: float, round_seconds: float) -> int:
    """How many rounds are made that take so long each."""
    rounds, now = Rounds(wanted, deadline), 0.0
    while rounds.another(now):
        now += round_seconds
    return rounds.made


def test_no_more_rounds_are_made_than_are_wanted() -> None:
    assert made(5, deadline=100.0, round_seconds=1.0) == 5


def test_a_round_that_would_end_too_late_is_not_begun() -> None:
    assert made(5, deadline=10.0, round_seconds=4.0) == 2


def test_a_round_is_expected_to_take_as_long_as_the_one_before() -> None:
    """The first rounds may be of more commands than the others."""
    rounds = Rounds(wanted=5, deadline=10.0)
    assert rounds.another(0.0)
    assert rounds.another(4.0)
    assert rounds.another(6.0)
    assert rounds.another(8.0)
    assert not rounds.another(10.0)


def test_one_round_is_made_however_little_time_there_is() -> None:
    assert made(5, deadline=-1.0, round_seconds=4.0) == 1


def test_every_tool_begins_a_round_in_its_turn() -> None:
    orders = [list(alternating("abc", turn)) for turn in range(4)]
    assert orders == [list("abc"), list("bca"), list("cab"), list("abc")]
