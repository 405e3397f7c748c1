"""Sockets that listen: on addresses, at paths, and those that whoever started the server has opened for it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.limits import LISTEN_BACKLOG, UNIX_PATH_BYTES_MAX

_LISTEN_FDS_START: Final = 3  # sd_listen_fds(3): the first of them
_NO_SUCH_ADDRESS: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})  # IPv6 is switched off, say
_NETWORK: Final = (socket.AF_INET, socket.AF_INET6)


def listen_tcp(host: str, port: int, processes: int = 1) -> list[list[socket.socket]]:
    """For each process its sockets, which listen on every address of `host` ("": all of this machine).

    They have one port, also where it is 0. Addresses of a kind that this machine has not are left out, unless there is
    no other. Raises UserError.
    """
    where = f"{host or '*'}:{port}"
    opened: list[list[socket.socket]] = []  # for each address one of each process
    missing: OSError | None = None
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            try:
                opened.append(_one_port(family, (address[0], port, *address[2:]), processes))
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise
                missing = error
            else:
                port = port or opened[0][0].getsockname()[1]
        if missing is not None and not opened:
            raise missing
    except OSError as error:
        for sock in (sock for sockets in opened for sock in sockets):
            sock.close()
        raise UserError(f"cannot be listened on: {error.strerror or error}", where) from None
    return [list(sockets) for sockets in zip(*opened, strict=True)]


def _one_port(family: int, address: tuple[object, ...], processes: int) -> list[socket.socket]:
    """A socket for each process, among which the kernel shares out who comes.

    The first is bound like any other, which fails where anybody listens there; only then it admits others. If all
    said SO_REUSEPORT from the beginning, two servers of one user could have one port by mistake.
    """
    sockets = [_bound(family, address)]
    try:
        for _ in range(processes - 1):
            sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sockets.append(_bound(family, sockets[0].getsockname(), shares=True))
        for sock in sockets:
            sock.listen(LISTEN_BACKLOG)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def listen_unix(path: Path) -> socket.socket:
    """A socket that listens at `path`; one that a killed server has left there is replaced. Raises UserError."""
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise UserError(f"a socket's path has at most {UNIX_PATH_BYTES_MAX} bytes", str(path), "choose a shorter one")
    try:
        try:
            sock = _bound(socket.AF_UNIX, str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            path.unlink()
            sock = _bound(socket.AF_UNIX, str(path))
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and not path.is_socket():
            raise UserError("is there already, and no socket", str(path)) from None
        raise UserError(f"cannot be listened on: {error.strerror or error}", str(path)) from None
    return sock


def identity_of(path: Path) -> tuple[int, int]:
    """What `path` is, whatever it is called. Raises OSError."""
    facts = path.lstat()
    return facts.st_dev, facts.st_ino


def remove_unix(path: Path, identity: tuple[int, int]) -> None:
    """Remove the socket at `path`, unless another one is there by now than that of this `identity`."""
    try:
        if identity_of(path) == identity:
            path.unlink()
    except OSError:  # it has gone, or its directory is not ours any more
        pass


def _is_left_over(path: Path) -> bool:
    """Whether `path` is a socket that nobody has open any more."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        return sock.connect_ex(str(path)) == errno.ECONNREFUSED


def _bound(family: int, address: object, *, shares: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if family in _NETWORK:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shares:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)  # type: ignore[arg-type]
    except OSError:
        sock.close()
        raise
    return sock


def inherited() -> list[socket.socket]:
    """Sockets that listen already, by systemd's or a client's socket activation (sd_listen_fds(3)). Raises UserError.

    The variables that tell of them are removed: they are for this process alone.
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit()) or int(count) > LISTEN_BACKLOG:
        raise UserError(f"LISTEN_FDS={count!r} is not a number of sockets", "the environment")
    names_given = names.split(":")
    found = []
    for number in range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)):
        index = number - _LISTEN_FDS_START
        name = names_given[index] if index < len(names_given) and names_given[index] else "unknown"
        found.append(_inherited(number, f"descriptor {number} ({name}), which LISTEN_FDS={count} hands over"))
    return found


def _inherited(number: int, where: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=number)
    except OSError as error:
        raise UserError(f"is no socket: {error.strerror}", where) from None
    is_stream = sock.type == socket.SOCK_STREAM
    if not is_stream or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise UserError("is no stream socket that listens", where, "a .socket unit has ListenStream= and Accept=no")
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock


def addresses(listeners: Iterable[socket.socket]) -> list[str]:
    """Where it listens, as NBD URIs without an export's name."""
    found = []
    for listener in listeners:
        name = listener.getsockname()
        if listener.family == socket.AF_UNIX:
            found.append(f"nbd+unix:///?socket={name}")
        elif listener.family in _NETWORK:
            host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
            found.append(f"nbd://{host}:{name[1]}/")
        else:
            found.append(f"{listener.family.name} {name}")
    return found
