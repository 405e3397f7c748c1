"""The clock that does not count the time in which the coordinator was stopped."""

from __future__ import annotations

import pytest

from nbdshard.coordinator.clock import SteadyClock


class Time:
    """A hand-turned monotonic clock."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_it_goes_as_the_monotonic_clock_goes() -> None:
    time = Time()
    clock = SteadyClock(time)
    before = clock()
    time.seconds += 7
    clock.waited(before, 10.0)
    assert clock() - before == 7


def test_a_wait_that_is_a_little_late_is_counted() -> None:
    time = Time()
    clock = SteadyClock(time)
    before = clock()
    time.seconds += 1.9
    clock.waited(before, 1.0)
    assert clock() - before == pytest.approx(1.9)


def test_the_time_between_ctrl_z_and_fg_is_not_counted() -> None:
    time = Time()
    clock = SteadyClock(time)
    before = clock()
    time.seconds += 3600
    clock.waited(before, 1.0)
    assert clock() - before == pytest.approx(1.0)
    time.seconds += 5
    assert clock() - before == pytest.approx(6.0)
