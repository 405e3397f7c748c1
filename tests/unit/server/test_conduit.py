"""The pipe between a socket and a file: what is in it is known, and empty it is after every error."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common import logs
from nbdshard.common.limits import MIB
from nbdshard.server.backends.base import Place
from nbdshard.server.conduit import Conduit
from support.unprivileged import as_lonely_user

DATA = os.urandom(2 * MIB)


@pytest.fixture
def conduit() -> Iterator[Conduit]:
    made = Conduit()
    yield made
    made.close()


@pytest.fixture
def number(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(DATA)
    opened = os.open(tmp_path / "file", os.O_RDWR)
    yield opened
    os.close(opened)


@pytest.mark.parametrize(("offset", "length"), [(0, MIB), (1, MIB - 4096), (4095, 300_001), (MIB + 7, MIB - 7)])
def test_a_part_of_a_file_goes_to_a_socket(conduit: Conduit, number: int, offset: int, length: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        assert conduit.fill(Place(number, offset), length)
        found = bytearray()
        while conduit.held:
            sent = conduit.send(ours.fileno(), more=False)
            found += theirs.recv(sent, socket.MSG_WAITALL) if sent else b""
        assert found == DATA[offset : offset + length]


def test_a_file_that_ends_before_is_an_error_and_nothing_is_left_in_the_pipe(conduit: Conduit, number: int) -> None:
    with pytest.raises(OSError, match="the file has become shorter") as caught:
        conduit.fill(Place(number, 2 * MIB - 100), 4096)
    assert caught.value.errno == errno.EIO
    assert conduit.held == 0
    assert conduit.fill(Place(number, 0), 4096)


def test_what_does_not_fit_is_not_begun(conduit: Conduit, number: int) -> None:
    assert not conduit.fill(Place(number, 0), 64 * MIB)
    assert conduit.held == 0


def test_a_part_of_a_stream_goes_to_a_file(conduit: Conduit, number: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert conduit.is_open_for(1)
        theirs.sendall(b"x" * 10_000)
        assert conduit.receive(ours.fileno(), 9000) == 9000
        ours.setblocking(False)
        conduit.store(number, 5, 4000)
        assert conduit.held == 5000
        conduit.store(number, 4005, 5000)
        assert conduit.receive(ours.fileno(), 9000) == 1000
        assert conduit.receive(ours.fileno(), 8000) is None
        conduit.store(number, 9005, 1000)
        theirs.close()
        assert conduit.receive(ours.fileno(), 8000) == 0
    assert os.pread(number, 10_010, 0) == DATA[:5] + b"x" * 10_000 + DATA[10_005:10_010]


def test_many_small_pieces_fill_it_early_and_go_on_when_there_is_room(conduit: Conduit, number: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        assert conduit.is_open_for(1)
        pieces = moved = 0
        while (count := conduit.receive(ours.fileno(), MIB)) is not None or not conduit.held:
            moved += count or 0
            theirs.sendall(bytes([pieces % 251]) * 16)
            pieces += 1
        assert 0 < moved < pieces * 16 < MIB  # something is left in the socket: the pipe is full
        conduit.store(number, 0, moved)
        assert conduit.receive(ours.fileno(), MIB) == pieces * 16 - moved


def test_a_file_that_cannot_be_spliced_to_is_written(conduit: Conduit, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    appended = os.open(tmp_path / "appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # splice(2): EINVAL
    with ours, theirs:
        assert conduit.is_open_for(1)
        theirs.sendall(DATA[:100_000])
        assert conduit.receive(ours.fileno(), 100_000) == 100_000
        conduit.store(appended, 0, 40_000)
        conduit.store(appended, 40_000, 60_000)
    os.close(appended)
    assert (tmp_path / "appended").read_bytes() == DATA[:100_000]


def test_a_file_that_cannot_be_written_is_an_error_and_nothing_is_left_in_the_pipe(conduit: Conduit) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open("/dev/full", "wb") as full:
        assert conduit.is_open_for(1)
        theirs.sendall(b"x" * 10_000)
        assert conduit.receive(ours.fileno(), 10_000) == 10_000
        with pytest.raises(OSError, match="No space left"):
            conduit.store(full.fileno(), 0, 10_000)
        assert conduit.held == 0


def test_a_user_whose_share_of_pipe_memory_is_used_up_has_none_and_is_told_once() -> None:
    def opened() -> tuple[int, list[bool]]:
        logs.set_up("serve", logs.Level.WARNING)
        made = [Conduit() for _ in range(100)]
        error, told = os.pipe()
        os.dup2(told, 2)
        found = [each.is_open_for(MIB) for each in made]
        os.set_blocking(error, False)
        return os.read(error, 65_536).count(b"goes through memory"), found

    with as_lonely_user(opened) as (told, found):
        assert 0 < sum(found) < 100
        assert told == 1
