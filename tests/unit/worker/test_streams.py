"""worker/streams.py: pipes, sockets, terminals' kin and redirected files, on both rings."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.common.limits import KIB, MIB, PIPE_BYTES
from nbdshard.common.messages import EndpointAddress, Side
from nbdshard.common.ranges import Range
from nbdshard.worker import streams
from support.local_driver import RINGS, Driver, driver
from support.waiting import WAIT_SECONDS

Connect = Callable[[int, Side], Driver]
JOIN_SECONDS = WAIT_SECONDS


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(ring: str) -> Iterator[Connect]:
    """Opens connections that end with the test."""
    with contextlib.ExitStack() as stack:

        def opened(number: int, side: Side) -> Driver:
            address = EndpointAddress(kind="stream", address=str(number))
            one = stack.enter_context(driver(ring, address, side))
            one.open()
            return one

        yield opened


class Pair:
    """A stream's two ends; whatever is still open is closed with the test."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader = reader
        self.writer = writer

    def close(self, number: int) -> None:
        os.close(number)
        self.reader = -1 if number == self.reader else self.reader
        self.writer = -1 if number == self.writer else self.writer

    def close_all(self) -> None:
        for number in (self.reader, self.writer):
            if number >= 0:
                os.close(number)


def socket_pair() -> tuple[int, int]:
    first, second = socket.socketpair()
    return first.detach(), second.detach()


