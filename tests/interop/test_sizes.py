"""Sizes that do not match, and tails that a minimum block size puts out of reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.doubles import CMD_WRITE, CMD_WRITE_ZEROES, Double, double
from support.sides import Blocks, serve

OLD = 0xEE
TAILS = (1, 511, 513, 4095)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("minimum", [512, 4096])
def test_a_tail_that_the_source_cannot_be_asked_for_is_an_error(
    tmp_path: Path, ring: str, minimum: int, tail: int
) -> None:
    blocks, target = Blocks(minimum), Double(bytearray(b"\xee" * images.MIB))
    source = images.random_image(tmp_path / "source", 65536 + tail)
    with (
        serve("nbdkit-file", source, filters=blocks.filters, args=blocks.args, flags=["-r"]) as source_uri,
        double(target) as destination_uri,
    ):
        copy("--ring", ring, source_uri, destination_uri).failed(1, saying=["minimum block size", str(minimum)])
    assert target.count(CMD_WRITE) + target.count(CMD_WRITE_ZEROES) == 0


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("zeroes", [False, True], ids=["data", "zeroes"])
def test_a_short_tail_changes_nothing_behind_it_in_the_destinations_block(
    tmp_path: Path, ring: str, tail: int, zeroes: bool
) -> None:
    blocks, size = Blocks(4096), images.MIB + tail
    source = images.empty_image(tmp_path / "source", size) if zeroes else images.random_image(tmp_path / "source", size)
    destination = images.filled_image(tmp_path / "destination", images.MIB + 8192, OLD)
    with (
        serve("nbdkit-file", source, flags=["-r"]) as source_uri,
        serve("nbdkit-file", destination, filters=blocks.filters, args=blocks.args) as destination_uri,
    ):
        copy("--ring", ring, "--workers", "2", source_uri, destination_uri).succeeded()
    images.assert_begins_with(destination, source, rest=OLD)


def test_a_source_smaller_than_the_destinations_block_is_copied(tmp_path: Path, ring: str) -> None:
    source = images.random_image(tmp_path / "source", 100)
    destination = images.filled_image(tmp_path / "destination", 4096, OLD)
    blocks = Blocks(4096)
    with serve("nbdkit-file", destination, filters=blocks.filters, args=blocks.args) as uri:
        copy("--ring", ring, source, uri).succeeded()
    images.assert_begins_with(destination, source, rest=OLD)


def test_a_destination_one_byte_smaller_is_refused_before_anything_is_written(tmp_path: Path, ring: str) -> None:
    source, target = images.random_image(tmp_path / "source", 65536), Double(bytearray(b"\xee" * 65535))
    with double(target) as uri:
        copy("--ring", ring, source, uri).failed(1, saying=["smaller", "65535", "65536"])
    assert target.content == b"\xee" * 65535
    assert target.count(CMD_WRITE) + target.count(CMD_WRITE_ZEROES) == 0


def test_a_larger_destination_keeps_what_lies_behind_the_source(tmp_path: Path, ring: str) -> None:
    source = images.sparse_image(tmp_path / "source", images.MIB + 511)
    destination = images.filled_image(tmp_path / "destination", 5 * images.MIB, OLD)
    with serve("nbdkit-file", source, flags=["-r"]) as one, serve("nbdkit-file", destination) as two:
        copy("--ring", ring, one, two).succeeded()
    images.assert_begins_with(destination, source, rest=OLD)


def test_an_empty_source_copies_nothing_and_succeeds(tmp_path: Path, ring: str) -> None:
    source = images.empty_image(tmp_path / "source", 0)
    destination = images.filled_image(tmp_path / "destination", 4096, OLD)
    with serve("nbdkit-file", source, flags=["-r"]) as one, serve("nbdkit-file", destination) as two:
        copy("--ring", ring, one, two).succeeded()
    assert destination.read_bytes() == bytes([OLD]) * 4096


@pytest.mark.parametrize("size", images.ODD_SIZES)
def test_an_odd_size_is_copied_from_server_to_file_and_back(tmp_path: Path, ring: str, size: int) -> None:
    source, middle = images.sparse_image(tmp_path / "source", size), tmp_path / "middle"
    destination = images.filled_image(tmp_path / "destination", size, OLD)
    with serve("nbdkit-file", source, flags=["-r"]) as uri:
        copy("--ring", ring, uri, middle).succeeded()
    with serve("nbdkit-file", destination) as uri:
        copy("--ring", ring, middle, uri).succeeded()
    images.assert_identical(source, middle)
    images.assert_identical(source, destination)
