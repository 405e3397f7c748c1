"""coordinator/tempo.py: how fast a worker gets on, and how much of the export it is given at a time."""

from __future__ import annotations

from nbdshard.common.limits import MIB, RANGE_SECONDS, TEMPO_SECONDS
from nbdshard.coordinator.tempo import Tempo


def test_of_a_new_worker_nothing_is_known() -> None:
    assert Tempo().lease_bytes(None) is None


def test_its_speed_is_what_it_completed_in_the_latest_second() -> None:
    tempo = Tempo()
    tempo.begin(100.0)
    tempo.count(MIB, 100.0 + TEMPO_SECONDS / 2)
    assert tempo.speed is None
    tempo.count(MIB, 100.0 + TEMPO_SECONDS)
    assert tempo.speed == 2 * MIB / TEMPO_SECONDS
    tempo.count(8 * MIB, 100.0 + 3 * TEMPO_SECONDS)
    assert tempo.speed == 4 * MIB / TEMPO_SECONDS
    assert tempo.lease_bytes(None) == RANGE_SECONDS * tempo.speed


def test_the_time_without_work_does_not_count_and_short_leases_are_added_up() -> None:
    tempo = Tempo()
    for turn in range(4):
        tempo.begin(1000.0 * turn)
        tempo.count(MIB, 1000.0 * turn + TEMPO_SECONDS / 4)
    assert tempo.speed == 4 * MIB / TEMPO_SECONDS


def test_a_report_that_takes_something_back_counts_for_nothing() -> None:
    tempo = Tempo()
    tempo.begin(0.0)
    tempo.count(-MIB, TEMPO_SECONDS)
    assert tempo.speed == 0.0


def test_the_share_of_the_rate_counts_from_the_beginning_and_the_smaller_of_both() -> None:
    tempo = Tempo()
    assert tempo.lease_bytes(MIB) == RANGE_SECONDS * MIB
    tempo.begin(0.0)
    tempo.count(2 * MIB, 1.0)
    assert tempo.lease_bytes(MIB) == RANGE_SECONDS * MIB
    assert tempo.lease_bytes(4 * MIB) == RANGE_SECONDS * 2 * MIB
