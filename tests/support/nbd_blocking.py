"""The NBD core over one blocking socket: the simplest shell there is, for tests against real servers."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

from nbdshard.common.nbd.client import Client, Done
from nbdshard.common.nbd.commands import COMMANDS, CommandTable
from nbdshard.common.nbd.connecter import Connecter, Event, Goal, Listed, Negotiated, Wishes
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.options import OPTIONS, OptionTable
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.ranges import Range

SECONDS = 10.0  # for any one receive or send


def connect(where: Path | tuple[str, int]) -> socket.socket:
    """To a unix socket, or to a host and port."""
    peer = socket.socket(socket.AF_UNIX if isinstance(where, Path) else socket.AF_INET)
    peer.settimeout(SECONDS)
    peer.connect(str(where) if isinstance(where, Path) else where)
    return peer


def received(peer: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the stream. (MSG_WAITALL does not wait where there is a time-out.)"""
    data = b""
    while len(data) < count and (more := peer.recv(count - len(data))):
        data += more
    return data


def reset(peer: socket.socket) -> None:
    """Close a connection over TCP so that the other side is told it was reset; over a unix socket it is a close."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def negotiate(
    peer: socket.socket, wishes: Wishes, name: str = "server", options: OptionTable = OPTIONS
) -> tuple[Connecter, list[Event]]:
    """Run a connecter until it is done; errors come through."""
    connecter = Connecter(wishes, name, options=options)
    events: list[Event] = []
    while not connecter.done:
        for data in connecter.data_to_send():
            peer.sendall(data)
        count = peer.recv_into(connecter.receive_target())
        if count == 0:
            connecter.end_of_stream()
            break
        events += connecter.received(count)
    return connecter, events


class Connection:
    """A negotiated connection; every method waits for its reply."""

    def __init__(
        self,
        where: Path | tuple[str, int],
        wishes: Wishes | None = None,
        handles: int = 16,
        options: OptionTable = OPTIONS,
        commands: CommandTable = COMMANDS,
    ) -> None:
        self.socket = connect(where)
        try:
            self.connecter, (event,) = negotiate(self.socket, wishes or Wishes(), options=options)
        except BaseException:
            self.socket.close()
            raise
        assert isinstance(event, Negotiated)
        self.export: Export = event.export
        self.client = Client(event.export, "server", handles, commands=commands)

    def run(self) -> list[Done]:
        """Send what is queued and receive until nothing is pending."""
        done: list[Done] = []
        self.push(done)
        while self.client.pending:
            count = 0
            with contextlib.suppress(ConnectionResetError):  # the end of the stream, too
                count = self.socket.recvmsg_into(self.client.receive_target())[0]
            if count == 0:
                self.client.end_of_stream()
            done += [event for event in self.client.received(count) if isinstance(event, Done)]
        return done

    def push(self, done: list[Done]) -> None:
        for data in in_memory(self.client.data_to_send()):
            self.socket.sendall(data)
            done += [event for event in self.client.sent(len(data)) if isinstance(event, Done)]

    def read(self, where: Range) -> bytes:
        buffer = bytearray(where.length)
        self.client.read(0, where, memoryview(buffer))
        assert self.run() == [Done(0)]
        return bytes(buffer)

    def extents(self, where: Range) -> list[tuple[Range, int]]:
        self.client.block_status(0, where)
        (done,) = self.run()
        assert done.error is None
        assert done.extents is not None
        return done.extents

    def close(self) -> None:
        """Disconnect softly and see the server close."""
        self.client.disconnect()
        self.push([])
        assert self.socket.recv(1) == b""
        assert self.client.end_of_stream() == []
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


def exports_of(path: Path) -> list[tuple[str, str]]:
    """(name, description) of every export the server lists."""
    with connect(path) as peer:
        connecter, (event,) = negotiate(peer, Wishes(goal=Goal.LIST))
        assert isinstance(event, Listed)
        connecter.abort()
        for data in connecter.data_to_send():
            peer.sendall(data)
        return event.exports
