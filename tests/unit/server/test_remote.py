"""server/backends/remote.py and link.py: another server as a store, which may be lost, and come back as another one."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends import remote
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.connection import Connection
from nbdshard.server.device import Hole
from nbdshard.server.exports import Exported, Exports
from nbdshard.server.layers.base import Passing
from support.backends import Opened, content_of
from support.served import serving
from support.servers import nbdkit, private_folder
from support.waiting import wait_for

SIZE = 1 << 20
BLOCK = Range(0, 4096)
FLAGS = TransmissionFlag


class Other:
    """The other server, in this process: so it can lose its connections, and what it holds, whenever a test wants."""

    def __init__(self, folder: Path) -> None:
        self.backend: Backend = MemoryBackend(SIZE)
        self.life = uuid.uuid4()
        self.path = folder / "socket"
        self.connections: list[Connection] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                self._sockets.append(ours)
                connection = Connection(ours, Exports({"disk": Exported(self.backend)}, self.life), "the proxy")
                self.connections.append(connection)
                thread = threading.Thread(target=connection.serve, daemon=True)
                self._threads.append(thread)
                thread.start()

    def cut(self) -> None:
        """All connections are lost."""
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def start_again(self, backend: Backend | None = None) -> None:
        """A new life, with what is in `backend` (nothing)."""
        self.backend, self.life = backend or MemoryBackend(SIZE), uuid.uuid4()
        self.cut()

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(30)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def other() -> Iterator[Other]:
    with private_folder() as folder:
        server = Other(folder)
        yield server
        server.end()


OPENED = Opened()
opened = OPENED.open


@pytest.fixture(autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    with OPENED.until_the_end():
        yield


def over(other: Other, more: str = "", layers: str = "") -> Backend:
    return opened(f"{layers}nbd:nbd+unix:///disk?socket={other.path}{more}")


def write(backend: Backend, text: bytes = b"written") -> None:
    backend.write(Range(0, len(text)), memoryview(text))


# -- what it is called


def test_a_uri_is_a_place_in_the_store_and_a_conn_of_its_own(other: Other) -> None:
    for conn in (f"nbd:nbd+unix:///disk?socket={other.path}", f"nbd+unix:///disk?socket={other.path}&connections=1"):
        assert opened(conn).size == SIZE
    with serving("memory:3M", "--tcp", "127.0.0.1:0") as served:
        (line,) = (line for line in served.run.err().splitlines() if "nbd://127" in line)
        uri = line.rpartition(" ")[2]
        for conn in (f"{uri}disk", f"nbd:{uri}disk"):
            assert opened(conn).size == 3 << 20


def test_names_with_special_characters_are_encoded_as_in_any_uri() -> None:
    with private_folder() as folder:
        path = folder / "a socket?"
        words = ("-e", "a/b ?%", "raw", "memory:5M", "--unix", str(path))
        with serving("memory:1M", *words):
            assert opened(f"nbd+unix:///a%2Fb%20%3F%25?socket={folder}/a%20socket%3F").size == 5 << 20


@pytest.mark.parametrize(
    ("conn", "what"),
    [
        ("nbd:what", "not a URI"),
        ("nbd:nbds://host/", "nbds asks for TLS"),
        ("nbd://host:port/", "not a port: 'port'"),
        ("nbd://host/?socket=/run/x", "only nbd\\+unix:// takes a socket"),
        ("nbd+unix:///disk", "no socket parameter"),
        ("nbd+unix:///disk?socket=/nowhere/at/all", "there is no socket /nowhere/at/all"),
        ("nbd://localhost/x?connections=0", "connections=0: a number from 1"),
    ],
)
def test_an_export_that_cannot_be_is_told_in_a_line(conn: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        opened(conn)


def test_an_export_that_is_not_there_is_told_with_the_servers_words(other: Other) -> None:
    with pytest.raises(UserError, match="there is no such export"):
        opened(f"nbd+unix:///another?socket={other.path}")


def test_a_server_whose_end_no_request_reaches_is_refused() -> None:
    options = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    with (
        nbdkit("memory", "1000000", *options, filters=["blocksize-policy"]) as server,
        pytest.raises(UserError, match="takes requests in multiples of 4096 bytes only, and has 1000000"),
    ):
        opened(f"nbd:{server.uri}")


# -- what it can do


def test_it_can_what_the_other_can(other: Other) -> None:
    assert over(other).flags == MemoryBackend(SIZE).flags
    assert over(other, "&read-only=yes").flags & FLAGS.READ_ONLY
    with nbdkit("memory", "1M", filters=["nozero"], flags=["-r"]) as server:
        flags = opened(f"nbd:{server.uri}").flags
        assert flags & FLAGS.READ_ONLY and not flags & (FLAGS.SEND_WRITE_ZEROES | FLAGS.SEND_FAST_ZERO)


@pytest.mark.parametrize("refused_from", [0, 1, 3, 4])
def test_zeroes_are_fast_for_all_of_a_request_or_refused_for_all_of_it(
    other: Other, monkeypatch: pytest.MonkeyPatch, refused_from: int
) -> None:
    class Sometimes(Passing):
        def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
            if fast and where.start >= refused_from << 16:
                raise OSError(errno.ENOTSUP, "not there")
            super().zero(where, may_punch=may_punch, fast=fast)

    monkeypatch.setattr(remote, "REMOTE_RANGE_BYTES", 1 << 16)  # what is longer is asked in so many requests
    other.backend = Sometimes(MemoryBackend(SIZE))
    backend = over(other)
    write(backend, b"x" * (1 << 18))
    where = Range(0, 1 << 18)
    if not refused_from:
        with pytest.raises(OSError, match="not there") as failed:
            backend.zero(where, may_punch=True, fast=True)
        assert failed.value.errno == errno.ENOTSUP
        assert content_of(backend, where) == b"x" * (1 << 18)
        return
    backend.zero(where, may_punch=True, fast=True)
    assert content_of(backend, where) == bytes(1 << 18)


@pytest.mark.parametrize("is_started_again", [False, True])
def test_zeroes_that_may_have_been_made_before_are_not_refused_when_they_are_asked_again(
    other: Other, monkeypatch: pytest.MonkeyPatch, is_started_again: bool
) -> None:
    class Fickle(Passing):
        has_changed = False

        def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
            if self.has_changed and fast:
                raise OSError(errno.ENOTSUP, "not any more")
            super().zero(where, may_punch=may_punch, fast=fast)
            is_second = bool(where.start)
            if is_second is is_started_again and not self.has_changed:  # before it is answered
                self.has_changed = True
                (other.start_again if is_started_again else lambda _: other.cut())(self)

    monkeypatch.setattr(remote, "REMOTE_RANGE_BYTES", 1 << 16)
    fickle = other.backend = Fickle(MemoryBackend(SIZE))
    backend = over(other)
    write(backend, b"x" * (1 << 17))
    backend.flush()
    backend.zero(Range(0, 1 << 17), may_punch=True, fast=True)
    assert content_of(backend, Range(0, 1 << 17)) == bytes(1 << 17)
    assert fickle.has_changed


def test_requests_of_many_threads_are_under_way_at_once_on_one_connection(other: Other) -> None:
    class Meeting(Passing):
        barrier = threading.Barrier(8)

        def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
            self.barrier.wait(30)  # one after another they would never meet
            return super().read(where)

    other.backend = Meeting(MemoryBackend(SIZE))
    backend = over(other, "&connections=1")
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(backend.read, [BLOCK] * 8))) == 8


def test_a_server_that_admits_fewer_connections_is_used_with_those() -> None:
    with serving("memory:1M", "--max-connections", "2") as served:
        backend = opened(f"nbd:{served.uri()}")
        write(backend)
        assert content_of(backend, Range(0, 7)) == b"written"


def test_its_own_errors_are_passed_on(other: Other) -> None:
    other.backend = open_backend(Wanted("disk", "raw", "error:memory:1M?error-write=ENOSPC&error-extents=EIO"))
    backend = over(other)
    with pytest.raises(OSError, match="the layer `error` fails this write") as caught:
        write(backend)
    assert caught.value.errno == errno.ENOSPC
    assert backend.extents(BLOCK) == [(BLOCK, 0)]  # what cannot be told is data


# -- connections that are lost


def test_what_is_read_is_asked_again_on_a_new_connection(other: Other) -> None:
    backend = over(other)
    write(backend)
    backend.flush()
    for _ in range(3):
        other.cut()
        assert content_of(backend, Range(0, 7)) == b"written"
    assert backend.losses == 0


class Held(Passing):
    """Calls of `kind` wait for `may_go`."""

    def __init__(self, kind: str) -> None:
        super().__init__(MemoryBackend(SIZE))
        self.begun, self.may_go = threading.Event(), threading.Event()
        self._kind = kind

    def _hold(self, kind: str) -> None:
        if kind == self._kind:
            self.begun.set()
            assert self.may_go.wait(30)

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        self._hold("read")
        return super().read(where)

    def write(self, where: Range, data: memoryview) -> None:
        self._hold("write")
        super().write(where, data)

    def flush(self) -> None:
        self._hold("flush")


CALLS: dict[str, Callable[[Backend], object]] = {"write": write, "read": lambda backend: backend.read(BLOCK)}


@pytest.mark.parametrize("kind", CALLS)
def test_what_was_under_way_is_asked_again_in_the_next_life(other: Other, kind: str) -> None:
    held = Held(kind)
    other.backend = held
    backend = over(other)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(CALLS[kind], backend)
        assert held.begun.wait(30)
        other.start_again()
        asked.result(30)
        held.may_go.set()
    backend.flush()
    assert backend.losses == 0
    if kind == "write":
        assert content_of(other.backend, Range(0, 7)) == b"written"


def lost(backend: Backend) -> None:
    """Every flush says so, and so does `losses`."""
    for _ in range(2):
        with pytest.raises(OSError, match="may have lost what it acknowledged: ") as caught:
            backend.flush()
        assert caught.value.errno == errno.EIO
    assert backend.losses == 1


def test_what_was_not_flushed_when_it_was_started_again_is_told_by_every_flush(other: Other) -> None:
    backend = over(other)
    write(backend)
    other.start_again()
    lost(backend)


def test_also_where_something_else_finds_out_that_it_was_started_again(other: Other) -> None:
    backend = over(other)
    write(backend)
    other.start_again()
    backend.read(BLOCK)
    write(backend)
    lost(backend)


def test_nothing_is_lost_that_was_flushed(other: Other) -> None:
    backend = over(other)
    write(backend)
    backend.flush()
    other.start_again(other.backend)
    backend.flush()
    write(backend)
    backend.flush()
    assert backend.losses == 0


def test_nothing_is_lost_with_a_connection_where_the_other_says_that_it_lives(other: Other) -> None:
    backend = over(other)
    write(backend)
    other.cut()
    backend.flush()
    assert backend.losses == 0


def test_a_flush_on_a_connection_that_is_lost_is_asked_again_where_nothing_is(other: Other) -> None:
    class Cutting(MemoryBackend):
        cuts = 2

        def flush(self) -> None:
            if self.cuts:
                self.cuts -= 1
                other.cut()

    other.backend = Cutting(SIZE)
    backend = over(other)
    write(backend)
    backend.flush()
    assert (other.backend.cuts, backend.losses) == (0, 0)


def test_who_does_not_say_so_may_have_lost_it() -> None:
    with nbdkit("memory", "1M") as server:
        backend = opened(f"nbd:{server.uri}&connections=1")
        assert isinstance(backend, remote.RemoteBackend)
        write(backend)
        (link,) = backend._links
        link._socket.shutdown(socket.SHUT_RDWR)
        lost(backend)


class Losing(Passing):
    """A flush fails; `loses`: and with it what was written."""

    def __init__(self, loses: bool) -> None:
        super().__init__(MemoryBackend(SIZE))
        self.fails = 1
        self._loses = loses

    @property
    def losses(self) -> int:
        return int(self._loses and not self.fails)

    def flush(self) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EIO, "not this time")


def test_a_flush_that_fails_has_lost_what_it_covered(other: Other) -> None:
    other.backend = Losing(loses=True)
    backend = over(other)
    write(backend)
    with pytest.raises(OSError, match="not this time"):
        backend.flush()
    lost(backend)


def test_a_flush_that_fails_has_lost_nothing_where_the_other_says_so_and_may_be_tried_again(other: Other) -> None:
    other.backend = Losing(loses=False)
    backend = over(other, layers="retry:", more="&retry-delay=1ms")
    write(backend)
    backend.flush()
    assert backend.losses == 0


def test_a_flush_whose_answer_is_lost_with_the_servers_life_has_failed(other: Other) -> None:
    held = Held("flush")
    other.backend = held
    backend = over(other)
    write(backend)
    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(backend.flush)
        assert held.begun.wait(30)
        other.start_again()
        with pytest.raises(OSError) as caught:
            flushing.result(30)
        held.may_go.set()
    assert caught.value.errno == errno.EIO
    lost(backend)


def answers(backend: Backend) -> bool:
    with contextlib.suppress(OSError):
        backend.read(BLOCK)
        return True
    return False


def test_a_server_that_is_gone_is_an_error_until_it_is_back() -> None:
    with private_folder() as folder:
        server = Other(folder)
        backend = over(server)
        for _ in range(2):
            server.end()
            server.path.unlink()
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    backend.read(BLOCK)
                assert caught.value.errno == errno.ENOTCONN
            server = Other(folder)
            wait_for("the server to be found again", lambda: answers(backend))
        server.end()


def test_an_export_that_has_become_another_one_is_not_used(other: Other) -> None:
    backend = over(other)
    other.start_again(MemoryBackend(2 * SIZE))
    with pytest.raises(OSError, match="it is not the same export any more"):
        backend.read(BLOCK)


def test_a_server_that_is_about_to_end_is_left_and_asked_anew(other: Other) -> None:
    backend = over(other, "&connections=1")
    (connection,) = other.connections
    connection.leave()  # it answers ESHUTDOWN, or has hung up already
    assert content_of(backend, BLOCK) == bytes(4096)


def test_an_answer_that_does_not_come_ends_the_wait(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LINK_REQUEST_SECONDS", 0.3)
    held = Held("read")
    other.backend = held
    backend = over(other)
    with pytest.raises(OSError, match="timed out while reading") as caught:
        backend.read(BLOCK)
    assert caught.value.errno == errno.ETIMEDOUT
    held.may_go.set()
    backend.read(BLOCK)


def test_a_server_that_breaks_the_protocol_is_told_of_and_cut_off(other: Other) -> None:
    class Rude(MemoryBackend):
        def extents(self, where: Range) -> Extents:
            with contextlib.suppress(OSError):
                other._sockets[-1].send(b"this is no reply at all, whatever was asked for")
            return super().extents(where)

    other.backend = Rude(SIZE)
    backend = over(other, "&connections=1")
    with pytest.raises(OSError, match="protocol error in a reply") as caught:
        backend.extents(BLOCK)
    assert caught.value.errno == errno.EPROTO
    assert content_of(backend, BLOCK) == bytes(4096)
