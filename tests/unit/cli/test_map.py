"""cli/map.py: the pure parts, and local files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdshard.cli.main import main
from nbdshard.cli.map import Extent, extents_of_file, merged, totals
from nbdshard.common.ranges import Range

MIB = 1 << 20


def test_neighbours_of_one_type_become_one() -> None:
    extents: list[Extent] = [(Range(0, 4), 0), (Range(4, 8), 0), (Range(8, 12), 3), (Range(12, 16), 0)]
    assert list(merged(extents)) == [(Range(0, 8), 0), (Range(8, 12), 3), (Range(12, 16), 0)]


def test_no_extents_stay_none() -> None:
    assert list(merged([])) == []


def test_totals_are_by_type_in_ascending_order() -> None:
    extents: list[Extent] = [(Range(0, 4), 3), (Range(4, 5), 0), (Range(5, 10), 3), (Range(10, 12), 2)]
    assert list(totals(extents).items()) == [(0, 1), (2, 2), (3, 9)]


@pytest.fixture
def sparse_file(tmp_path: Path) -> Path:
    """1 MiB hole, 1 MiB data, 1 MiB hole."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(3 * MIB)
        file.seek(MIB)
        file.write(b"x" * MIB)
    return path


def test_the_map_of_a_file_shows_its_holes(sparse_file: Path) -> None:
    descriptor = os.open(sparse_file, os.O_RDONLY)
    try:
        assert list(merged(extents_of_file(descriptor, 3 * MIB))) == [
            (Range(0, MIB), 3),
            (Range(MIB, 2 * MIB), 0),
            (Range(2 * MIB, 3 * MIB), 3),
        ]
    finally:
        os.close(descriptor)


def test_the_map_of_an_empty_file_is_empty(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    assert main(["map", str(tmp_path / "empty")]) == 0
    assert main(["map", "--json", str(tmp_path / "empty")]) == 0
    assert main(["map", "--totals", str(tmp_path / "empty")]) == 0
    assert capfd.readouterr().out == "[]\n"


def test_the_columns_are_those_of_nbdinfo(sparse_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(sparse_file)]) == 0
    assert capfd.readouterr().out == (
        "         0     1048576    3  hole,zero\n"
        "   1048576     1048576    0  data\n"
        "   2097152     1048576    3  hole,zero\n"
    )
    assert main(["map", "--totals", str(sparse_file)]) == 0
    assert capfd.readouterr().out == "   1048576  33.3%   0 data\n   2097152  66.7%   3 hole,zero\n"


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (["map"], 2, "the URI is missing; see --help"),
        (["map", "a", "b"], 2, "one word too many: 'b'"),
        (
            ["map", "[", "nbdkit", "]"],
            2,
            "[ nbdkit ]: a command is for nbdshard copy; give the URI of a server that runs",
        ),
        (["map", "-"], 1, "-: map takes the URI of an NBD export, or a file"),
        (["map", "/dev/null"], 1, "/dev/null: neither a file nor a block device"),
        (["map", "/nosuch"], 1, "/nosuch: no such file or directory"),
        (["info", "/nosuch"], 1, "/nosuch: info takes the URI of an NBD export; such as nbd://host/name"),
        (["info", "ftp://x"], 1, "ftp://x: unknown scheme 'ftp'"),
    ],
)
def test_a_wrong_operand_is_one_line(argv: list[str], code: int, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"nbdshard: {line}")
