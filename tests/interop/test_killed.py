"""`nbdshard serve` is killed at random moments, and what was flushed is there: every chain that keeps anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.chains import SIZE, STORES, Chain
from support.killing import KEEPING, KEEPING_SHORT, Lost, survives


@pytest.mark.parametrize("chain", KEEPING_SHORT.values(), ids=KEEPING_SHORT)
def test_what_was_flushed_is_there_after_it_was_killed(chain: Chain, seed: int, tmp_path: Path) -> None:
    with chain.ready(tmp_path) as conn:
        survives(conn, chain.driver, SIZE, seed)


@pytest.mark.long
@pytest.mark.parametrize("chain", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("attempt", range(5))
def test_what_was_flushed_is_there_however_often_it_was_killed(
    chain: Chain, seed: int, attempt: int, tmp_path: Path
) -> None:
    with chain.ready(tmp_path) as conn:
        survives(conn, chain.driver, SIZE, seed * 1000 + attempt, rounds=6)


def test_an_export_that_keeps_nothing_is_found_out(seed: int, tmp_path: Path) -> None:
    chain = STORES["raw memory"]
    with chain.ready(tmp_path) as conn, pytest.raises(Lost, match=f"seed {seed}: sector"):
        survives(conn, chain.driver, SIZE, seed)
