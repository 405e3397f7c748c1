"""Records of a run: to JSON and back, and the medians of samples."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.results import load, save
from support.benchmark_runs import row, series, whole


def test_results_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    save(whole(), tmp_path / "results.json")
    assert load(tmp_path / "results.json") == whole()


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(whole(), path)
    path.write_text(path.read_text().replace('"steal"', '"stolen"'))
    with pytest.raises(msgspec.ValidationError, match="stolen"):
        load(path)


def test_what_counts_is_the_median() -> None:
    taken = series("nbdshard", [1.0, 9.0, 2.0], [0.5, 0.1, 0.4])
    assert (taken.wall, taken.cpu) == (2.0, 0.4)


def test_a_series_without_samples_is_not_found_in_its_row() -> None:
    broken = msgspec.structs.replace(row(), series=[series("nbdshard", [])])
    assert broken.of("nbdshard") is None
    assert row().of("nbdshard") is not None
