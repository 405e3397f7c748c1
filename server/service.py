"""The server's shell: sockets that listen, a thread for each client, and the signals that end it."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import ACCEPT_PAUSE_SECONDS, CONNECTION_STACK_BYTES, LISTEN_BACKLOG, SERVER_DRAIN_SECONDS
from nbdshard.server.backends.base import Backend
from nbdshard.server.connection import Connection
from nbdshard.server.exports import Exports
from nbdshard.server.handling import NBD, Protocol

_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ENDING: Final = (signal.SIGTERM, signal.SIGINT)


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of `host` ("": all of this machine). Raises UserError."""
    where = f"{host or '*'}:{port}"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return [_listening(family, address) for family, _, _, _, address in found]
    except OSError as error:
        raise UserError(f"cannot be listened on: {error.strerror or error}", where) from None


def listen_unix(path: Path) -> socket.socket:
    """A socket that listens at `path`, which must not exist. Raises UserError."""
    try:
        return _listening(socket.AF_UNIX, str(path))
    except OSError as error:
        raise UserError(f"cannot be listened on: {error.strerror or error}", str(path)) from None


def _listening(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(LISTEN_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Service:
    """Serves `exports` on `listeners` until a signal ends it. The main thread is its own.

    `ending` is set then, for backends that wait.
    """

    def __init__(
        self,
        exports: Exports,
        listeners: Sequence[socket.socket],
        connections_max: int,
        ending: threading.Event,
        *,
        protocol: Protocol = NBD,
    ) -> None:
        self._exports = exports
        self._protocol = protocol
        self._listeners = listeners
        self._connections_max = connections_max
        self._ending = ending
        self._threads: dict[Connection, threading.Thread] = {}
        self._count = 0
        self._is_short = False  # of descriptors: who waits to be let in would be ready at once, again and again

    def run(self) -> int:
        """Until SIGTERM or SIGINT. What was accepted is finished, then all is flushed: 0, or 1 where that failed."""
        threading.stack_size(CONNECTION_STACK_BYTES)
        wake, ended = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _ENDING:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(ended)
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for listener in self._listeners:
            poll.register(listener, select.POLLIN)
        by_number = {listener.fileno(): listener for listener in self._listeners}
        ending = select.poll()
        ending.register(wake, select.POLLIN)
        while True:
            if self._is_short and ending.poll(ACCEPT_PAUSE_SECONDS * 1000):
                return self._end()
            self._is_short = False
            for ready, _ in poll.poll():
                if ready == wake:
                    return self._end()
                self._reap()
                while self._accept(by_number[ready]):
                    pass

    def _accept(self, listener: socket.socket) -> bool:
        """Let one client in; whether there may be another one."""
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:  # it has gone again, or there are no descriptors left: others may go
            logs.warning(f"a client could not be accepted: {error.strerror}")
            self._is_short = error.errno in _SHORT
            return False
        self._count += 1
        client = f"client {self._count}"
        if len(self._threads) >= self._connections_max:
            logs.warning(f"{client} is turned away: {self._connections_max} are connected")
            sock.close()
            return True
        if sock.family != socket.AF_UNIX:
            client += f" ({address[0]}:{address[1]})"
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = None
        try:
            connection = Connection(sock, self._exports, client, self._protocol)
            thread = threading.Thread(target=connection.serve, daemon=True)
            thread.start()
        except (OSError, RuntimeError) as error:  # no descriptor, no thread is left: others may go
            logs.warning(f"{client} is turned away: {error}")
            sock.close()
            if connection is not None:
                connection.close()
            return True
        self._threads[connection] = thread
        return True

    def _reap(self) -> None:
        for connection, thread in list(self._threads.items()):
            if not thread.is_alive():
                connection.close()
                del self._threads[connection]

    def _end(self) -> int:
        self._ending.set()
        for listener in self._listeners:
            listener.close()
        for connection in self._threads:
            connection.leave()
        deadline = time.monotonic() + SERVER_DRAIN_SECONDS
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        failed = sum(not _flushed(backend) for backend in self._exports.backends())
        if not any(thread.is_alive() for thread in self._threads.values()):  # nobody asks for anything any more
            for backend in self._exports.backends():
                backend.close()
        return failed and 1


def _flushed(backend: Backend) -> bool:
    try:
        backend.flush()
    except OSError as error:
        logs.error(f"what was written may be lost: {error.strerror or error}")
        return False
    return True


def addresses(listeners: Iterable[socket.socket]) -> list[str]:
    """Where it listens, as NBD URIs without an export's name."""
    found = []
    for listener in listeners:
        name = listener.getsockname()
        if listener.family == socket.AF_UNIX:
            found.append(f"nbd+unix:///?socket={name}")
        else:
            host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
            found.append(f"nbd://{host}:{name[1]}/")
    return found
