"""A server of one function: what it returns or raises is the answer. Others' clients: interop/test_extending.py."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdshard.common.errors import ConnectionLost, ProtocolError
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, Command, TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server.device import Hole
from nbdshard.server.listening import listen_unix
from nbdshard.server.offers import NamedOffers, Offer
from nbdshard.server.serving import Request
from nbdshard.server.session import Session
from nbdshard.server.simple import HandleRequest, Result, offer, serve, serve_stream
from support.nbd_blocking import SECONDS, Connection
from support.servers import private_folder

MIB = 1 << 20
T = TransmissionFlag
DISK = offer("disk", MIB, T.SEND_FLUSH | T.SEND_WRITE_ZEROES)


def nothing(_request: Request) -> Result:
    return None


@contextmanager
def served(export: Offer, handle_request: HandleRequest) -> Iterator[Path]:
    with private_folder() as folder, listen_unix(folder / "socket") as listener:
        thread = threading.Thread(target=serve, args=(listener, export, handle_request))
        thread.start()
        try:
            yield folder / "socket"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)
        assert not thread.is_alive()


def test_what_is_returned_is_the_answer() -> None:
    answers: dict[int, Result] = {
        Command.READ: [b"a" * 100, Hole(200), memoryview(b"b" * 212)],
        Command.BLOCK_STATUS: [(Range(0, 4096), STATE_HOLE | STATE_ZERO), (Range(4096, MIB), 0)],
    }
    with served(DISK, lambda request: answers.get(request.command)) as path, Connection(path, Wishes("disk")) as peer:
        assert peer.read(Range(0, 512)) == b"a" * 100 + bytes(200) + b"b" * 212
        assert peer.extents(Range(0, 8192)) == [(Range(0, 4096), 3), (Range(4096, 8192), 0)]
        del answers[Command.BLOCK_STATUS]
        assert peer.extents(Range(512, 8192)) == [(Range(512, 8192), 0)]


def fails(number: int) -> HandleRequest:
    def handle_request(_request: Request) -> Result:
        raise OSError(number, "because")

    return handle_request


@pytest.mark.parametrize(
    ("handle_request", "expected"),
    [
        (fails(errno.ENOSPC), "ENOSPC (because)"),
        (fails(errno.EXDEV), "EIO (because)"),
        (lambda _: b"too short", "EIO (an internal error of the server)"),
        (nothing, "EIO (an internal error of the server)"),
    ],
)
def test_what_is_raised_is_the_clients_error(handle_request: HandleRequest, expected: str) -> None:
    with served(DISK, handle_request) as path, Connection(path, Wishes("disk")) as peer:
        peer.client.read(0, Range(0, 512), memoryview(bytearray(512)))
        (done,) = peer.run()
        assert str(done.error) == expected


def test_extents_that_are_none_are_a_fault_of_the_functions() -> None:
    for extents in ([], [(Range(512, 1024), 0)]):
        with served(DISK, lambda _, found=extents: found) as path, Connection(path, Wishes("disk")) as peer:  # type: ignore[misc]
            peer.client.block_status(0, Range(0, 4096))
            (done,) = peer.run()
            assert str(done.error) == "EIO (an internal error of the server)"


def test_an_export_is_read_only_unless_it_is_said_otherwise() -> None:
    export = offer("disk", MIB)
    with served(export, lambda request: bytes(request.length)) as path, Connection(path, Wishes("disk")) as peer:
        assert peer.export.flags & T.READ_ONLY
        assert peer.read(Range(0, 512)) == bytes(512)


def test_a_client_that_breaks_off_or_babbles_harms_no_other() -> None:
    with served(DISK, lambda request: bytes(request.length)) as path:
        for babble in (b"", b"\0\0\0\3half", b"\0\0\0\3" + bytes(100)):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                peer.sendall(babble)
        with Connection(path, Wishes("disk")) as peer:
            assert peer.read(Range(0, 512)) == bytes(512)
            peer.close()


@pytest.mark.parametrize(
    ("babble", "error"), [(b"\0\0\0\3half", ConnectionLost), (b"\0\0\0\3" + bytes(100), ProtocolError)]
)
def test_who_drives_one_stream_is_told_how_it_broke_off(babble: bytes, error: type[Exception]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(babble)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(error):
            serve_stream(ours, Session(NamedOffers([DISK]), "client"), nothing)
