"""Zeroes: not read where the source says so, found in data, written as zeroes, skipped, or allocated, as asked."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.doubles import (
    CMD_BLOCK_STATUS,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    EIO,
    HOLE,
    INFO_EXPORT,
    REP_ACK,
    REP_INFO,
    Double,
    Request,
    Talk,
    double,
)
from support.servers import nbdkit, qemu_nbd

SIZE = 6 * images.MIB
GIB = 1 << 30
NO_HOLE = 2


def islands(path: Path) -> Path:
    """Data in the first and the last MiB, 4 MiB of hole between them."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(images.random_bytes(images.MIB))
        file.seek(SIZE - images.MIB)
        file.write(images.random_bytes(images.MIB, 2))
    return path


def sums(line: str) -> tuple[str, str, str]:
    """What the summary says was copied, zeroed and skipped."""
    found = re.search(r"([\d.]+ \w+) copied, ([\d.]+ \w+) zeroed, ([\d.]+ \w+) skipped", line)
    assert found is not None, line
    return found[1], found[2], found[3]


def test_holes_of_the_source_are_not_read_and_zeroed_in_the_destination(tmp_path: Path, ring: str) -> None:
    source, target = islands(tmp_path / "source"), Double(bytearray(b"\xee" * SIZE))
    with nbdkit("file", str(source), flags=["-r"]) as server, double(target) as uri:
        outcome = copy("--ring", ring, server.uri, uri).succeeded()
    assert target.content == source.read_bytes()
    assert sums(outcome.last_line) == ("2 MiB", "4 MiB", "0 B")
    assert sum(request.length for request in target.requests if request.command == CMD_WRITE) == 2 * images.MIB
    assert sum(request.length for request in target.requests if request.command == CMD_WRITE_ZEROES) == 4 * images.MIB


def test_zeroes_are_never_written_by_trim(tmp_path: Path, ring: str) -> None:
    source, target = islands(tmp_path / "source"), Double(bytearray(b"\xee" * SIZE), flags=0x1ED | 32)
    with nbdkit("file", str(source), flags=["-r"]) as server, double(target) as uri:
        copy("--ring", ring, server.uri, uri).succeeded()
    assert target.count(CMD_TRIM) == 0
    assert target.content == source.read_bytes()


def test_a_destination_that_is_zero_gets_no_zeroes(tmp_path: Path, ring: str) -> None:
    source, target = islands(tmp_path / "source"), Double(bytearray(SIZE))
    with nbdkit("file", str(source), flags=["-r"]) as server, double(target) as uri:
        outcome = copy("--ring", ring, "--destination-is-zero", server.uri, uri).succeeded()
    assert target.count(CMD_WRITE_ZEROES) == 0
    assert target.content == source.read_bytes()
    assert sums(outcome.last_line) == ("2 MiB", "0 B", "4 MiB")


def test_zeroes_in_data_are_found_in_units_of_4_kib(ring: str) -> None:
    content = bytearray(images.random_bytes(SIZE))
    content[images.MIB : 2 * images.MIB] = bytes(images.MIB)
    content[3 * images.MIB : 3 * images.MIB + 4096] = bytes(4096)
    source, target = Double(content, extents=False), Double(bytearray(b"\xee" * SIZE))
    with double(source) as one, double(target) as two:
        copy("--ring", ring, one, two).succeeded()
    assert target.content == content
    zeroed = sum(request.length for request in target.requests if request.command == CMD_WRITE_ZEROES)
    assert zeroed == images.MIB + 4096


def test_sparse_0_looks_for_no_zeroes(ring: str) -> None:
    source, target = Double(bytearray(SIZE), extents=False), Double(bytearray(b"\xee" * SIZE))
    with double(source) as one, double(target) as two:
        copy("--ring", ring, "-S", "0", one, two).succeeded()
    assert target.content == bytes(SIZE)
    assert target.count(CMD_WRITE_ZEROES) == 0


def test_allocated_asks_for_no_holes_and_detects_no_zeroes(tmp_path: Path, ring: str) -> None:
    source, target = islands(tmp_path / "source"), Double(bytearray(b"\xee" * SIZE))
    with nbdkit("file", str(source), flags=["-r"]) as server, double(target) as uri:
        copy("--ring", ring, "--allocated", server.uri, uri).succeeded()
    zeroes = [request for request in target.requests if request.command == CMD_WRITE_ZEROES]
    assert zeroes
    assert all(request.flags & NO_HOLE for request in zeroes)
    assert target.content == source.read_bytes()


