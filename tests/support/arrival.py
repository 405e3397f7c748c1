"""A server's bytes on their way through a real socket into a client's sinks, moved as worker/direct.py moves them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from nbdshard.common.nbd.client import Client, Event
from nbdshard.common.nbd.payload import Piece
from nbdshard.worker.piped import PipedPayload, PipeRun
from nbdshard.worker.pipes import Plumbing
from support.listening import receive_exactly
from support.waiting import WAIT_SECONDS

PIECE_BYTES = 64 << 10  # what a socket's buffers hold in any case


class Arrival:
    """One connection. `theirs` is the server's end; no piece may be larger than a socket's buffers."""

    def __init__(self, plumbing: Plumbing, ours: socket.socket, theirs: socket.socket) -> None:
        ours.setblocking(False)
        theirs.settimeout(WAIT_SECONDS)
        self.ours = ours
        self.theirs = theirs
        self._plumbing = plumbing

    def come(self, client: Client, *pieces: bytes) -> list[Event]:
        """`pieces` arrive one after the other, each taken before the next comes; what the client says to them."""
        events: list[Event] = []
        for piece in pieces:
            self.theirs.sendall(piece)
            events += self._take(client)
        return events

    def _take(self, client: Client) -> list[Event]:
        events: list[Event] = []
        while True:
            target, sink = client.receive_target(), client.payload_sink
            if target:
                count = self._plumbing.receive(self.ours.fileno(), target)
            else:
                assert isinstance(sink, PipedPayload)
                count = self._plumbing.fill(sink.pipe, self.ours.fileno(), client.payload_left)
            if count > 0:
                events += client.received(count)
            if not target and isinstance(sink, PipedPayload) and sink.pipe.is_full:
                sink.spill()
            elif count <= 0:
                return events

    def fill(self, payload: PipedPayload, data: bytes) -> None:
        """`data`, from the start of `payload` on, arrives in its pipe, or where that is full early in memory."""
        payload.begin(0, len(data))
        for at in range(0, len(data), PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            self.theirs.sendall(piece)
            while piece:
                target = payload.target()
                if target:
                    count = self._plumbing.receive(self.ours.fileno(), [target])
                else:
                    count = self._plumbing.fill(payload.pipe, self.ours.fileno(), len(piece))
                if count > 0:
                    payload.advance(count)
                    piece = piece[count:]
                else:
                    assert payload.pipe.is_full
                    payload.spill()

    def leave(self, pieces: list[Piece]) -> bytes:
        """Everything in `pieces` is sent; what the other end got."""
        got = b""
        for piece in pieces:
            left = len(piece)
            while left:
                if isinstance(piece, PipeRun):
                    count = self._plumbing.drain(piece.pipe, self.ours.fileno(), left, more=False)
                    piece.left -= count
                else:
                    assert isinstance(piece, memoryview | bytes)
                    rest = memoryview(piece)[len(piece) - left :]
                    count = self._plumbing.send(self.ours.fileno(), [rest], more=False)
                assert count > 0
                left -= count
                got += receive_exactly(self.theirs, count)
        return got


@contextlib.contextmanager
def arrival(plumbing: Plumbing) -> Iterator[Arrival]:
    """Over a socket pair, which is closed when the block ends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Arrival(plumbing, ours, theirs)
