"""The command lines that are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.commands import TOOLS, compare_command, copy_command, map_command, scaled_options, shown

ENDS = ("nbd://a/", "nbd://b/")


def command(tool: str, *, detects_zeroes: bool, more: tuple[str, ...] = ()) -> list[str]:
    name, *words = copy_command(tool, *ENDS, detects_zeroes=detects_zeroes, more=more)
    return [Path(name).name, *words]


def test_nbdshard_is_run_as_users_run_it() -> None:
    assert command("nbdshard", detects_zeroes=True) == ["nbdshard", "copy", *ENDS]
    assert command("nbdshard", detects_zeroes=False) == ["nbdshard", "copy", "-S", "0", *ENDS]


def test_nbdcopy_is_told_to_flush_because_the_others_do() -> None:
    assert command("nbdcopy", detects_zeroes=True) == ["nbdcopy", "--flush", *ENDS]


def test_qemu_img_writes_out_of_order_with_as_many_requests_as_it_takes() -> None:
    assert command("qemu-img", detects_zeroes=False)[:6] == ["qemu-img", "convert", "-n", "-W", "-m", "16"]


@pytest.mark.parametrize("tool", TOOLS)
def test_without_zero_detection_every_tool_is_told_so(tool: str) -> None:
    assert command(tool, detects_zeroes=False)[-4:-2] == ["-S", "0"]
    assert "-S" not in command(tool, detects_zeroes=True)


def test_further_options_stand_before_the_ends() -> None:
    assert command("nbdshard", detects_zeroes=True, more=("--ring", "epoll"))[-4:] == ["--ring", "epoll", *ENDS]


def test_a_tool_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="cp is none of nbdshard, nbdcopy, qemu-img"):
        command("cp", detects_zeroes=True)


def test_a_page_shows_no_path_of_the_machine() -> None:
    assert shown("nbdshard", detects_zeroes=False) == "nbdshard copy -S 0 SOURCE DESTINATION"


def test_the_points_of_the_scaling_tables_are_options() -> None:
    assert scaled_options(2, 4, 65536) == ["-T", "2", "-C", "4", "--request-size", "65536"]


def test_what_was_copied_is_compared_and_counted() -> None:
    assert compare_command(*ENDS) == ["qemu-img", "compare", "-f", "raw", "-F", "raw", *ENDS]
    assert map_command(ENDS[1])[1:] == ["map", "--totals", "--json", ENDS[1]]