def test_allocated_fills_the_file_of_a_real_server(tmp_path: Path, ring: str) -> None:
    source, destination = islands(tmp_path / "source"), images.empty_image(tmp_path / "destination", SIZE)
    with nbdkit("file", str(source), flags=["-r"]) as one, nbdkit("file", str(destination)) as two:
        copy("--ring", ring, "--allocated", one.uri, two.uri).succeeded()
    images.assert_identical(source, destination)
    assert images.allocated_bytes(destination) >= SIZE


def test_a_copy_of_a_sparse_image_is_sparse(tmp_path: Path, ring: str) -> None:
    source, destination = islands(tmp_path / "source"), images.filled_image(tmp_path / "destination", SIZE)
    with nbdkit("file", str(source), flags=["-r"]) as one, qemu_nbd(destination, "--discard=unmap") as two:
        copy("--ring", ring, one.uri, two.uri).succeeded()
    images.assert_identical(source, destination)
    assert images.allocated_bytes(destination) <= 3 * images.MIB


def test_no_extents_reads_everything_and_asks_nothing(ring: str) -> None:
    source, target = Double(bytearray(SIZE)), Double(bytearray(b"\xee" * SIZE))
    with double(source) as one, double(target) as two:
        copy("--ring", ring, "--no-extents", one, two).succeeded()
    assert source.count(CMD_BLOCK_STATUS) == 0
    assert sum(request.length for request in source.requests if request.command == CMD_READ) == SIZE
    assert target.content == bytes(SIZE)


def test_a_destination_without_write_zeroes_is_written_zeroes(tmp_path: Path, ring: str) -> None:
    source, target = islands(tmp_path / "source"), Double(bytearray(b"\xee" * SIZE), flags=0x1 | 0x4 | 0x100)
    with nbdkit("file", str(source), flags=["-r"]) as server, double(target) as uri:
        copy("--ring", ring, server.uri, uri).succeeded()
    assert target.content == source.read_bytes()
    assert target.count(CMD_WRITE_ZEROES) == 0


@pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
def test_a_hole_that_is_not_zero_is_read(ring: str, extended: bool) -> None:
    class HolesOfData(Double):
        def block_status(self, talk: Talk, request: Request) -> None:
            self.send_extents(talk, request, [(request.length, HOLE)])

    content = bytearray(images.random_bytes(SIZE))
    source, target = HolesOfData(content, extended=extended), Double(bytearray(SIZE), extended=extended)
    with double(source) as one, double(target) as two:
        copy("--ring", ring, one, two).succeeded()
    assert target.content == content


class _RefusesToZero(Double):
    """Of a size that is never kept: cannot zero its beginning, and fails the rest once."""

    failed = False

    def inform(self, talk: Talk, option: int) -> None:
        talk.reply_to_option(option, REP_INFO, struct.pack(">HQH", INFO_EXPORT, 3 * GIB, self.flags))
        talk.reply_to_option(option, REP_ACK)

    def answer(self, talk: Talk, request: Request) -> None:
        if request.command == CMD_WRITE:
            talk.receive(request.length)
            talk.done(request)
        elif request.command == CMD_WRITE_ZEROES and request.offset == 0:
            talk.done(request, EINVAL)
        elif request.command == CMD_WRITE_ZEROES and not self.failed:
            self.failed = True
            talk.done(request, EIO)
        elif request.command == CMD_WRITE_ZEROES:
            talk.done(request)
        else:
            super().answer(talk, request)


def test_a_run_of_zeroes_refused_in_one_part_and_failed_in_another_is_written_all_the_same(ring: str) -> None:
    with nbdkit("memory", "3G") as source, double(_RefusesToZero(bytearray(1))) as uri:
        options = ("--ring", ring, "--range-size", "4G", "--workers", "1", "--request-size", "32M")
        outcome = copy(*options, source.uri, uri).succeeded()
    assert sums(outcome.last_line) == ("0 B", "3 GiB", "0 B")
