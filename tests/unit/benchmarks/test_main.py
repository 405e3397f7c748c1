"""The command line of `make bench`, and where its page goes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks import main as command
from benchmarks import results
from benchmarks.rows import ROWS
from support.benchmark_runs import whole


def full() -> results.Results:
    rows = [results.Row(row.name, row.size) for row in ROWS]
    return msgspec.structs.replace(whole(), rows=rows)


def test_a_full_run_has_five_rounds_and_a_quick_one_fewer() -> None:
    assert command.parse([]).rounds == 5
    assert command.parse(["--quick"]).rounds < 5
    assert command.parse(["--quick", "--rounds", "7"]).rounds == 7


def test_a_full_run_is_bounded_by_a_quarter_of_an_hour_and_a_quick_one_by_two_minutes() -> None:
    assert command.parse([]).seconds < 15 * 60
    assert command.parse(["--quick"]).seconds < 2 * 60


def test_rows_are_chosen_by_name() -> None:
    assert command.parse(["--rows", "memory,leases"]).rows == ["memory", "leases"]


def test_a_row_that_does_not_exist_is_refused_with_the_names_of_those_that_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parse(["--rows", "memory,floppy"])
    assert ended.value.code == 2
    assert "'floppy' is none of first, first-zeroes" in capsys.readouterr().err


def test_only_a_whole_run_makes_the_projects_page() -> None:
    assert command.is_whole(full())
    assert not command.is_whole(msgspec.structs.replace(full(), quick=True))
    assert not command.is_whole(msgspec.structs.replace(full(), rows=full().rows[1:]))
    assert not command.is_whole(msgspec.structs.replace(full(), leases=[]))
    small = [msgspec.structs.replace(row, size=row.size // 2) for row in full().rows]
    assert not command.is_whole(msgspec.structs.replace(full(), rows=small))


def test_the_page_is_written_with_its_charts(tmp_path: Path) -> None:
    command.write(whole(), tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "benchmarks-requests.svg",
        "benchmarks-rows.svg",
        "benchmarks-scaling.svg",
        "benchmarks.md",
    ]
