"""How many connections are used: several only where the server says CAN_MULTI_CONN, and no more than it admits."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from support import images
from support.command import copy
from support.doubles import (
    CAN_MULTI_CONN,
    CMD_READ,
    CMD_WRITE,
    INFO_EXPORT,
    REP_ACK,
    REP_INFO,
    Double,
    Request,
    Talk,
    double,
)
from support.servers import nbdkit, qemu_nbd
from support.waiting import wait_for

SIZE = 32 * images.MIB
ALL_BUT_MULTI_CONN = 0x1ED & ~CAN_MULTI_CONN


@pytest.fixture
def source_image(tmp_path: Path) -> Path:
    return images.random_image(tmp_path / "source", SIZE)


def test_four_workers_copy_to_qemu_nbd_that_admits_two_clients(tmp_path: Path, source_image: Path, ring: str) -> None:
    destination = images.empty_image(tmp_path / "destination", SIZE)
    with qemu_nbd(destination, clients=2) as server:
        copy("--ring", ring, "--workers", "4", source_image, server.uri, timeout=100).succeeded()
    images.assert_identical(source_image, destination)


def test_four_workers_copy_from_qemu_nbd_that_admits_two_clients(tmp_path: Path, source_image: Path, ring: str) -> None:
    destination = tmp_path / "destination"
    with qemu_nbd(source_image, "-r", clients=2) as server:
        copy("--ring", ring, "--workers", "4", server.uri, destination, timeout=100).succeeded()
    images.assert_identical(source_image, destination)


def test_one_connection_alone_writes_where_multi_conn_is_off(source_image: Path, ring: str) -> None:
    target = Double(bytearray(SIZE), flags=ALL_BUT_MULTI_CONN)
    with nbdkit("file", str(source_image), flags=["-r"]) as source, double(target) as uri:
        copy("--ring", ring, "--workers", "4", source.uri, uri).succeeded()
    assert target.content == source_image.read_bytes()
    assert len({request.connection for request in target.requests if request.command == CMD_WRITE}) == 1


class Sociable(Double):
    """Takes nothing before two connections write: else one may be done before the other has come."""

    def writers(self) -> int:
        with self.lock:
            return len({request.connection for request in self.requests if request.command == CMD_WRITE})

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        wait_for("a second connection that writes", lambda: self.writers() >= 2)
        super().write(talk, request, data)


def test_several_connections_write_where_multi_conn_is_on(source_image: Path, ring: str) -> None:
    target = Sociable(bytearray(SIZE))
    with nbdkit("file", str(source_image), flags=["-r"]) as source, double(target) as uri:
        copy("--ring", ring, "--workers", "2", source.uri, uri).succeeded()
    assert target.content == source_image.read_bytes()


def test_one_connection_alone_reads_where_multi_conn_is_off(source_image: Path, ring: str) -> None:
    source = Double(bytearray(source_image.read_bytes()), flags=ALL_BUT_MULTI_CONN | 2)
    target = Double(bytearray(SIZE))
    with double(source) as one, double(target) as two:
        copy("--ring", ring, "--workers", "4", one, two).succeeded()
    assert target.content == source.content
    assert len({request.connection for request in source.requests if request.command == CMD_READ}) == 1


@pytest.mark.parametrize("connections", [1, 3])
def test_no_more_connections_are_used_than_asked_for(source_image: Path, ring: str, connections: int) -> None:
    target = Double(bytearray(SIZE))
    with double(target) as uri:
        copy("--ring", ring, "--workers", "2", "-C", str(connections), source_image, uri).succeeded()
    writers = {request.connection for request in target.requests if request.command == CMD_WRITE}
    assert 1 <= len(writers) <= connections


def test_a_server_that_takes_one_client_at_a_time_is_copied(tmp_path: Path, source_image: Path, ring: str) -> None:
    """nbdkit's noparallel filter serves one client after the other: a second connection is not greeted at all."""
    destination = tmp_path / "destination"
    with nbdkit("file", str(source_image), "serialize=connections", filters=["noparallel"], flags=["-r"]) as server:
        copy("--ring", ring, "--workers", "2", server.uri, destination, timeout=100).succeeded()
    images.assert_identical(source_image, destination)


class _Shrinks(Double):
    """Half as large on every connection but the first."""

    def inform(self, talk: Talk, option: int) -> None:
        size = len(self.content) // (1 if talk.number == 1 else 2)
        talk.reply_to_option(option, REP_INFO, struct.pack(">HQH", INFO_EXPORT, size, self.flags))
        talk.reply_to_option(option, REP_ACK)


SHRUNK = f"size {SIZE // 2} instead of {SIZE}"  # whether one worker finds it, or another than the first


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_export_that_is_another_on_the_next_connection_fails_the_copy_in_one_line(
    ring: str, side: str, workers: int
) -> None:
    ends = {"source": Double(bytearray(SIZE)), "destination": Double(bytearray(SIZE))}
    ends[side] = _Shrinks(bytearray(SIZE))
    with double(ends["source"]) as one, double(ends["destination"]) as two:
        outcome = copy("--ring", ring, "-C", "4", "--workers", str(workers), one, two)
    outcome.failed(1, saying=[side, SHRUNK])
    assert "internal error" not in outcome.err


def test_it_is_the_side_that_differs_which_is_named_not_the_one_that_came_last(ring: str) -> None:
    slow = nbdkit("memory", str(SIZE), "delay-open=300ms", filters=["delay"])
    # One connection for each worker, and a copy that lasts until the last worker has opened its own.
    slowly = ["-C", "4", "--workers", "4", "--requests", "1", "--request-size", "4096", "-S", "0"]
    with double(_Shrinks(bytearray(SIZE))) as one, slow as two:
        outcome = copy("--ring", ring, *slowly, one, two.uri)
    outcome.failed(1, saying=["source", one, SHRUNK])
