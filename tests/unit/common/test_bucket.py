"""The token bucket: never more than the rate and a burst, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common.bucket import Bucket
from nbdshard.common.limits import MIB, RATE_BURST_SECONDS

REQUEST = MIB
RATES = st.integers(min_value=1, max_value=16 * MIB)
WAITS = st.floats(min_value=0.0, max_value=3.0)
SIZES = st.integers(min_value=REQUEST // 8, max_value=REQUEST)


def bucket(rate: int | None, now: float = 100.0) -> Bucket:
    one = Bucket(REQUEST, now)
    one.set(rate, now)
    return one


@settings(deadline=None)  # of other processes, not of this test
@given(RATES, st.lists(st.tuples(WAITS, SIZES), max_size=30))
def test_over_any_window_no_more_is_read_than_the_rate_and_a_burst(rate: int, steps: list[tuple[float, int]]) -> None:
    one, now, taken = bucket(rate), 100.0, list[tuple[float, int]]()  # when, and how much then
    for wait, size in steps:
        now += wait
        total = 0
        while one.admits(size, now):
            one.take(size)
            total += size
        taken.append((now, total))
    for first, (since, _) in enumerate(taken):
        total = 0
        for at, size in taken[first:]:
            total += size
            assert total <= rate * (at - since) + one.burst + 1


@settings(deadline=None)  # of other processes, not of this test
@given(st.lists(st.tuples(WAITS, st.one_of(st.none(), st.just(0), RATES), st.booleans()), max_size=40))
def test_rates_that_change_all_the_time_give_no_more_than_their_sum(
    steps: list[tuple[float, int | None, bool]],
) -> None:
    """Of the time at any limit, and one burst for the highest of the rates; what was unlimited does not count."""
    one, now, allowed, taken, bursts = bucket(0), 100.0, 0.0, 0, [0.0]
    for wait, rate, reads in steps:
        allowed += (one.rate or 0) * wait
        now += wait
        while reads and one.rate is not None and one.admits(REQUEST, now):
            one.take(REQUEST)
            taken += REQUEST
        one.set(rate, now)
        bursts.append(one.burst if rate is not None else 0.0)
    assert taken <= allowed + max(bursts) + 1


@settings(deadline=None)  # of other processes, not of this test
@given(RATES, SIZES)
def test_who_asks_again_when_it_is_told_to_is_admitted(rate: int, size: int) -> None:
    one = bucket(rate)
    assert not one.admits(size, 100.0)
    ready = one.ready_at()
    assert ready is not None
    assert ready > 100.0
    one.ask_again()
    assert one.admits(size, ready)
    assert one.ready_at() is None


@pytest.mark.parametrize("rate", [MIB // 100, 100 * MIB])
def test_what_is_not_used_is_kept_for_a_quarter_of_a_second_or_one_request(rate: int) -> None:
    one = bucket(rate)
    most = max(int(rate * RATE_BURST_SECONDS), REQUEST)
    assert one.burst == most
    assert one.admits(most, 1_000_000.0)
    assert not one.admits(most + 1, 2_000_000.0)


def test_a_bucket_begins_empty_and_without_a_limit() -> None:
    one = Bucket(REQUEST, 100.0)
    assert one.admits(1 << 60, 100.0)
    one.take(1 << 60)
    one.set(MIB, 200.0)
    assert not one.admits(1, 200.0)
    assert one.admits(REQUEST, 201.0)


def test_a_closed_bucket_admits_nothing_and_has_nobody_wait_for_a_time() -> None:
    one = bucket(MIB)
    one.set(0, 101.0)
    assert one.is_closed
    assert not one.admits(1, 1000.0)
    assert one.ready_at() is None


def test_what_is_given_back_can_be_taken_again_and_fills_the_bucket_no_further() -> None:
    one = bucket(4 * MIB)
    assert one.admits(MIB, 101.0)
    one.take(MIB)
    assert not one.admits(MIB, 101.0)
    one.give_back(MIB)
    one.give_back(MIB)
    assert one.admits(MIB, 101.0)
    assert not one.admits(MIB + 1, 101.0)


def test_more_than_there_is_is_made_up_for() -> None:
    one = bucket(MIB)
    one.take(MIB)
    assert not one.admits(1, 101.0)
    assert one.admits(MIB, 102.0)


def test_a_clock_that_goes_back_brings_nothing() -> None:
    one = bucket(MIB)
    assert not one.admits(MIB, 100.5)
    assert not one.admits(MIB, 90.0)
    assert not one.admits(MIB, 100.9)
    assert one.admits(MIB, 101.0)
