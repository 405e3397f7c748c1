"""Faults that were found in another server, nbd-rs, each shown not to be one of `nbdshard serve`.

The table in ARCHITECTURE.md ("Serving") names all ten, and the tests of those that are not here.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import Command
from nbdshard.common.nbd.wire import Request, pack_request
from nbdshard.common.ranges import Range
from support import images
from support.command import EXECUTABLE, nbdshard
from support.images import MIB
from support.nbd_blocking import Connection, connect, negotiate, received, reset
from support.served import NAME, NBDSH, serving, still_serves, tool

CHUNK = 64 << 10
DISK = Wishes(NAME)
WAYS = {"simple": Wishes(NAME, structured=False), "structured": Wishes(NAME, extended=False), "extended": DISK}


def test_each_of_the_ten_faults_has_a_test_that_is_named_after_it() -> None:
    tests = Path(__file__).parents[1]
    named = {
        int(n) for path in tests.rglob("test_*.py") for n in re.findall(r"def test_nbd_rs_(\d+)_", path.read_text())
    }
    assert named == set(range(1, 11))
    table = re.findall(r"\| `test_nbd_rs_(\d+)_\*`", (tests.parent / "ARCHITECTURE.md").read_text())
    assert list(map(int, table)) == list(range(1, 11))


def chunked(folder: Path, name: str = "disk") -> str:
    return f"file:{folder}/{name}/?size={4 * MIB}&chunk=64K"


def error_of(connection: Connection, ask: Callable[[], None]) -> str:
    """The error of one request, "" if there is none."""
    ask()
    (done,) = connection.run()
    return done.error.errno_name if done.error else ""


# -- 1: FLUSH is ignored and answered with success. No FUA.


@pytest.mark.parametrize("driver", ["raw", "sharded"])
def test_nbd_rs_1_flush_and_fua_sync_before_they_are_answered(driver: str, tmp_path: Path) -> None:
    """strace(1) writes a call's line before the process goes on: what it has seen came before the answer."""
    (tmp_path / "disk").mkdir()
    conn = f"file:{images.empty_image(tmp_path / 'image', MIB)}" if driver == "raw" else chunked(tmp_path)
    calls = tmp_path / "calls"
    trace = ("strace", "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(calls), EXECUTABLE)
    with serving(conn, driver=driver, executable=trace) as served:
        connection = Connection(served.socket, DISK)

        def syncs(name: str) -> int:
            return len(re.findall(rf"\b{name}\(.*= 0$", calls.read_text(), re.MULTILINE))

        def write(*, fua: bool) -> None:
            connection.client.write(0, Range(0, 4096), [b"x" * 4096], fua=fua)
            (done,) = connection.run()
            assert done.error is None

        write(fua=True)  # the first one may make files
        before = syncs("fdatasync")
        assert before
        write(fua=False)
        assert syncs("fdatasync") == before
        connection.client.flush(0)
        assert [done.error for done in connection.run()] == [None]
        flushed = syncs("fdatasync")
        assert flushed > before
        write(fua=True)
        assert syncs("fdatasync") > flushed
        assert bool(syncs("fsync")) is (driver == "sharded")  # of the folder that has a new name in it
        connection.close()


# -- 4: A read over a hole that ends on a chunk boundary returns short.


@pytest.mark.parametrize("way", WAYS)
def test_nbd_rs_4_reads_over_holes_and_chunk_boundaries_are_whole(way: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with serving(chunked(tmp_path), driver="sharded") as served, Connection(served.socket, WAYS[way]) as connection:
        image = bytearray(4 * MIB)
        for start in (CHUNK, 4 * CHUNK - 512, 7 * CHUNK):
            connection.client.write(0, Range.of(start, 1024), [b"d" * 1024])
            assert [done.error for done in connection.run()] == [None]
            image[start : start + 1024] = b"d" * 1024
        for start in (0, 512, CHUNK - 1, CHUNK, CHUNK + 1024, 2 * CHUNK, 3 * CHUNK):
            for end in (CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK, 4 * CHUNK + 1, 8 * CHUNK, 4 * MIB):
                if start < end:
                    assert connection.read(Range(start, end)) == image[start:end], (start, end)


# -- 5: A chunk can be stored one byte short.


@pytest.mark.parametrize("start", [0, CHUNK - 1, CHUNK - 2, 1])
def test_nbd_rs_5_chunks_are_stored_to_their_last_byte(start: int, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    image = bytearray(3 * CHUNK)
    image[start : start + CHUNK] = b"\xff" * CHUNK
    with serving(chunked(tmp_path), driver="sharded") as served, Connection(served.socket, DISK) as connection:
        connection.client.write(0, Range.of(start, CHUNK), [b"\xff" * CHUNK], fua=True)
        assert [done.error for done in connection.run()] == [None]
    for number in range(3):  # what is behind the end of a chunk's file is zeroes
        path = tmp_path / "disk" / f"{NAME}.{number}.chunk"
        stored = path.read_bytes().ljust(CHUNK, b"\0") if path.exists() else bytes(CHUNK)
        assert stored == image[number * CHUNK : (number + 1) * CHUNK], path.name
    with serving(chunked(tmp_path), driver="sharded") as served, Connection(served.socket, DISK) as connection:
        assert connection.read(Range(0, len(image))) == image


# -- 6: TRIM of part of a missing chunk fails; errors of TRIM and FLUSH are logged and answered with success.


def test_nbd_rs_6_part_of_a_missing_chunk_is_trimmed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with serving(chunked(tmp_path), driver="sharded") as served, Connection(served.socket, DISK) as connection:
        for where in (Range(512, 1024), Range(CHUNK - 512, CHUNK + 512), Range(0, 4 * MIB), Range(7, 3 * CHUNK + 9)):
            assert error_of(connection, lambda where=where: connection.client.trim(0, where)) == ""  # type: ignore[misc]
        assert connection.read(Range(0, 4 * CHUNK)) == bytes(4 * CHUNK)


def test_nbd_rs_6_errors_of_trim_and_flush_reach_the_client() -> None:
    conn = "error:memory:1M?error-trim=ENOSPC&error-flush=EIO"
    with serving(conn) as served, Connection(served.socket, DISK) as connection:
        client = connection.client
        assert error_of(connection, lambda: client.trim(0, Range(0, 4096))) == "ENOSPC"
        assert error_of(connection, lambda: client.flush(0)) == "EIO"
        assert error_of(connection, lambda: client.write(0, Range(0, 1), [b"x"], fua=True)) == "EIO"
        assert error_of(connection, lambda: client.write(0, Range(0, 1), [b"x"])) == ""
        script = "\n".join(
            f"try:\n    {call}\nexcept nbd.Error as error:\n    assert error.errno == {name!r}\nelse:\n    assert False"
            for call, name in (("h.trim(4096, 0)", "ENOSPC"), ("h.flush()", "EIO"))
        )
        tool(*NBDSH, "-u", served.uri(), "-c", "import nbd\n" + script)


# -- 8: One client at a time.


def test_nbd_rs_8_a_client_in_the_middle_of_something_holds_up_no_other() -> None:
    with serving("memory:1M") as served:
        begun = pack_request(Request(0, Command.WRITE, 1, 0, 8192), extended=False) + b"x" * 4096
        with connect(served.socket) as greeted, connect(served.socket) as writing, connect(served.socket) as idle:
            assert received(greeted, 18)
            negotiate(writing, Wishes(NAME, extended=False))
            writing.sendall(begun)
            negotiate(idle, DISK)
            still_serves(served)
            writing.sendall(b"y" * 4096)
            magic, error, cookie = struct.unpack(">IIQ", received(writing, 16))
            assert (magic, error, cookie) == (0x67446698, 0, 1)


# -- 9: Any metadata context asked for is "accepted".


def test_nbd_rs_9_contexts_that_nobody_has_are_not_agreed_on() -> None:
    script = """
import nbd
for name in ('base:allocation', 'base:', 'base:other', 'qemu:allocation-depth', 'x-any:thing', 'no colon'):
    h.add_meta_context(name)
h.connect_uri(URI)
assert h.can_meta_context('base:allocation')
assert not any(map(h.can_meta_context, ('base:', 'base:other', 'qemu:allocation-depth', 'x-any:thing', 'no colon')))
told = []
h.block_status(4096, 0, lambda context, *_: told.append(context))
assert told == ['base:allocation'], told
"""
    with serving("memory:1M") as served:
        tool(*NBDSH, "-c", f"URI = {served.uri()!r}", "-c", script)


# -- 10: A missing --export panics; so does a sudden disconnect. (For `raw s3:` see the tests of object stores.)


def test_nbd_rs_10_no_export_is_a_line_for_the_user() -> None:
    outcome = nbdshard("serve").failed(2, saying=["no export is given"])
    assert len(outcome.err.splitlines()) <= 2
    nbdshard("serve", "--unix", "/nowhere/socket").failed(2, saying=["no export is given"])
    nbdshard("serve", "-e", "disk").failed(2)


STAGES = {
    "at once": b"",
    "in its flags": b"\0\0",
    "in an option": b"\0\0\0\3IHAVEOPT",
    "in an option's data": b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\20half",
}


@pytest.mark.parametrize("end", [reset, socket.socket.close])
def test_nbd_rs_10_sudden_disconnects_harm_nobody(end: Callable[[socket.socket], None]) -> None:
    with serving("memory:64M", "--tcp", "127.0.0.1:0") as served:
        for stream in STAGES.values():
            peer = socket.create_connection(served.address, 10)
            peer.sendall(stream)
            end(peer)
            still_serves(served)
        read = pack_request(Request(0, Command.READ, 1, 0, 32 * MIB), extended=False)
        write = pack_request(Request(0, Command.WRITE, 1, 0, 32 * MIB), extended=False)
        for stream in (read[:11], read, read * 5, write, write + bytes(MIB), read + write + bytes(1000)):
            peer = socket.create_connection(served.address, 10)
            negotiate(peer, Wishes(NAME, extended=False))
            peer.sendall(stream)
            end(peer)
            still_serves(served)
        assert "internal error" not in served.run.err()
