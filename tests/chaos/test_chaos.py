"""A short run of chaos; `make chaos` is the long one. The choices are the seed's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.chaos import run
from chaos.faults import Kind, fault, shape
from support import cutting

FAULTS = 10
CHOICES = 2000


@pytest.mark.skipif(not cutting.is_allowed(), reason="descriptors of other processes cannot be taken here")
def test_copies_under_ten_faults_are_identical_and_leave_nothing(tmp_path: Path, seed: int) -> None:
    tally = run(seed, FAULTS, tmp_path, print)
    assert sum(tally.faults.values()) == FAULTS
    assert tally.ends["0"] + tally.ends["4"] >= tally.copies >= 1


def test_the_choices_are_the_seeds_alone() -> None:
    assert [fault(3, number) for number in range(50)] == [fault(3, number) for number in range(50)]
    assert [shape(3, number) for number in range(50)] == [shape(3, number) for number in range(50)]
    assert fault(3, 1) != fault(4, 1)


def test_every_kind_of_fault_is_chosen_now_and_then() -> None:
    chosen = [fault(1, number) for number in range(CHOICES)]
    assert {one.kind for one in chosen} == set(Kind)
    assert {one.side for one in chosen} == {"source", "destination"}
