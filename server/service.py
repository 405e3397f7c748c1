"""The server's shell: it lets clients in, has a thread serve each, and ends when it is asked to.

The end has three steps. Nobody is let in any more, and clients have what they asked for finished, or are told that the
server goes away (SERVER_DRAIN_SECONDS). Then every export is flushed, for as long as it takes: what an object store has
not got yet is nowhere else. Then exports are closed, unless somebody still uses them. Asked twice, it ends at once.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from nbdshard.common import logs
from nbdshard.common.limits import (
    ACCEPT_PAUSE_SECONDS,
    CONNECTION_STACK_BYTES,
    FLUSH_TOLD_SECONDS,
    KEEPALIVE_IDLE_SECONDS,
    KEEPALIVE_PROBE_SECONDS,
    KEEPALIVE_PROBES,
    SERVER_DRAIN_SECONDS,
)
from nbdshard.server.backends.base import Backend, Deferred
from nbdshard.server.connection import Connection
from nbdshard.server.exports import Exports
from nbdshard.server.handling import NBD, Protocol
from nbdshard.server.heap import give_back_large_pieces
from nbdshard.server.notifying import notify
from nbdshard.server.orders import AT_ONCE, Orders
from nbdshard.server.peers import Peer
from nbdshard.server.places import Places

_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NETWORK: Final = (socket.AF_INET, socket.AF_INET6)


def _tune(sock: socket.socket) -> None:
    """Answers leave at once; a client whose machine has gone without a word is noticed, and its place free again."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PROBE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
    ):
        sock.setsockopt(level, option, value)


class _EndAtOnce(Exception):
    """The server was asked for its end a second time."""


