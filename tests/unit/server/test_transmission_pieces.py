"""WRITEs whose payload goes to a file piece by piece, and answers that are held back meanwhile."""

from __future__ import annotations

import errno
import mmap
import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import ANY

import pytest

from nbdshard.common import logs
from nbdshard.common.limits import INLINE_SECONDS_MAX, MIB
from nbdshard.common.nbd.client import Done
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Place
from nbdshard.server.backends.file import FileBackend
from nbdshard.server.conduit import Conduit
from support import images
from support.visitor import WAYS, unread_bytes, visiting
from support.waiting import wait_for

SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return images.random_image(tmp_path / "image", SIZE)


def test_a_write_that_fails_before_all_of_it_has_come_is_answered_and_the_next_one_served(image: Path) -> None:
    with visiting(Full(image)) as visitor:
        assert visitor.write(Range.of(0, 5 * MIB), bytes(5 * MIB)) == "ENOSPC"
        assert visitor.write(Range.of(0, 100), b"x" * 100) == ""
        assert visitor.read(Range.of(0, 100)) == b"x" * 100


def test_a_write_that_fails_just_when_the_pipe_is_full_is_answered(image: Path) -> None:
    data = bytes(3 * MIB)
    with visiting(Full(image)) as visitor:
        visitor.client.write(0, Range.of(0, len(data)), [data])
        stream = b"".join(map(bytes, in_memory(visitor.client.data_to_send())))
        at, piece = 0, 4096
        while at < len(stream):  # each piece is in the pipe before the next one comes, as long as it takes any
            visitor.socket.sendall(stream[at : at + piece])
            at += piece
            wait_for("the piece to be taken", lambda: not unread_bytes(visitor.socket))
        visitor.client.sent(len(stream))
        (done,) = visitor.answers(1)
        assert done.error is not None
        assert done.error.errno_name == "ENOSPC"


