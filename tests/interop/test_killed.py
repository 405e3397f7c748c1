"""`nbdshard serve` is killed at random moments, and what was flushed is there: every chain that keeps anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.chains import CHAINS, SIZE, STORES
from support.killing import Lost, survives

PASSING = ("delay", "error", "log", "rate", "retry", "stats")  # layers that keep nothing: the long suite has them
KEEPING = {name: chain for name, chain in CHAINS.items() if "memory" not in name}
SHORT = [name for name in KEEPING if not name.startswith(PASSING)]


@pytest.mark.parametrize("name", SHORT)
def test_what_was_flushed_is_there_after_it_was_killed(name: str, seed: int, tmp_path: Path) -> None:
    chain = KEEPING[name]
    with chain.ready(tmp_path) as conn:
        survives(conn, chain.driver, SIZE, seed)


@pytest.mark.long
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("attempt", range(5))
def test_what_was_flushed_is_there_however_often_it_was_killed(
    name: str, seed: int, attempt: int, tmp_path: Path
) -> None:
    chain = KEEPING[name]
    with chain.ready(tmp_path) as conn:
        survives(conn, chain.driver, SIZE, seed * 1000 + attempt, rounds=6)


def test_an_export_that_keeps_nothing_is_found_out(seed: int, tmp_path: Path) -> None:
    chain = STORES["raw memory"]
    with chain.ready(tmp_path) as conn, pytest.raises(Lost, match=f"seed {seed}: sector"):
        survives(conn, chain.driver, SIZE, seed)
