"""How a link gets its socket: resolving and connecting, apart from the rest, so that a network can be simulated.

Everything after the connect goes through the ring.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from nbdshard.common.limits import SOCKET_BUFFER_BYTES

# getaddrinfo's five: family, type, protocol, canonical name, socket address
Address: TypeAlias = tuple[Any, ...]


class Connector(Protocol):
    """What a link needs of the system to get a connected stream socket."""

    def resolve(self, host: str, port: int) -> Sequence[Address]:
        """The addresses of `host`, best first. Blocks: to be called on a thread. Raises OSError."""

    def begin(self, address: Address) -> int:
        """Begin to connect, without blocking: the descriptor, which is the caller's now and becomes writable when it is
        connected or has failed; or -errno. -EAGAIN: a unix socket's backlog is full, try again later."""

    def error(self, number: int) -> int:
        """How connecting descriptor `number` ended: 0 or an errno (SO_ERROR)."""


class Sockets:
    """The system's own sockets."""

    def resolve(self, host: str, port: int) -> Sequence[Address]:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    def begin(self, address: Address) -> int:
        family, kind, protocol, _, where = address
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            return -(error.errno or errno.EIO)
        if family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            result = sock.connect_ex(where)
        except OSError as error:  # an address that cannot be one: a socket path too long, a bad scope
            result = error.errno or errno.EINVAL
        if result not in (0, errno.EINPROGRESS):
            sock.close()
            return -result
        return sock.detach()

    def error(self, number: int) -> int:
        sock = socket.socket(fileno=number)  # no second descriptor: there may be none left
        try:
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        finally:
            sock.detach()


SYSTEM_SOCKETS = Sockets()
