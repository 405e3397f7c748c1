"""CONN strings, and the tables that make a backend of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.chain import DRIVERS, Wanted, open_backend
from nbdshard.server.conn import Conn, parse_conn

LAYERS = ("cache", "retry")
STORES = ("file", "memory", "s3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file:/exports/disk0.img", Conn((), "file", "/exports/disk0.img")),
        ("cache:file:/a", Conn(("cache",), "file", "/a")),
        ("cache:retry:cache:memory:1G", Conn(("cache", "retry", "cache"), "memory", "1G")),
        ("s3:http://user:word@host:9000/bucket", Conn((), "s3", "http://user:word@host:9000/bucket")),
        ("file:/a/?size=100G&chunk=4M", Conn((), "file", "/a/", {"size": "100G", "chunk": "4M"})),
        ("file:/a%3Fb%20c?x=%26", Conn((), "file", "/a?b c", {"x": "&"})),
    ],
)
def test_a_conn_is_layers_a_store_a_place_and_parameters(text: str, expected: Conn) -> None:
    assert parse_conn(text, LAYERS, STORES) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "'' where a store, a colon and a place are expected"),
        ("file", "'file' where a store"),
        ("cache:", "'' where a store"),
        ("tape:/dev/st0", "'tape' is neither a layer nor a store"),
        ("cache:tape:x", "'tape' is neither"),
        ("file:/a?", "'' where NAME=VALUE is expected"),
        ("file:/a?size", "'size' where NAME=VALUE is expected"),
        ("file:/a?=1", "'=1' where NAME=VALUE is expected"),
        ("file:/a?x=1&x=2", "x twice"),
    ],
)
def test_a_conn_that_says_nothing_is_refused(text: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_conn(text, LAYERS, STORES)


def opened(driver: str, conn: str, name: str = "disk") -> Backend:
    return open_backend(Wanted(name, driver, conn))


@pytest.mark.parametrize(
    ("driver", "conn", "what"),
    [
        ("cooked", "memory:1M", "export 'disk': no driver is called 'cooked'; known are raw, sharded"),
        ("raw", "memory:0", "a size of 0 bytes"),
        ("raw", "memory:lots", "lots"),
        ("raw", "memory:1M?colour=red", "no parameter is called 'colour'"),
        ("raw", "memory:1M?read-only=maybe", "read-only=maybe: yes or no is expected"),
        ("raw", "file:/nowhere/at/all", "/nowhere/at/all: cannot be opened: No such file or directory"),
        ("raw", "file:/dev/null", "is neither a regular file nor a block device"),
        ("sharded", "memory:1M", "'memory' is neither a layer nor a store"),
        ("sharded", "file:/nowhere/at/all", "is no directory"),
    ],
)
def test_an_export_that_cannot_be_is_told_in_a_line(driver: str, conn: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        opened(driver, conn)


def test_a_name_is_not_longer_than_the_protocol_allows() -> None:
    with pytest.raises(UserError, match="a name of at most 4096 bytes"):
        opened("raw", "memory:1M", "x" * 4097)


def test_who_may_not_write_is_told_by_the_flags(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1000))
    for conn in ("memory:1M", f"file:{tmp_path}/image"):
        for more, is_read_only in (("", False), ("?read-only=yes", True)):
            backend = opened("raw", conn + more)
            assert bool(backend.flags & TransmissionFlag.READ_ONLY) is is_read_only
            backend.close()


def test_a_driver_may_be_added() -> None:
    def twice(_name: str, conn: Conn, read_only: bool) -> Backend:
        return MemoryBackend(2 * int(conn.place), read_only=read_only)

    drivers = {**DRIVERS, "double": {"bytes": twice}}
    backend = open_backend(Wanted("disk", "double", "bytes:500"), drivers)
    assert backend.size == 1000
    backend.write(Range(990, 1000), memoryview(b"0123456789"))
