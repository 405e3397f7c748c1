"""CONN strings, and the tables that make a backend of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.chain import DRIVERS, Wanted, not_shared, open_backend
from nbdshard.server.conn import Conn, parse_conn
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing
from nbdshard.server.opening import Layer, Opener, Opening

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
        ("raw", "file:/image%00", "there is a NUL in it"),
        ("raw", "memory:1M?description=%00", "there is a NUL in it"),
        ("raw", "file:/dev/null", "is neither a regular file nor a block device"),
        (
            "sharded",
            "memory:1M",
            "'memory' is neither a layer nor a store here; stores are file, s3, gs, az, layers cache, cow",
        ),
        ("sharded", "file:/nowhere/at/all", "/nowhere/at/all: there is no such directory; make it first"),
        ("sharded", "file:/dev/null", "/dev/null: is no directory"),
    ],
)
def test_an_export_that_cannot_be_is_told_in_a_line(driver: str, conn: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        opened(driver, conn)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for read_only in ("yes", "no"):
        with pytest.raises(UserError, match="is neither a regular file nor a block device"):
            opened("raw", f"file:{tmp_path}/fifo?read-only={read_only}")


def test_a_name_is_not_longer_than_the_protocol_allows() -> None:
    with pytest.raises(UserError, match="a name of at most 4096 bytes"):
        opened("raw", "memory:1M", "x" * 4097)


def test_a_name_is_utf_8() -> None:
    with pytest.raises(UserError, match="a name in UTF-8 is needed"):
        opened("raw", "memory:1M", "disk\udcff")


def test_parameters_may_stand_beside_the_conn() -> None:
    backend = open_backend(Wanted("disk", "raw", "memory:1M", {"read-only": "yes"}))
    assert backend.flags & TransmissionFlag.READ_ONLY
    with pytest.raises(UserError, match="there is a NUL in description"):
        open_backend(Wanted("disk", "raw", "memory:1M", {"description": "\0"}))
    with pytest.raises(UserError, match="export 'disk': memory:1M: read-only=no, and beside it read-only=yes"):
        open_backend(Wanted("disk", "raw", "memory:1M?read-only=no", {"read-only": "yes"}))


def test_what_processes_cannot_share_is_named() -> None:
    layers = {"log": Layer(lambda below, _: below, shared=True), "cache": Layer(lambda below, _: below)}
    assert not_shared(Wanted("disk", "raw", "log:file:/x"), layers=layers) == []
    assert not_shared(Wanted("disk", "raw", "log:cache:file:/x"), layers=layers) == ["cache"]
    assert not_shared(Wanted("disk", "raw", "cache:memory:1M"), layers=layers) == ["cache", "raw memory"]
    assert not_shared(Wanted("disk", "sharded", "file:/x/")) == ["sharded file"]


def test_who_may_not_write_is_told_by_the_flags(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1000))
    for conn in ("memory:1M", f"file:{tmp_path}/image"):
        for more, is_read_only in (("", False), ("?read-only=yes", True)):
            backend = opened("raw", conn + more)
            assert bool(backend.flags & TransmissionFlag.READ_ONLY) is is_read_only
            backend.close()


def twice(opening: Opening) -> Backend:
    return MemoryBackend(2 * int(opening.place), read_only=opening.read_only)


class Shifted(Passing):
    """Reads what is `by` bytes further on."""

    def __init__(self, below: Backend, by: int) -> None:
        super().__init__(below)
        self._by = by

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        return self.below.read(Range(where.start + self._by, where.end + self._by))


def shifted(below: Backend, opening: Opening) -> Backend:
    return Shifted(below, opening.parameters.size("by") or 1)


MORE_DRIVERS = {**DRIVERS, "double": {"bytes": Opener(twice)}}
MORE_LAYERS = {"shift": Layer(shifted, frozenset({"by"})), "base": Layer(lambda below, _: below, only_reads=True)}


def test_a_driver_may_be_added() -> None:
    backend = open_backend(Wanted("disk", "double", "bytes:500"), MORE_DRIVERS)
    assert backend.size == 1000
    backend.write(Range(990, 1000), memoryview(b"0123456789"))
    assert b"".join(part for part in backend.read(Range(990, 1000)) if not isinstance(part, Hole)) == b"0123456789"


def test_layers_stand_in_front_of_one_another() -> None:
    backend = open_backend(Wanted("disk", "raw", "shift:shift:memory:1M?by=2"), layers=MORE_LAYERS)
    backend.write(Range(0, 8), memoryview(b"01234567"))
    assert [bytes(part) for part in backend.read(Range(0, 4)) if not isinstance(part, Hole)] == [b"4567"]


def test_a_parameter_that_no_part_of_the_chain_knows_is_refused() -> None:
    with pytest.raises(UserError, match=r"no parameter is called 'by'; known are .*read-only"):
        open_backend(Wanted("disk", "raw", "memory:1M?by=2"), layers=MORE_LAYERS)


def test_what_is_below_a_layer_that_only_reads_is_read_only() -> None:
    backend = open_backend(Wanted("disk", "raw", "shift:base:shift:memory:1M"), layers=MORE_LAYERS)
    assert backend.flags & TransmissionFlag.READ_ONLY


def test_what_was_opened_is_closed_where_a_layer_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="'much' is not a size"):
        open_backend(Wanted("disk", "raw", f"shift:file:{tmp_path}/image?by=much"), layers=MORE_LAYERS)
    with pytest.raises(UserError, match="17 layers"):
        open_backend(Wanted("disk", "raw", "shift:" * 17 + "memory:1M"), layers=MORE_LAYERS)
