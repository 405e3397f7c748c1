"""A client of exports in this process, by the connection core, over a socket pair."""

from __future__ import annotations

import array
import fcntl
import socket
import termios
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from nbdshard.common.nbd.client import Client, Done
from nbdshard.common.nbd.connecter import Negotiated, Wishes
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.connection import Connection
from nbdshard.server.exports import Exported, Exports
from support.nbd_blocking import negotiate

WAYS = {
    "simple": Wishes("disk", structured=False),
    "structured": Wishes("disk", extended=False),
    "extended": Wishes("disk"),
}


class Visitor:
    """A client of `exports` in this process, served by a thread of its own."""

    def __init__(self, exports: Exports, wishes: Wishes = WAYS["structured"]) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.settimeout(30)
        self.connection = Connection(ours, exports, "the client")
        self.thread = threading.Thread(target=self.connection.serve, daemon=True)
        self.thread.start()
        _, (event,) = negotiate(self.socket, wishes)
        assert isinstance(event, Negotiated)
        self.client = Client(event.export, "server", 64)

    def push(self) -> None:
        for data in in_memory(self.client.data_to_send()):
            self.socket.sendall(data)
            self.client.sent(len(data))

    def answers(self, count: int) -> list[Done]:
        """The next `count` of them."""
        found: list[Done] = []
        while len(found) < count:
            came = self.socket.recvmsg_into(self.client.receive_target())[0]
            assert came, "the connection has ended"
            found += [event for event in self.client.received(came) if isinstance(event, Done)]
        return found

    def ask(self, *, count: int = 1) -> list[Done]:
        self.push()
        return self.answers(count)

    def read(self, where: Range) -> bytes | str:
        """What is there, or the error's name."""
        into = bytearray(where.length)
        self.client.read(0, where, memoryview(into))
        (done,) = self.ask()
        return bytes(into) if done.error is None else done.error.errno_name

    def write(self, where: Range, data: bytes, *, fua: bool = False) -> str:
        """ "" or the error's name."""
        self.client.write(0, where, [data], fua=fua)
        (done,) = self.ask()
        return "" if done.error is None else done.error.errno_name

    def go(self) -> None:
        self.socket.close()
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.connection.close()


def exporting(backend: Backend) -> Exports:
    return Exports({"disk": Exported(backend)}, uuid.uuid4())


@contextmanager
def visiting(backend: Backend, wishes: Wishes = WAYS["structured"]) -> Iterator[Visitor]:
    visitor = Visitor(exporting(backend), wishes)
    try:
        yield visitor
    finally:
        visitor.go()
        backend.close()


def unread_bytes(sock: socket.socket) -> int:
    """That the other end of a unix socket has not taken yet."""
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return count[0]