class Service:
    """Serves `exports` on `listeners` until `orders` ask for an end. `run` is to be called by the main thread.

    `ending` is set then, for backends that wait.
    """

    def __init__(
        self,
        exports: Exports,
        listeners: Sequence[socket.socket],
        places: Places,
        orders: Orders,
        ending: threading.Event,
        *,
        protocol: Protocol = NBD,
        peer: Peer | None = None,
    ) -> None:
        """`peer`: this process as one of several that are one server."""
        self._exports = exports
        self._protocol = protocol
        self._listeners = listeners
        self._places = places
        self._orders = orders
        self._ending = ending
        self._peer = peer
        self._lock = threading.Lock()
        self._threads: dict[Connection, threading.Thread] = {}  # under the lock: a thread takes itself out
        self._changed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # a thread has ended
        self._count = 0
        self._is_short = False  # of descriptors: who waits to be let in would be ready at once, again and again

    def run(self) -> int:
        """Until it is asked to end: 0, or 1 where not everything could be made durable."""
        threading.stack_size(CONNECTION_STACK_BYTES)
        give_back_large_pieces()
        poll = select.poll()
        by_number = {listener.fileno(): listener for listener in self._listeners}
        for number in (self._orders.descriptor, *by_number):
            poll.register(number, select.POLLIN)
        if self._peer is not None:
            poll.register(self._peer.descriptor, select.POLLIN)
        quiet = select.poll()
        quiet.register(self._orders.descriptor, select.POLLIN)
        while not self._orders.asked():
            if self._is_short:
                self._is_short = False
                quiet.poll(ACCEPT_PAUSE_SECONDS * 1000)
                continue
            for ready, _ in poll.poll():
                if ready in by_number:
                    self._accept(by_number[ready])
                elif self._peer is not None and ready == self._peer.descriptor:
                    self._take(self._peer)
        try:
            return self._end()
        except _EndAtOnce:
            logs.error("ends at once: what no flush has covered may be lost")
            return 1

    def close(self) -> None:
        """After `run`, when no client's thread is left; for a process that goes on."""
        os.close(self._changed)

    # -- clients ------------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        """Let one client in, if it is still there. Another process may listen on the same socket, and have it."""
        try:
            spare = os.eventfd(0)  # a client takes a descriptor beside its socket's, or waits until there are two
            try:
                sock, _ = listener.accept()
            finally:
                os.close(spare)
        except BlockingIOError:
            return
        except OSError as error:  # it has gone again, or there are no descriptors left: others may go
            logs.warning(f"a client could not be accepted: {error.strerror}")
            self._is_short = error.errno in _SHORT
            return
        if not self._places.take():
            logs.warning("a client is turned away: so many are connected as may be")
            sock.close()
        elif self._peer is None or not self._peer.hand_on(sock):
            self._begin(sock)

    def _take(self, peer: Peer) -> None:
        """Let a client in that another process has accepted."""
        try:
            sock = peer.take()
        except OSError as error:
            logs.warning(f"a client of another process could not be taken: {error.strerror}")
            self._give_place()
        else:
            if sock is not None:
                self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        """Have a thread serve `sock`, which has its place."""
        self._count += 1
        client = f"client {self._count}"
        try:
            if sock.family in _NETWORK:
                client += " ({}:{})".format(*sock.getpeername())
                _tune(sock)
            self._start(sock, client)
        except (OSError, RuntimeError) as error:  # it has gone, or no descriptor, no thread is left: others may go
            logs.warning(f"{client} is turned away: {error}")
            sock.close()
            self._give_place()

    def _start(self, sock: socket.socket, client: str) -> None:
        connection = Connection(sock, self._exports, client, self._protocol)
        thread = threading.Thread(target=self._attend, args=(connection,), name=client, daemon=True)
        logs.info(f"{client} comes")
        with self._lock:
            self._threads[connection] = thread
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                del self._threads[connection]
                connection.close()
            raise

    def _attend(self, connection: Connection) -> None:
        """A client's thread."""
        try:
            connection.serve()
        finally:
            logs.info(f"{connection.client} goes")
            with self._lock:
                del self._threads[connection]
                connection.close()
            self._give_place()
            os.eventfd_write(self._changed, 1)

    def _give_place(self) -> None:
        self._places.give()
        if self._peer is not None:
            with self._lock:
                self._peer.ended()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> int:
        notify("STOPPING=1")
        self._ending.set()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            for connection in self._threads:
                connection.leave()
        all_have_left = self._wait_until(lambda: not self._threads, SERVER_DRAIN_SECONDS)
        if not all_have_left:
            logs.error(
                f"{len(self._threads)} clients wait for answers that have not come in {SERVER_DRAIN_SECONDS:g} s"
            )
        backends = self._exports.backends()
        ended: dict[str, bool] = {}

        def flush(name: str, backend: Backend) -> None:
            ended[name] = _settled(name, backend, may_close=all_have_left)
            os.eventfd_write(self._changed, 1)

        for name, backend in backends.items():
            try:
                threading.Thread(target=flush, args=(name, backend), name=f"flush of {name}", daemon=True).start()
            except RuntimeError:  # the system gives no more threads: one after the other, then
                flush(name, backend)
        while not self._wait_until(lambda: len(ended) == len(backends), FLUSH_TOLD_SECONDS):
            left = ", ".join(repr(name) for name in backends if name not in ended)
            logs.warning(
                f"waits for the flush of {left}; a second signal ends it at once, and may lose what was written"
            )
        return 0 if all_have_left and all(ended.values()) else 1

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Until a thread has made `condition` true; False where it was not, for `seconds`. Raises _EndAtOnce."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._changed, select.POLLIN)
        while True:
            if self._orders.asked() == AT_ONCE:
                raise _EndAtOnce
            if condition():
                return True
            if (left := deadline - time.monotonic()) <= 0:
                return False
            watched = self._orders.descriptor
            if watched >= 0:
                poll.register(watched, select.POLLIN)
            poll.poll(left * 1000)
            if watched >= 0:
                poll.unregister(watched)
            try:
                os.eventfd_read(self._changed)
            except BlockingIOError:
                pass


def _settled(name: str, backend: Backend, *, may_close: bool) -> bool:
    """Flush `backend`, and close it where nobody uses it any more; whether all of it is durable. Never raises."""
    try:
        try:
            backend.flush()
        except Deferred as error:
            logs.warning(f"export {name!r}: {error.strerror}")
        if may_close:
            backend.close()
    except OSError as error:
        logs.error(f"export {name!r}: what was written may be lost: {error.strerror or error}")
        return False
    except Exception as error:  # a bug; unnoticed, the end would be waited for for ever
        logs.error(f"internal error: export {name!r}: {type(error).__name__}: {error}")
        return False
    return True