@pytest.fixture(params=["pipe", "socket"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    both = Pair(*(os.pipe() if request.param == "pipe" else socket_pair()))
    yield both
    both.close_all()


@pytest.fixture
def pipe() -> Iterator[Pair]:
    both = Pair(*os.pipe())
    yield both
    both.close_all()


@contextlib.contextmanager
def feeding(pair: Pair, data: bytes) -> Iterator[None]:
    """Another thread writes `data` and closes the stream."""

    def feed() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(pair.writer, view[:50_000]) :]
        pair.close(pair.writer)

    with joined(feed):
        yield


@contextlib.contextmanager
def draining(pair: Pair, into: bytearray) -> Iterator[None]:
    """Another thread reads to the end of the stream."""

    def drain() -> None:
        while piece := os.read(pair.reader, 50_000):
            into.extend(piece)

    with joined(drain):
        yield


@contextlib.contextmanager
def joined(function: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    yield
    thread.join(JOIN_SECONDS)
    assert not thread.is_alive()


# -- sources ----------------------------------------------------------------------------------------------------------


def test_a_source_is_described_as_a_stream_of_unknown_size(pipe: Pair, connect: Connect) -> None:
    found = connect(pipe.reader, "source").description
    assert (found.peer, found.size, found.read_only, found.is_stream) == ("standard input", None, True, True)
    assert (found.can_flush, found.can_zero, found.can_extents, found.can_multi_conn) == (False,) * 4


def test_reads_are_whole_until_the_end_and_then_short(pair: Pair, connect: Connect) -> None:
    data = random.Random(1).randbytes(2 * MIB + 1234)
    source = connect(pair.reader, "source")
    with feeding(pair, data):
        assert source.read(0, MIB) == data[:MIB]
        assert source.read(MIB, MIB) == data[MIB : 2 * MIB]
        assert source.read(2 * MIB, MIB) == data[2 * MIB :]
    assert source.read(2 * MIB + 1234, MIB) == b""
    assert source.lost == []


def test_a_stream_that_ends_with_a_whole_read_gives_nothing_at_the_next(pair: Pair, connect: Connect) -> None:
    source = connect(pair.reader, "source")
    with feeding(pair, b"x" * 4096):
        assert source.read(0, 4096) == b"x" * 4096
    assert source.read(4096, 1) == b""
    assert source.read(4096, 1) == b""


def test_reads_queued_together_are_answered_in_order(pipe: Pair, connect: Connect) -> None:
    source = connect(pipe.reader, "source")
    buffers = [bytearray(4), bytearray(4), bytearray(4)]
    answers = [source.ask("read", Range.of(n * 4, 4), memoryview(buffer)) for n, buffer in enumerate(buffers)]
    with feeding(pipe, b"aaaabbbbcc"):
        source.answered(*answers)
    assert [answer.count for answer in answers] == [4, 4, 2]
    assert b"".join(buffers) == b"aaaabbbbcc\0\0"
    assert [event for event in source.events if "done" in event] == ["done 0", "done 1", "done 2"]


def test_a_stream_does_not_go_back(pipe: Pair, connect: Connect) -> None:
    source = connect(pipe.reader, "source")
    os.write(pipe.writer, b"12345678")
    assert source.read(0, 4) == b"1234"
    again = source.ask("read", Range(0, 4), memoryview(bytearray(4)))
    source.until("the loss", lambda: source.lost)
    assert str(source.lost[0]) == (
        "standard input: is at byte 4 and cannot go to byte 0; a stream cannot be copied a second time"
    )
    assert again.done == 0


def test_an_idle_source_is_never_late(pipe: Pair, connect: Connect) -> None:
    source = connect(pipe.reader, "source")
    answer = source.ask("read", Range(0, 4), memoryview(bytearray(4)))
    source.turn(0)
    source.connection.tick(source.now() + 1e6)
    assert source.lost == []
    os.write(pipe.writer, b"late")
    source.answered(answer)
    assert answer.count == 4


@pytest.mark.parametrize("soft", [True, False])
def test_an_idle_source_can_be_left(pair: Pair, connect: Connect, *, soft: bool) -> None:
    source = connect(pair.reader, "source")
    answer = source.ask("read", Range(0, 4), memoryview(bytearray(4)))
    source.turn(0)
    if soft:
        source.leave()
    else:
        source.connection.close()
        source.until("the close", lambda: source.connection.closed)
    assert (answer.done, source.lost) == (0, [])
    os.write(pair.writer, b"next")
    assert os.read(pair.reader, 4) == b"next"  # nothing was taken away from who reads it next


def test_a_connection_that_was_reset_is_lost(connect: Connect) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    with server, client, accepted:
        source = connect(client.fileno(), "source")
        source.ask("read", Range(0, 4), memoryview(bytearray(4)))
        source.turn(0)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        accepted.close()
        source.until("the loss", lambda: source.lost)
        assert str(source.lost[0]) == "standard input: connection lost while reading: connection reset by peer"
        source.until("the close", lambda: source.connection.closed)


# -- destinations -----------------------------------------------------------------------------------------------------


def test_writes_come_out_whole_and_in_order(pair: Pair, connect: Connect) -> None:
    data = random.Random(2).randbytes(3 * MIB + 77)
    destination = connect(pair.writer, "destination")
    arrived = bytearray()
    with draining(pair, arrived):
        answers = [
            destination.ask("write", piece, memoryview(data)[piece.start : piece.end])
            for piece in Range(0, len(data)).split(300 * KIB)
        ]
        destination.answered(*answers)
        destination.leave()
        pair.close(pair.writer)
    assert arrived == data


def test_a_soft_end_waits_for_what_was_asked(pair: Pair, connect: Connect) -> None:
    data = random.Random(3).randbytes(2 * MIB)
    destination = connect(pair.writer, "destination")
    answers = [
        destination.ask("write", Range(0, MIB), memoryview(data)[:MIB]),
        destination.ask("write", Range(MIB, 2 * MIB), memoryview(data)[MIB:]),
    ]
    destination.turn(0)
    destination.connection.disconnect()
    assert not destination.connection.closed
    arrived = bytearray()
    with draining(pair, arrived):
        destination.answered(*answers)
        destination.until("the close", lambda: destination.connection.closed)
        pair.close(pair.writer)
    assert arrived == data


def test_a_reader_that_leaves_is_a_broken_pipe(pair: Pair, connect: Connect) -> None:
    destination = connect(pair.writer, "destination")
    pair.close(pair.reader)
    answer = destination.ask("write", Range(0, 4), memoryview(b"data"))
    destination.until("the loss", lambda: destination.lost)
    assert str(destination.lost[0]) == "standard output: connection lost while writing: broken pipe"
    assert answer.done == 0
    destination.until("the close", lambda: destination.connection.closed)


def test_a_reader_that_leaves_during_a_write_is_a_broken_pipe(pair: Pair, connect: Connect) -> None:
    destination = connect(pair.writer, "destination")
    answer = destination.ask("write", Range(0, 4 * MIB), memoryview(bytes(4 * MIB)))
    destination.turn(0)
    assert os.read(pair.reader, 10) == bytes(10)
    pair.close(pair.reader)
    destination.until("the loss", lambda: destination.lost)
    # A socket closed with bytes unread resets its peer.
    assert str(destination.lost[0]).removeprefix("standard output: connection lost while writing: ") in (
        "broken pipe",
        "connection reset by peer",
    )
    assert answer.done == 0


def test_zeroes_extents_and_flushes_are_refused(pipe: Pair, connect: Connect) -> None:
    destination = connect(pipe.writer, "destination")
    assert str(destination.zero(0, 4, allocated=False).error) == "ENOTSUP (a stream cannot be zeroed)"
    assert str(destination.flush().error) == "ENOTSUP (a stream cannot be flushed)"
    question = destination.ask("extents", Range(0, 4))
    destination.answered(question)
    assert str(question.error) == "ENOTSUP (a stream has no extents)"


def test_a_write_stuck_in_a_full_pipe_can_be_closed(pair: Pair, connect: Connect) -> None:
    destination = connect(pair.writer, "destination")
    answer = destination.ask("write", Range(0, 8 * MIB), memoryview(bytes(8 * MIB)))
    for _ in range(5):
        destination.turn(0)
    destination.connection.tick(destination.now() + 1e6)
    assert destination.lost == []
    destination.connection.close()
    destination.until("the close", lambda: destination.connection.closed)
    assert answer.done == 0


# -- files and devices that were redirected ---------------------------------------------------------------------------


def test_a_redirected_file_is_read_from_where_its_offset_is(tmp_path: Path, connect: Connect) -> None:
    (tmp_path / "file").write_bytes(b"header0123456789trailer")
    with (tmp_path / "file").open("rb", buffering=0) as file:
        file.seek(6)
        source = connect(file.fileno(), "source")
        assert source.read(0, 4) == b"0123"
        assert source.read(4, 6) == b"456789"
        source.leave()
        assert file.read() == b"trailer"  # as after any other command in a script


def test_a_redirected_file_is_written_from_where_its_offset_is_and_can_be_flushed(
    tmp_path: Path, connect: Connect
) -> None:
    (tmp_path / "file").write_bytes(b"header----------trailer")
    with (tmp_path / "file").open("r+b", buffering=0) as file:
        file.seek(6)
        destination = connect(file.fileno(), "destination")
        assert destination.description.can_flush
        assert destination.write(0, b"0123").error is None
        assert destination.write(4, b"456789").error is None
        assert destination.flush().error is None
        destination.leave()
        assert file.tell() == 16
    assert (tmp_path / "file").read_bytes() == b"header0123456789trailer"


def test_a_file_opened_for_appending_is_appended_to(tmp_path: Path, connect: Connect) -> None:
    (tmp_path / "log").write_bytes(b"before ")
    with (tmp_path / "log").open("ab", buffering=0) as file:
        destination = connect(file.fileno(), "destination")
        destination.write(0, b"one ")
        destination.write(4, b"two")
    assert (tmp_path / "log").read_bytes() == b"before one two"


def test_devices_that_are_always_ready_work(connect: Connect) -> None:
    with open("/dev/zero", "rb", buffering=0) as zero, open("/dev/null", "wb", buffering=0) as null:
        assert connect(zero.fileno(), "source").read(0, MIB) == bytes(MIB)
        assert connect(null.fileno(), "destination").write(0, bytes(MIB)).error is None


def test_a_full_device_is_lost(connect: Connect) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        destination = connect(full.fileno(), "destination")
        destination.ask("write", Range(0, 4), memoryview(b"data"))
        destination.until("the loss", lambda: destination.lost)
    assert str(destination.lost[0]) == ("standard output: connection lost while writing: no space left on device")


# -- the descriptor that was handed down ------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False])
def test_the_inherited_descriptor_is_left_open_and_as_it_was(pair: Pair, connect: Connect, *, blocking: bool) -> None:
    for number in (pair.reader, pair.writer):
        os.set_blocking(number, blocking)
    source, destination = connect(pair.reader, "source"), connect(pair.writer, "destination")
    write = destination.ask("write", Range(0, 4), memoryview(b"data"))
    destination.answered(write)
    assert source.read(0, 4) == b"data"
    assert os.get_blocking(pair.reader) is os.get_blocking(pair.writer) is blocking
    source.leave()
    destination.leave()
    assert os.get_blocking(pair.reader) is os.get_blocking(pair.writer) is blocking
    os.write(pair.writer, b"more")  # a socket was not shut down either
    assert os.read(pair.reader, 4) == b"more"


def pipe_bytes(pair: Pair) -> int:
    return fcntl.fcntl(pair.reader, fcntl.F_GETPIPE_SZ)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_pipe_is_widened(pipe: Pair, connect: Connect, side: Side) -> None:
    connect(pipe.reader if side == "source" else pipe.writer, side)
    assert pipe_bytes(pipe) == PIPE_BYTES


def test_a_pipe_that_is_wide_already_is_not_narrowed(
    pipe: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PIPE_BYTES", 4096)
    before = pipe_bytes(pipe)
    connect(pipe.reader, "source")
    assert pipe_bytes(pipe) == before > 4096


def test_a_descriptor_that_is_not_open_is_refused(ring: str) -> None:
    with driver(ring, EndpointAddress(kind="stream", address="99999"), "source") as one:
        assert str(one.refused()) == "standard input: cannot be used: Bad file descriptor"


def test_a_directory_is_refused(ring: str, tmp_path: Path) -> None:
    number = os.open(tmp_path, os.O_RDONLY)
    try:
        assert stat.S_ISDIR(os.fstat(number).st_mode)
        with driver(ring, EndpointAddress(kind="stream", address=str(number)), "source") as one:
            assert str(one.refused()) == "standard input: cannot be used: Is a directory"
    finally:
        os.close(number)


def test_an_address_that_is_no_number_is_refused(ring: str) -> None:
    with driver(ring, EndpointAddress(kind="stream", address="stdin"), "source") as one:
        assert str(one.refused()) == "standard input: its address is not a descriptor's number"
