"""The ear of a running job for `nbdshard ctl`: a unix socket that only its own user can reach.

Whoever connects sends one order, is answered, and is let go. Nobody is waited for: an order that is late, an answer
that finds no room, one client too many, and that connection is closed. So the worst that a local client can do to the
copy is to have the loop turn.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from typing import Final

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    ORDER_BYTES_MAX,
    ORDER_CLIENTS_MAX,
    ORDER_DEAF_SECONDS,
    ORDER_SECONDS,
    PACE_SAMPLE_SECONDS,
)
from nbdshard.coordinator.control_paths import is_private, reachable, remove_stale, socket_name, usable_places
from nbdshard.coordinator.job import Pace, Status
from nbdshard.coordinator.progress import Meter

_CREDENTIALS: Final = struct.Struct("3i")  # unix(7), SO_PEERCRED: pid, uid, gid

Obey = Callable[[Pace], Status]  # have the job go at this pace; how it stands then. Raises UserError where it cannot


class ControlSocket:
    """One socket, from `listen` to `close`. `descriptor` is readable when `hear` has something to do."""

    def __init__(self, uuid: str, path: str, listener: socket.socket, now: float, journal: str = "") -> None:
        self._uuid = uuid
        self._journal = journal
        self._path = path
        self._listener = listener
        self._inode = _inode(path)
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._clients: dict[int, tuple[socket.socket, float]] = {}  # by descriptor, the oldest first; and until when
        self._deaf_until = inf
        self._meter = Meter(now)
        self._sample_at = now

    @classmethod
    def listen(
        cls, uuid: str, now: float, folders: Sequence[str] | None = None, *, journal: str = ""
    ) -> ControlSocket | None:
        """The socket of the job `uuid` in the first of `folders` that is private; None where none can be had.

        `journal`: where that of the job is or will be, which it tells who asks.

        A copy does without sooner than not to begin.
        """
        for folder in usable_places() if folders is None else folders:
            if not is_private(folder):
                continue
            path = os.path.join(folder, socket_name(uuid))
            remove_stale(uuid, folder)
            try:
                return cls(uuid, path, _listening(path), now, journal)
            except OSError as error:
                logs.debug(f"{path}: nobody can be listened to: {error.strerror}")
        return None

    @property
    def descriptor(self) -> int:
        return self._epoll.fileno()

    def deadline(self) -> float:
        """When `hear` is due though nothing has come."""
        return min(self._deaf_until, next((until for _, until in self._clients.values()), inf))

    def note(self, status: Status, now: float) -> None:
        """Look at how far the job is: the rate that is told is an average."""
        if now >= self._sample_at:
            self._sample_at = now + PACE_SAMPLE_SECONDS
            self._meter.take(status, now)

    def hear(self, status: Status, obey: Obey, now: float) -> None:
        """Take whoever has come, and do what those who are there say; wait for nobody."""
        if now >= self._deaf_until:
            self._deaf_until = inf
            self._epoll.modify(self._listener, select.EPOLLIN)
        for descriptor, _ in self._epoll.poll(0, ORDER_CLIENTS_MAX + 1):
            if descriptor == self._listener.fileno():
                self._accept(now)
            elif descriptor in self._clients:
                status = self._serve(self._clients[descriptor][0], status, obey, now)
        for client, until in list(self._clients.values()):
            if until <= now:
                self._drop(client)

    def close(self) -> None:
        """Hear nobody any more. Never raises: it is called while other errors are on their way. Idempotent."""
        for client, _ in list(self._clients.values()):
            self._drop(client)
        self._epoll.close()
        if self._listener.fileno() >= 0:
            self._listener.close()
            with suppress(OSError):
                if _inode(self._path) == self._inode:
                    os.unlink(self._path)

    def _accept(self, now: float) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor is left: it would be tried again at once, and for ever
            logs.debug(f"nobody can be listened to: {error.strerror}")
            self._deaf_until = now + ORDER_DEAF_SECONDS
            self._epoll.modify(self._listener, 0)
            return
        client.setblocking(False)
        _, user, _ = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if user not in (0, os.geteuid()):
            client.close()
            return
        if len(self._clients) >= ORDER_CLIENTS_MAX:
            self._drop(next(iter(self._clients.values()))[0])
        self._clients[client.fileno()] = (client, now + ORDER_SECONDS)
        self._epoll.register(client, select.EPOLLIN)

    def _serve(self, client: socket.socket, status: Status, obey: Obey, now: float) -> Status:
        """Answer the order of `client`, and let it go. How the job stands now: the next order goes on from there."""
        with suppress(OSError):  # it has gone
            if packet := client.recv(ORDER_BYTES_MAX + 1):
                status, answer = self._obeyed(packet, status, obey, now)
                client.send(answer, socket.MSG_NOSIGNAL)
        self._drop(client)
        return status

    def _obeyed(self, packet: bytes, status: Status, obey: Obey, now: float) -> tuple[Status, bytes]:
        from nbdshard.coordinator.orders import Answer, decode_order, describe, encode, pace_after

        try:
            pace = pace_after(decode_order(packet), status.pace)
            if pace != status.pace:
                status = obey(pace)
        except UserError as error:
            return status, encode(Answer(error=logs.printable(str(error))))
        self._meter.take(status, now)
        return status, encode(Answer(status=describe(self._uuid, self._journal, status, self._meter, now)))

    def _drop(self, client: socket.socket) -> None:
        del self._clients[client.fileno()]
        client.close()  # which takes it out of the epoll, too


def _listening(path: str) -> socket.socket:
    """A socket that listens at `path`, and that nobody but us can connect to.

    It gets its name when it listens: so one that refuses is a job's that was killed, and is replaced. Raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    fresh = path + ".new"
    try:
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        with reachable(fresh) as name:
            listener.bind(name)
        os.chmod(fresh, 0o600)
        listener.listen(ORDER_CLIENTS_MAX)
        os.rename(fresh, path)
    except BaseException:
        listener.close()
        with suppress(OSError):
            os.unlink(fresh)
        raise
    return listener


def _inode(path: str) -> tuple[int, int]:
    facts = os.stat(path, follow_symlinks=False)
    return facts.st_dev, facts.st_ino
