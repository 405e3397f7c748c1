"""The end of a service, step by step: what was accepted is finished, the rest refused, all flushed; or at once."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.limits import CONNECTION_DESCRIPTORS, EXPORT_DESCRIPTORS, SERVER_DESCRIPTORS
from nbdshard.common.nbd.client import Done
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.ranges import Range
from nbdshard.server import service as under_test
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.exports import Exported, Exports
from nbdshard.server.layers.base import Passing
from nbdshard.server.listening import listen_unix
from nbdshard.server.orders import AT_ONCE, END, PipeOrders
from nbdshard.server.places import Places, places_for
from nbdshard.server.service import Service
from support.nbd_blocking import Connection, connect
from support.servers import private_folder
from support.waiting import WAIT_SECONDS, wait_for

SIZE = 1 << 20
THREADS = ("client", "flush")


class Held(Passing):
    """Writes and flushes begin, and go on when a test says so. `story`: what was called, in order."""

    def __init__(self) -> None:
        super().__init__(MemoryBackend(SIZE))
        self.story: list[str] = []
        self.may_write, self.may_flush = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def write(self, where: Range, data: memoryview) -> None:
        self.story.append("write")
        assert self.may_write.wait(WAIT_SECONDS)
        super().write(where, data)
        self.story.append("written")

    def flush(self) -> None:
        self.story.append("flush")
        assert self.may_flush.wait(WAIT_SECONDS)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.story.append("close")


class Told:
    """Orders that a test gives."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._asked = 0

    def ask(self, what: int) -> None:
        self._asked = what
        os.eventfd_write(self.descriptor, 1)

    def asked(self) -> int:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        return self._asked


class Running:
    """A service in a thread, with one export."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backend, self.orders, self.ending = Held(), Told(), threading.Event()
        self.statuses: list[int] = []
        self._places = Places(8)
        exports = Exports({"disk": Exported(self.backend)}, uuid.uuid4())
        self._service = Service(exports, [listen_unix(path)], self._places, self.orders, self.ending)
        self.thread = threading.Thread(target=lambda: self.statuses.append(self._service.run()))
        self.thread.start()

    def connect(self) -> Connection:
        return Connection(self.path, Wishes("disk"))

    def close(self) -> None:
        """End it, whatever it waits for."""
        self.backend.may_write.set()
        self.backend.may_flush.set()
        self.orders.ask(AT_ONCE)
        self.thread.join(WAIT_SECONDS)
        wait_for(
            "its threads to end", lambda: not any(thread.name.startswith(THREADS) for thread in threading.enumerate())
        )
        self._service.close()
        self._places.close()
        os.close(self.orders.descriptor)

    def ended(self) -> int:
        self.thread.join(WAIT_SECONDS)
        (status,) = self.statuses
        return status


@pytest.fixture
def running() -> Iterator[Running]:
    with private_folder() as folder:
        running = Running(folder / "socket")
        stack_bytes = threading.stack_size()
        try:
            yield running
        finally:
            running.close()
            threading.stack_size(stack_bytes)


def begun(running: Running, what: str) -> None:
    wait_for(f"{what!r} to begin", lambda: what in running.backend.story)


def test_what_was_accepted_is_finished_and_the_rest_refused_and_then_all_is_flushed(running: Running) -> None:
    with running.connect() as connection:
        client = connection.client
        client.write(1, Range(0, 4096), [b"x" * 4096])
        connection.push([])
        begun(running, "write")
        running.orders.ask(END)
        assert running.ending.wait(WAIT_SECONDS)
        wait_for("nobody to be let in any more", lambda: not can_connect(running.path))
        wait_for("the client to be refused", lambda: is_refused(connection))
        running.backend.may_write.set()
        assert connection.run() == [Done(1)]
        assert connection.socket.recv(1) == b""
    begun(running, "flush")
    assert running.thread.is_alive()
    running.backend.may_flush.set()
    assert running.ended() == 0
    assert running.backend.story == ["write", "written", "flush", "close"]


def is_refused(connection: Connection) -> bool:
    """Whether a read is answered with ESHUTDOWN, beside a write that is not answered."""
    connection.client.read(2, Range(0, 4096), memoryview(bytearray(4096)))
    connection.push([])
    while True:
        count = connection.socket.recvmsg_into(connection.client.receive_target())[0]
        for event in connection.client.received(count):
            assert isinstance(event, Done) and event.handle == 2
            return event.error is not None and event.error.errno_name == "ESHUTDOWN"


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "the disk is gone"), "export 'disk': what was written may be lost: the disk is gone"),
        (ValueError("a bug"), "internal error: export 'disk': ValueError: a bug"),
    ],
)
def test_a_last_flush_that_fails_is_told(
    running: Running, capfd: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    running.backend.error = error
    running.backend.may_flush.set()
    running.orders.ask(END)
    assert running.ended() == 1
    assert said in capfd.readouterr().err


def test_the_last_flush_is_waited_for_and_a_second_order_ends_that(
    running: Running, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "FLUSH_TOLD_SECONDS", 0.01)
    running.orders.ask(END)
    begun(running, "flush")
    seen = ""

    def is_told() -> bool:
        nonlocal seen
        seen += capfd.readouterr().err
        return seen.count("waits for the flush of 'disk'") > 1

    wait_for("it to say what it waits for", is_told)
    running.orders.ask(AT_ONCE)
    assert running.ended() == 1
    assert "what no flush has covered may be lost" in capfd.readouterr().err


def test_the_last_flush_needs_no_thread(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    running.backend.may_flush.set()
    monkeypatch.setattr(threading.Thread, "start", refused)
    running.orders.ask(END)
    assert running.ended() == 0
    assert running.backend.story == ["flush", "close"]


def test_a_second_order_ends_also_what_is_still_being_carried_out(running: Running) -> None:
    with running.connect() as connection:
        connection.client.write(1, Range(0, 4096), [b"x" * 4096])
        connection.push([])
        begun(running, "write")
        running.orders.ask(END)
        assert running.ending.wait(WAIT_SECONDS)
        running.orders.ask(AT_ONCE)
        assert running.ended() == 1
    assert "flush" not in running.backend.story


def test_a_request_that_is_never_answered_does_not_keep_the_rest_from_being_flushed(
    running: Running, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "SERVER_DRAIN_SECONDS", 0.01)
    running.backend.may_flush.set()
    with running.connect() as connection:
        connection.client.write(1, Range(0, 4096), [b"x" * 4096])
        connection.push([])
        begun(running, "write")
        running.orders.ask(END)
        assert running.ended() == 1
    assert running.backend.story == ["write", "flush"]  # it is still used: it is not closed
    assert "1 clients wait for answers" in capfd.readouterr().err


def test_a_client_that_has_chosen_nothing_yet_does_not_hold_up_the_end(running: Running) -> None:
    running.backend.may_flush.set()
    with connect(running.path) as peer:
        assert peer.recv(8) == b"NBDMAGIC"
        running.orders.ask(END)
        while peer.recv(4096):
            pass
    assert running.ended() == 0


def test_the_last_answer_arrives_although_the_client_goes_on_sending(running: Running) -> None:
    """Closing a socket with something unread in it resets the connection: what was answered would be lost."""
    connection = running.connect()
    with connection:
        connection.socket.sendall(bytes(100))  # no request: it is cut off
        with contextlib.suppress(BrokenPipeError):
            for _ in range(8):
                connection.socket.sendall(bytes(100))
        assert connection.socket.recv(1) == b""


def test_the_end_of_a_pipe_is_an_order() -> None:
    reading, writing = os.pipe()
    orders = PipeOrders(reading)
    assert (orders.asked(), orders.descriptor) == (0, reading)
    os.close(writing)
    assert (orders.asked(), orders.descriptor, orders.asked()) == (END, -1, END)
    os.close(reading)


def test_places_are_taken_and_given_back() -> None:
    places = Places(2)
    assert [places.take() for _ in range(3)] == [True, True, False]
    places.give()
    assert [places.take() for _ in range(2)] == [True, False]
    places.close()


def test_descriptors_are_for_clients_but_half_of_them_at_most_for_everything_else() -> None:
    assert places_for(1 << 20, 1) == ((1 << 20) - SERVER_DESCRIPTORS - EXPORT_DESCRIPTORS) // CONNECTION_DESCRIPTORS
    assert places_for(1 << 20, 2) < places_for(1 << 20, 1)
    assert places_for(1024, 100) == 512 // CONNECTION_DESCRIPTORS
    assert places_for(2, 1) == 1
