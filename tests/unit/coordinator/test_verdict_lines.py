"""coordinator/verdict_lines.py: what people are told of a comparison."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nbdshard.common.messages import Counters
from nbdshard.common.ranges import Range
from nbdshard.coordinator.job import Comparison, Outcome, Verdict
from nbdshard.coordinator.progress import summary
from nbdshard.coordinator.verdict_lines import comparison_summary, difference_lines, size_line
from support.statuses import OUTCOME

MIB = 1 << 20
SAME = Comparison(Counters(compared=3 * MIB, skipped=MIB), 0, (), is_cut=False, sizes=(4 * MIB, 4 * MIB))
OTHER = replace(SAME, differing=1024, differences=(Range(512, 1536),))


def compared(verdict: Verdict, found: Comparison) -> Outcome:
    return replace(OUTCOME, verdict=verdict, counters=found.counters, size=4 * MIB, comparison=found)


def test_each_range_has_a_line_as_far_as_they_are_shown() -> None:
    ranges = tuple(Range.of(number * 4096, 512) for number in range(12))
    assert difference_lines(SAME) == []
    assert difference_lines(OTHER) == ["differ: offset 512, 1024 bytes"]
    ten = replace(OTHER, differences=ranges[:10], differing=5120)
    assert difference_lines(ten) == [f"differ: offset {number * 4096}, 512 bytes" for number in range(10)]
    more = "differ: and more behind these, 6144 bytes in all"
    assert difference_lines(replace(OTHER, differences=ranges, differing=6144))[10:] == [more]
    assert difference_lines(replace(ten, differing=6144, is_cut=True))[10:] == [more]


def test_two_sizes_are_told_and_one_is_not() -> None:
    assert size_line(compared(Verdict.COMPLETE, SAME)) == ""
    assert size_line(compared(Verdict.COMPLETE, replace(SAME, sizes=None))) == ""
    line = size_line(compared(Verdict.COMPLETE, replace(SAME, sizes=(4 * MIB, 512))))
    assert "has 4194304 bytes" in line
    assert line.endswith(" 512; what only one of them has must be zeroes")


@pytest.mark.parametrize(
    ("verdict", "found", "head"),
    [
        (Verdict.COMPLETE, SAME, "identical: 3 MiB compared, 1 MiB zero on both sides in 2.00 s (2 MiB/s); "),
        (Verdict.DIFFERENT, OTHER, "different: 1024 bytes (in blocks of 512) differ; 3 MiB compared"),
        (Verdict.STOPPED, SAME, "stopped before the end: 4 MiB of 4 MiB done; 3 MiB compared"),
        (Verdict.PAUSED, OTHER, "given up before the end: 1024 bytes (in blocks of 512) differ; 4 MiB of 4 MiB done"),
    ],
)
def test_the_summary_begins_with_the_answer(verdict: Verdict, found: Comparison, head: str) -> None:
    line = comparison_summary(compared(verdict, found), 2.0)
    assert line.startswith(head), line


@pytest.mark.parametrize(
    ("verdict", "found", "word"),
    [
        (Verdict.COMPLETE, SAME, "; verified"),
        (Verdict.DIFFERENT, OTHER, "; 1024 bytes (in blocks of 512) differ from the source"),
        (Verdict.STOPPED, SAME, "; 4 MiB verified"),
    ],
)
def test_the_summary_of_a_copy_ends_with_it(verdict: Verdict, found: Comparison, word: str) -> None:
    line = summary(replace(OUTCOME, verdict=verdict, comparison=replace(found, sizes=None)), 2.0)
    assert line.endswith(word), line
