"""The NBD core over a blocking socket against real servers: what the spec says is what they do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdshard.common.errors import ConnectionLost, NbdshardError, ProtocolError, UserError
from nbdshard.common.nbd.client import Done
from nbdshard.common.nbd.connecter import Goal, Negotiated, Wishes
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.common.ranges import Range
from support import servers
from support.nbd_blocking import Connection, connect, exports_of, negotiate
from support.servers import Server

SIZE = 4 << 20
DATA = bytes(range(256)) * 256  # 64 KiB, no block of it alike zeroes
Start = Callable[[Path], contextlib.AbstractContextManager[Server]]

NBDKIT: Start = lambda _: servers.nbdkit("memory", size=SIZE)  # noqa: E731
SERVERS: dict[str, Start] = {
    "nbdkit": NBDKIT,
    "nbdkit without structured replies": lambda _: servers.nbdkit("memory", flags=["--no-sr"], size=SIZE),
    "nbdkit, newstyle only": lambda _: servers.nbdkit("memory", flags=["--mask-handshake=0"], size=SIZE),
    "nbdkit, with reserved zeroes": lambda _: servers.nbdkit("memory", flags=["--mask-handshake=1"], size=SIZE),
    "qemu-nbd": lambda image: servers.qemu_nbd(image, export="disk"),
    "nbd-server": lambda image: servers.nbd_server(image, "flush = true", "trim = true"),
}


def socket_of(server: Server) -> Path:
    return Path(parse_uri(server.uri).socket or "")


def wishes_of(server: Server) -> Wishes:
    return Wishes(parse_uri(server.uri).export_name)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize("name", SERVERS)
def test_what_is_written_is_read_back(name: str, image: Path) -> None:
    with SERVERS[name](image) as server, Connection(socket_of(server), wishes_of(server)) as connection:
        assert connection.export.size == SIZE
        connection.client.write(3, Range.of(100_000, len(DATA)), [DATA[:1], memoryview(DATA)[1:]])
        assert connection.run() == [Done(3)]
        assert connection.read(Range.of(99_999, len(DATA) + 2)) == b"\0" + DATA + b"\0"
        if connection.export.flags & TransmissionFlag.SEND_FLUSH:
            connection.client.flush(5)
            assert connection.run() == [Done(5)]
        connection.close()


@pytest.mark.parametrize("name", SERVERS)
def test_many_reads_at_once_bring_each_its_own_bytes(name: str, image: Path) -> None:
    with SERVERS[name](image) as server, Connection(socket_of(server), wishes_of(server)) as connection:
        connection.client.write(0, Range.of(0, len(DATA)), [DATA])
        connection.run()
        wheres = [Range.of(977 * handle, 3000 + handle) for handle in range(16)]
        buffers = [bytearray(where.length) for where in wheres]
        for handle, (where, buffer) in enumerate(zip(wheres, buffers, strict=True)):
            connection.client.read(handle, where, memoryview(buffer))
        assert sorted(done.handle for done in connection.run()) == list(range(16))
        assert [bytes(buffer) for buffer in buffers] == [DATA[where.start : where.end] for where in wheres]
        connection.close()


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd"])
def test_zeroed_and_trimmed_bytes_are_told_by_block_status(name: str, image: Path) -> None:
    with SERVERS[name](image) as server, Connection(socket_of(server), wishes_of(server)) as connection:
        everything = Range(0, SIZE)
        connection.client.write(0, Range.of(0, 65536), [DATA])
        connection.run()
        connection.client.write_zeroes(1, Range.of(32768, 32768))
        connection.client.trim(2, Range.of(1 << 20, 65536))
        assert sorted(done.handle for done in connection.run() if done.error is None) == [1, 2]
        assert connection.extents(everything) == [(Range(0, 32768), 0), (Range(32768, SIZE), 3)]
        assert connection.extents(Range.of(4096, 512)) == [(Range(4096, 4608), 0)]
        connection.client.block_status(0, everything, one=True)
        assert connection.run() == [Done(0, None, [(Range(0, 32768), 0)])]
        assert connection.read(Range.of(32767, 3)) == DATA[32767:32768] + b"\0\0"
        connection.close()


def test_a_server_that_fails_every_read_fails_them_one_by_one() -> None:
    start = servers.nbdkit("memory", "error-pread-rate=100%", "error=ENOSPC", filters=["error"], size=SIZE)
    with start as server, Connection(socket_of(server)) as connection:
        for handle in range(4):
            connection.client.read(handle, Range.of(4096 * handle, 4096), memoryview(bytearray(4096)))
        assert [str(done.error) for done in connection.run()] == ["ENOSPC"] * 4
        connection.client.write(0, Range.of(0, 512), [bytes(512)])
        assert connection.run() == [Done(0)]
        connection.close()


def test_block_sizes_are_told_by_a_server_that_has_some() -> None:
    limits = ("blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=1M")
    start = servers.nbdkit("memory", *limits, filters=["blocksize-policy"], size=SIZE)
    with start as server, Connection(socket_of(server)) as connection:
        sizes = connection.export.block_sizes
        assert (sizes.minimum, sizes.preferred, sizes.maximum, sizes.advertised) == (4096, 65536, 1 << 20, True)
        connection.close()


def test_info_tells_what_go_would_and_leaves(image: Path) -> None:
    with servers.qemu_nbd(image, "-D", "the first disk", export="disk") as server:
        with connect(socket_of(server)) as peer:
            connecter, (event,) = negotiate(peer, Wishes("disk", goal=Goal.INFO))
            assert isinstance(event, Negotiated)
            assert (event.export.size, event.export.description) == (SIZE, "the first disk")
            connecter.abort()
            peer.sendall(b"".join(connecter.data_to_send()))
            connecter.received(peer.recv_into(connecter.receive_target()))
            assert peer.recv(1) == b""
            connecter.end_of_stream()
        assert exports_of(socket_of(server)) == [("disk", "the first disk")]


def refused(server: Server, wishes: Wishes) -> NbdshardError:
    with connect(socket_of(server)) as peer, pytest.raises(NbdshardError) as caught:
        negotiate(peer, wishes, "srv")
    return caught.value


@pytest.mark.parametrize("name", ["qemu-nbd", "nbd-server"])
def test_an_export_that_does_not_exist_is_named(name: str, image: Path) -> None:
    with SERVERS[name](image) as server:
        error = refused(server, Wishes("other"))
    assert isinstance(error, UserError)
    assert str(error).startswith("srv: no such export: 'other'")
    assert str(error).endswith("; `nbdshard info --list` names a server's exports")


def test_a_server_that_insists_on_tls_is_a_matter_for_the_user() -> None:
    with servers.nbdkit("memory", flags=["--tls=require", "--tls-psk=/dev/null"], size=SIZE) as server:
        error = refused(server, Wishes())
    assert isinstance(error, UserError)
    assert str(error).endswith("; nbdshard does not support TLS yet")


def test_an_oldstyle_server_is_recognised() -> None:
    with servers.nbdkit("memory", flags=["-o"], size=SIZE) as server:
        error = refused(server, Wishes())
    assert isinstance(error, ProtocolError)
    assert error.what == "an oldstyle NBD server, which nbdshard does not support"


def test_a_server_that_dies_is_noticed_with_what_was_pending() -> None:
    start = servers.nbdkit("memory", "delay-read=600", filters=["delay"], threads=1, size=SIZE)
    with start as server, Connection(socket_of(server)) as connection:
        connection.client.read(2, Range.of(0, 4096), memoryview(bytearray(4096)))
        connection.push([])
        server.kill()
        with pytest.raises(ConnectionLost, match="connection lost while waiting for 1 reply"):
            connection.run()
        assert connection.client.pending_handles() == [2]
