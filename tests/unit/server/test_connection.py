"""A connection's thread: nothing that was asked stays unanswered, and nothing is done while there is nothing to do."""

from __future__ import annotations

import errno
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from nbdshard.common.errors import ConnectionLost
from nbdshard.common.nbd.commands import COMMANDS, CommandEntry
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import Errno, Option, OptionReply
from nbdshard.common.nbd.payload import Piece
from nbdshard.common.nbd.wire import SIMPLE_REPLY, Request, pack_request
from nbdshard.common.nbd.wire_options import OPTION_REPLY, pack_client_flags, pack_option, unpack_option_reply
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.connection import Connection
from nbdshard.server.device import Hole
from nbdshard.server.exports import Exported, Exports
from nbdshard.server.handling import HANDLERS, NBD, Answer, Protocol
from nbdshard.server.serving import Request as ServedRequest
from support.nbd_blocking import negotiate, received

PLAIN = Wishes("disk", structured=False, extended=False)
READ = pack_request(Request(0, 0, 7, 0, 512), extended=False)


class Held(MemoryBackend):
    """Reads begin, and end when they may."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.begun, self.may_end = threading.Event(), threading.Event()

    def read(self, where: Range) -> Sequence[Piece | Hole]:
        self.begun.set()
        self.may_end.wait(30)
        return super().read(where)


class Broken(MemoryBackend):
    def read(self, where: Range) -> Sequence[Piece | Hole]:
        raise ValueError("no OSError")


@contextmanager
def connected(backend: MemoryBackend, protocol: Protocol = NBD) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection that is served, and its client, which has chosen the export."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    connection = Connection(ours, Exports({"disk": Exported(backend)}, uuid.uuid4()), "the client", protocol)
    thread = threading.Thread(target=connection.serve, daemon=True)
    thread.start()
    with theirs:
        negotiate(theirs, PLAIN)
        yield connection, theirs
    thread.join(30)
    assert not thread.is_alive()
    connection.close()


def answer(peer: socket.socket) -> tuple[int, int]:
    """(errno, cookie) of the next simple reply."""
    head = received(peer, SIMPLE_REPLY.size)
    assert len(head) == SIMPLE_REPLY.size, "the connection has ended"
    _, error, cookie = SIMPLE_REPLY.unpack(head)
    return error, cookie


def test_who_leaves_still_says_the_last_answer() -> None:
    backend = Held()
    with connected(backend) as (connection, peer):
        peer.sendall(READ)
        assert backend.begun.wait(30)
        connection.leave()
        backend.may_end.set()
        assert answer(peer) == (0, 7)
        assert len(received(peer, 512)) == 512
        assert peer.recv(1) == b""


def test_who_leaves_refuses_the_option_that_has_come() -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    connection = Connection(ours, Exports({"disk": Exported(MemoryBackend(512))}, uuid.uuid4()), "the client")
    with theirs:
        theirs.sendall(pack_client_flags(3) + pack_option(Option.LIST))
        connection.leave()
        thread = threading.Thread(target=connection.serve)
        thread.start()
        assert received(theirs, 18)
        header = unpack_option_reply(received(theirs, OPTION_REPLY.size))
        assert (header.option, header.type) == (Option.LIST, OptionReply.ERR_SHUTDOWN)
        assert received(theirs, header.length + 1) == b"the server is shutting down"
    thread.join(30)
    assert not thread.is_alive()
    connection.close()


def test_a_bug_of_a_backend_is_an_answer_too(capfd: pytest.CaptureFixture[str]) -> None:
    with connected(Broken(1 << 20)) as (_, peer):
        peer.sendall(READ)
        assert answer(peer) == (Errno.EIO, 7)
    assert "internal error" in capfd.readouterr().err


def test_a_private_command_has_a_handler_of_its_own() -> None:
    def compare(backend: Backend, request: ServedRequest) -> Answer:
        found = b"".join(bytes(p.length) if isinstance(p, Hole) else bytes(p) for p in backend.read(Range(0, 4)))
        if found != request.payload:
            raise OSError(errno.EPERM, "it differs")
        return lambda device: device.done(request)

    entry = CommandEntry(4242, sends_payload=True)
    protocol = Protocol(commands={**COMMANDS, 4242: entry}, handlers={**HANDLERS, 4242: compare})
    with connected(MemoryBackend(1 << 20), protocol) as (_, peer):
        for payload, expected in ((bytes(4), 0), (b"full", Errno.EPERM)):
            peer.sendall(pack_request(Request(0, 4242, 9, 0, 4), extended=False) + payload)
            assert answer(peer) == (expected, 9)


def test_a_client_that_has_gone_is_nothing_to_do() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, Exports({"disk": Exported(MemoryBackend(512))}, uuid.uuid4()), "the client")
    theirs.close()
    assert not connection._wait(time.monotonic(), is_wanted=False)
    assert connection._wait(time.monotonic(), is_wanted=True)
    ours.close()
    connection.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the client: it is cut off: there is no memory for what it asks"),
        (KeyError("x"), "internal error: the client: KeyError: 'x'"),
    ],
)
def test_what_nobody_expects_ends_one_connection_and_is_told_in_a_line(
    capfd: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    class Odd(MemoryBackend):
        @property
        def losses(self) -> int:
            raise error

    ours, theirs = socket.socketpair()
    connection = Connection(ours, Exports({"disk": Exported(Odd(512))}, uuid.uuid4()), "the client")
    thread = threading.Thread(target=connection.serve, daemon=True)
    thread.start()
    with theirs, pytest.raises(ConnectionLost):
        negotiate(theirs, PLAIN)
    thread.join(30)
    connection.close()
    told = capfd.readouterr().err
    assert said in told and "Traceback" not in told
