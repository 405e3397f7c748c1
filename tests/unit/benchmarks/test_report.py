"""The page that a run writes."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.report import best_of, bullets, page, table
from benchmarks.results import CheckpointCost, Results
from support.benchmark_runs import point, row, series, whole

PAGE = page(whole(), "## Notes\n\nBy hand.\n")
MIB = 1 << 20


def lines_with(*words: str, text: str = PAGE) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_the_page_ends_with_the_notes_kept_by_hand() -> None:
    assert PAGE.endswith("\n## Notes\n\nBy hand.\n")


def test_the_page_tells_the_machine_and_the_versions() -> None:
    assert lines_with("processor", "Processor 9000, 2 cores")
    assert lines_with("versions", "nbdshard 0.1.0, nbdcopy 1.14.2")
    assert lines_with("date", "2026-01-02 03:04 UTC; the run took 10.0 minutes")


def test_a_row_tells_medians_ratios_and_whether_its_figure_is_met() -> None:
    (wall, cpu) = lines_with("**first**", "8 GiB")
    assert "| 2.00 (2.00 to 2.00) | 3.00 (3.00 to 3.00) | 4.00 (4.00 to 4.00) | 1.50 | 2.00 |" in wall
    assert wall.endswith("| at least 1.5 / 1 | met |")
    assert cpu.endswith("| 0.50 | 0.50 | at most 0.45 | **not met** |")


def test_a_row_that_was_not_run_says_why() -> None:
    assert lines_with("**memory**", "not run: it needs 9 GiB of memory, 2 GiB are free")


def test_what_the_servers_took_bounds_the_speed() -> None:
    rows = [row((2.0, 1.0), (3.0, 2.0), (4.0, 2.0), servers=2.0), row(name="from-file")]
    text = page(msgspec.structs.replace(whole(), rows=rows), "")
    assert lines_with("| first | 2.00 | 2.00 | 2.00 | 75% | 67% | 50% | 3.00 |", text=text)
    assert not lines_with("| from-file | ", "%", text=text)


def test_other_options_stand_beside_the_default() -> None:
    (line,) = lines_with("`--ring epoll`")
    assert "| 2.60 (2.60 to 2.60) |" in line
    assert line.endswith("| 1.30 | at most 1.25 x the default's time | **not met** |")


def test_what_a_copy_left_behind_is_told_with_how_it_was_proven() -> None:
    (line,) = lines_with("| sparse |", "identical")
    assert line == "| sparse | identical | not identical: Content mismatch at offset 4096! | 1 GiB | 2 GiB |"


def test_the_memory_of_each_process_is_told() -> None:
    assert lines_with("| sparse | 20 MiB | 40 MiB, 30 MiB | 70 MiB |")


def test_remarks_and_failures_are_listed() -> None:
    results = whole()
    failed = msgspec.structs.replace(series("qemu-img", []), failed="`qemu-img` ended with 1: no")
    broken = msgspec.structs.replace(results.rows[0], series=[failed])
    text = page(msgspec.structs.replace(results, rows=[broken, results.rows[1]]), "")
    assert lines_with("- first: qemu-img failed: `qemu-img` ended with 1: no", text=text)
    assert lines_with("- sparse: nbdcopy: a remark", text=text)
    assert lines_with("**first**", "no numbers", text=text)


def test_scaling_is_a_table_of_workers_by_connections() -> None:
    assert lines_with("|  | 1 connection | 4 connections | 8 connections |")
    assert lines_with("| 2 workers | - | 2.00 / 1.00 | 1.60 / 0.80 |")


def test_the_default_is_set_beside_the_fastest() -> None:
    assert lines_with("The fastest here: 2 workers and 8 connections, 1.60 s. The default is 2 workers and 4 conn")
    assert lines_with("The default is requests of 1 MiB: 2.00 s, 0% more.")


def test_a_default_that_was_not_measured_is_not_judged() -> None:
    assert best_of([point(1, 1, 1.0)], (2, 4, MIB), lambda _: "it") == "The default was not measured."


def test_checkpoints_are_told_by_what_they_would_cost_at_the_default_interval() -> None:
    (line,) = lines_with("| 1 GiB | every 0.5 s |")
    assert line.endswith("| +10.0% | +1.0% | under 3% at the default interval | met |")
    dear = CheckpointCost(MIB, 0.5, series("nbdshard", [2.8]), series("nbdshard", [2.0]))
    text = page(msgspec.structs.replace(whole(), checkpoints=[dear]), "")
    assert lines_with("| +40.0% | +4.0% | under 3% at the default interval | **not met** |", text=text)


def test_the_control_plane_tells_rates_and_cost() -> None:
    assert lines_with("| ipc | 10 | 20,000 | 2,000 | 80% of a core, 400 us a lease |", "| met |")
    assert lines_with("| tcp | 100 | 500 | 500 |", "**not met**")
    assert lines_with("| 100,000 | 200,000 | 15.0 |")
    assert lines_with("Asked for: flat", "**not met**")


def test_a_quick_run_says_that_it_proves_nothing() -> None:
    assert not lines_with("A quick run")
    assert lines_with("A quick run", text=page(msgspec.structs.replace(whole(), quick=True), ""))


def test_parts_that_were_not_run_have_no_section() -> None:
    bare = Results(whole().machine, quick=True, rounds=1, seconds=1.0, steal=0.0)
    headings = [line for line in page(bare, "").splitlines() if line.startswith("#")]
    assert headings == ["# Benchmarks", "## The machine", "## How it was measured"]


def test_short_lines_of_a_table_are_filled_up() -> None:
    assert table(("a", "b"), [("1",)]) == "| a | b |\n| --- | --- |\n| 1 |  |"


@pytest.mark.parametrize(("lines", "text"), [([], ""), (["x", "y"], "- x\n- y")])
def test_lists_have_a_line_each(lines: list[str], text: str) -> None:
    assert bullets(lines) == text
