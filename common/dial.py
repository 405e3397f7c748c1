"""Connect a socket to where an NBD URI points, within a time. Blocks: for `info`, `map` and tests, not for a ring."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import TypeAlias

from nbdshard.common.errors import ConnectionLost, TimedOut
from nbdshard.common.limits import ADDRESSES_MAX, CONNECT_SECONDS
from nbdshard.common.nbd.uri import NbdUri

# getaddrinfo's five: family, type, protocol, canonical name, socket address
AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[str | int, ...] | tuple[int, bytes]]


class Unreachable(ConnectionLost):
    """No connection to `peer` came about; `cause` says why ("connection refused"). Trying again later may help."""

    def __init__(self, peer: str, cause: str) -> None:
        super().__init__(peer, "connecting", cause)

    def __reduce__(self) -> tuple[type[Unreachable], tuple[str, str]]:
        return type(self), (self.peer, self.cause)

    def __str__(self) -> str:
        return f"{self.peer}: {self.cause}"


def dial(uri: NbdUri, peer: str, seconds: float = CONNECT_SECONDS) -> socket.socket:
    """A connected, blocking socket; the caller closes it. `peer` is the URI's name in messages.

    Every address of a host name is tried, in the resolver's order. Raises Unreachable (with the last address's
    error), or TimedOut when `seconds` are over.
    """
    if uri.transport == "unix":
        return _dial_unix(uri.socket or "", peer, seconds)
    start = time.monotonic()
    addresses = resolve(uri.host, uri.port, peer, seconds)
    return dial_addresses(addresses, peer, seconds, start)


def dial_addresses(
    addresses: Sequence[AddressInfo], peer: str, seconds: float, start: float | None = None
) -> socket.socket:
    """A connection to the first of `addresses` that takes one; each has its share of what is left of `seconds`.

    They count from `start` by the monotonic clock, or from now. Raises as `dial` does.
    """
    deadline = (time.monotonic() if start is None else start) + seconds
    failure: ConnectionLost = TimedOut(peer, "connecting", seconds)
    for index, address in enumerate(addresses):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut(peer, "connecting", seconds)
        share = left / (len(addresses) - index)
        try:
            return _connect(address, share)
        except TimeoutError:
            failure = TimedOut(peer, "connecting", seconds)
        except OSError as error:
            failure = unreachable(peer, error)
    raise failure


def resolve(host: str, port: int, peer: str, seconds: float) -> Sequence[AddressInfo]:
    """The TCP addresses of `host`, at most ADDRESSES_MAX. Raises Unreachable, or TimedOut after `seconds`.

    getaddrinfo cannot be given a time, so a name is looked up on a thread that is left behind if the resolver hangs.
    """
    try:
        return _getaddrinfo(host, port, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        pass
    found: list[Sequence[AddressInfo]] = []
    failed: list[Exception] = []

    def look_up() -> None:
        try:
            found.append(_getaddrinfo(host, port, 0))
        except (OSError, UnicodeError) as error:  # a label longer than 63 characters is a UnicodeError
            failed.append(error)

    thread = threading.Thread(target=look_up, name=f"resolve {host}", daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    if failed:
        raise Unreachable(peer, f"the host name {host!r} does not resolve: {_lookup_cause(failed[0])}")
    raise TimedOut(peer, f"resolving the host name {host!r}", seconds)


def cause_of(error: OSError) -> str:
    """The system's text for `error`, in the form our messages use: "connection refused"."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


def unreachable(peer: str, error: OSError, path: str | None = None) -> Unreachable:
    """What `error` of connect(2) means to a user; `path` is the unix socket's."""
    if path is None:
        hint = ": nobody listens there" if error.errno == errno.ECONNREFUSED else ""
        return Unreachable(peer, cause_of(error) + hint)
    if error.errno == errno.ENOENT:
        return Unreachable(peer, f"there is no socket {path}")
    if error.errno == errno.ECONNREFUSED:
        return Unreachable(peer, f"nobody listens on the socket {path}")
    # "AF_UNIX path too long" is raised by Python itself and carries no errno
    return Unreachable(peer, f"{cause_of(error)}: {path}")


def _getaddrinfo(host: str, port: int, flags: int) -> Sequence[AddressInfo]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[:ADDRESSES_MAX]


def _lookup_cause(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    return cause_of(error) if isinstance(error, OSError) else "not a host name"


def _dial_unix(path: str, peer: str, seconds: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not settimeout: a non-blocking connect fails at once where the server has not yet accepted those before us.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))
        connection.connect(path)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
    except BlockingIOError:
        connection.close()
        raise TimedOut(peer, "connecting", seconds) from None
    except OSError as error:
        connection.close()
        raise unreachable(peer, error, path) from None
    return connection


def _timeval(seconds: float) -> bytes:
    """struct timeval; all zero means for ever."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))


def _connect(address: AddressInfo, seconds: float) -> socket.socket:
    family, kind, protocol, _, where = address
    connection = socket.socket(family, kind, protocol)
    try:
        connection.settimeout(seconds)
        connection.connect(where)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # requests are small and must leave at once
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection
