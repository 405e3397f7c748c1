"""Another loop: `python select_loop.py SOCKET` serves any number of clients in one thread, a generator for each.

A generator says what its client waits for, and is run on when that has come. Any loop can do this: the session knows of
no socket, no thread and no clock.
"""

from __future__ import annotations

import selectors
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from ram_disk import EXPORT, handle_request

from nbdshard.common.errors import NbdshardError
from nbdshard.common.nbd.payload import in_memory
from nbdshard.server.listening import listen_unix
from nbdshard.server.offers import NamedOffers
from nbdshard.server.session import Session
from nbdshard.server.simple import carry_out


def client(sock: socket.socket, session: Session) -> Iterator[int]:
    """Yields EVENT_READ or EVENT_WRITE, and wants to be run on then."""
    while True:
        for piece in in_memory(session.data_to_send()):
            left = memoryview(piece)
            while left:
                try:
                    count = sock.send(left)
                except BlockingIOError:
                    yield selectors.EVENT_WRITE
                    continue
                session.sent(count)
                left = left[count:]
        if session.finished:
            return
        requests = session.resume()
        if not requests:
            try:
                count = sock.recv_into(session.receive_target())
            except BlockingIOError:
                yield selectors.EVENT_READ
                continue
            if not count:
                session.end_of_stream()
                return
            requests = session.received(count)
        for request in requests:
            assert session.device is not None
            carry_out(handle_request, request)(session.device)


def loop(listener: socket.socket) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    generator = client(sock, Session(NamedOffers([EXPORT]), "client"))
                    selector.register(sock, selectors.EVENT_READ)
                else:
                    sock, generator = key.data
                try:
                    selector.modify(sock, next(generator), (sock, generator))
                except (StopIteration, NbdshardError, OSError):
                    selector.unregister(sock)
                    sock.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} SOCKET")
    loop(listen_unix(Path(sys.argv[1])))