def test_an_answer_does_not_wait_for_the_rest_of_what_follows(image: Path) -> None:
    with visiting(FileBackend(image)) as visitor:
        for number in range(3):
            visitor.client.write(number, Range.of(number * MIB, MIB), [bytes([number]) * MIB])
        stream = b"".join(map(bytes, in_memory(visitor.client.data_to_send())))
        visitor.client.sent(len(stream))
        visitor.socket.sendall(stream[: -MIB // 2])
        assert {done.handle for done in visitor.answers(2)} == {0, 1}
        visitor.socket.sendall(stream[-MIB // 2 :])
        assert [done.handle for done in visitor.answers(1)] == [2]
    assert image.read_bytes()[: 3 * MIB] == b"".join(bytes([number]) * MIB for number in range(3))


def test_half_a_write_is_stored_and_not_answered(image: Path) -> None:
    with visiting(FileBackend(image)) as visitor:
        visitor.client.write(0, Range.of(1000, MIB), [b"x" * MIB])
        stream = b"".join(map(bytes, in_memory(visitor.client.data_to_send())))
        visitor.socket.sendall(stream[: MIB // 2])
        wait_for("some of it to be in the file", lambda: image.read_bytes()[1000 : 1000 + 65_536] == b"x" * 65_536)
        visitor.socket.shutdown(socket.SHUT_WR)
        assert visitor.socket.recv(1) == b""


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_write_that_fails_in_any_of_its_pieces_is_answered_once(image: Path, calls: int) -> None:
    backend = FullLater(image, calls)
    with visiting(backend) as visitor:
        visitor.client.write(0, Range.of(0, 3 * MIB), [b"x" * 3 * MIB])
        visitor.client.write(1, Range.of(4 * MIB, 3 * MIB), [b"y" * 3 * MIB])
        first, second = visitor.ask(count=2)
        assert first.error is not None
        assert (first.handle, first.error.errno_name, second) == (0, "ENOSPC", Done(1))
    assert image.read_bytes()[4 * MIB : 7 * MIB] == b"y" * 3 * MIB


def test_pieces_end_where_pages_do(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a page that is not at hand would have to be read, in the middle of all the writing."""
    ends: list[int] = []
    store = Conduit.store

    def noting(conduit: Conduit, number: int, offset: int, length: int) -> None:
        ends.append(offset + length)
        store(conduit, number, offset, length)

    monkeypatch.setattr(Conduit, "store", noting)
    start, data = 3 * mmap.PAGESIZE, random.Random(5).randbytes(2 * MIB)
    with visiting(FileBackend(image)) as visitor:
        visitor.client.write(0, Range.of(start, len(data)), [data])
        stream = b"".join(map(bytes, in_memory(visitor.client.data_to_send())))
        for at in range(0, len(stream), 70_001):
            visitor.socket.sendall(stream[at : at + 70_001])
            wait_for("the piece to be taken", lambda: not unread_bytes(visitor.socket))
        visitor.client.sent(len(stream))
        assert visitor.answers(1) == [Done(0)]
    assert image.read_bytes()[start : start + len(data)] == data
    assert len(ends) > 10
    assert {end % mmap.PAGESIZE for end in ends} == {0}


def test_after_a_piece_that_took_long_others_do_not_wait_for_the_next_ones(image: Path) -> None:
    backend = Throttled(image)
    with visiting(backend) as visitor:
        assert visitor.write(Range.of(0, MIB), b"x" * MIB) == ""
        assert visitor.write(Range.of(MIB, 4096), b"y" * 4096) == ""
        assert backend.threads == [visitor.thread.ident, ANY]
        assert backend.threads[1] != visitor.thread.ident


@pytest.mark.parametrize("what_follows", ["rubbish", "half", "the end", "goodbye"])
def test_what_was_done_is_answered_whatever_follows(image: Path, what_follows: str) -> None:
    length = 300_000
    with visiting(FileBackend(image), WAYS["simple"]) as visitor:
        for number in range(3):
            visitor.client.write(number, Range.of(number * MIB, length), [b"x" * length])
        if what_follows == "goodbye":
            visitor.client.disconnect()
        stream = b"".join(map(bytes, in_memory(visitor.client.data_to_send())))
        visitor.client.sent(len(stream))
        count = 2 if what_follows == "half" else 3
        if what_follows == "half":
            stream = stream[:-1000]
        visitor.socket.sendall(stream + (b"?" * 28 if what_follows == "rubbish" else b""))
        visitor.socket.shutdown(socket.SHUT_WR)
        said = b""
        while piece := visitor.socket.recv(4096):
            said += piece
    assert len(said) == count * 16


def test_what_a_client_did_wrong_is_told_though_it_takes_no_answer(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(logs, "info", told.append)
    backend = Gated(image)
    with visiting(backend) as visitor:
        visitor.client.write(0, Range.of(0, 300_000), [b"x" * 300_000])
        stream = b"".join(map(bytes, in_memory(visitor.client.data_to_send())))
        visitor.socket.sendall(stream + b"?" * 28)
        visitor.socket.close()
        backend.may_write.set()
        visitor.thread.join(30)
    assert "magic number 0x3f3f3f3f instead of" in told[-1]


def test_an_empty_piece_of_an_answer_stops_nothing(image: Path) -> None:
    with visiting(Padding(image)) as visitor:
        for _ in range(3):
            assert visitor.read(Range(0, 4096)) == image.read_bytes()[:4096]


class Full(FileBackend):
    """Nothing larger than a page can be written."""

    def writing(self, where: Range, *, is_all: bool) -> AbstractContextManager[Place]:
        raise OSError(errno.ENOSPC, "no room")


class Gated(FileBackend):
    """What is written last of a WRITE waits until it may be."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.may_write = threading.Event()

    def writing(self, where: Range, *, is_all: bool) -> AbstractContextManager[Place]:
        if is_all:
            assert self.may_write.wait(60)
        return super().writing(where, is_all=is_all)


class FullLater(FileBackend):
    """The piece that is written by call number `calls` cannot be."""

    def __init__(self, path: Path, calls: int) -> None:
        super().__init__(path)
        self._calls = calls

    def writing(self, where: Range, *, is_all: bool) -> AbstractContextManager[Place]:
        self._calls -= 1
        if not self._calls:
            raise OSError(errno.ENOSPC, "no room")
        return super().writing(where, is_all=is_all)


class Padding(FileBackend):
    def read_now(self, where: Range) -> Sequence[memoryview]:
        return (*self.read(where), memoryview(b""))  # type: ignore[return-value]


class Throttled(FileBackend):
    """Its first piece takes long. `threads`: which ones wrote that, and whatever came another way."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.threads: list[int | None] = []

    def writing(self, where: Range, *, is_all: bool) -> AbstractContextManager[Place]:
        if not self.threads:
            assert not is_all
            self.threads.append(threading.get_ident())
            end = time.monotonic() + INLINE_SECONDS_MAX
            wait_for("the clock to go on", lambda: time.monotonic() > end)
        return super().writing(where, is_all=is_all)

    def write(self, where: Range, data: memoryview) -> None:
        self.threads.append(threading.get_ident())
        super().write(where, data)
