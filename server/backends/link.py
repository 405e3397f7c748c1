"""A connection to another server that many threads use at once: each asks, and waits for its own answer."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Sequence

from nbdshard.common.blocking import Deadline
from nbdshard.common.dial import cause_of
from nbdshard.common.errors import BugError, ConnectionLost, NbdshardError
from nbdshard.common.limits import DISCONNECT_SECONDS, LINK_REQUESTS_MAX, SENT_PIECES_MAX
from nbdshard.common.nbd.client import Client, Done, Event
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.payload import in_memory

Queue = Callable[[Client, int], None]  # queues a request under the handle


class _Waiter:
    """Who waits for an answer. `answered` is set when there is one, or never will be."""

    __slots__ = ("answered", "done", "failure")

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.done: Done | None = None
        self.failure: NbdshardError | None = None


class Link:
    """`connection`, which it owns, in the transmission phase of `export`. A thread of its own receives.

    When anything goes wrong, or an answer does not come in time, the connection has ended for all.
    """

    def __init__(self, connection: socket.socket, export: Export, peer: str) -> None:
        self.export = export
        self.peer = peer
        self._socket = connection
        self._socket.setblocking(False)
        self._client = Client(export, peer, LINK_REQUESTS_MAX)
        self._free = list(range(LINK_REQUESTS_MAX))
        self._room = threading.BoundedSemaphore(LINK_REQUESTS_MAX)
        self._waiters: dict[int, _Waiter] = {}
        self._lock = threading.Lock()  # of all above, and of what follows
        self._failure: NbdshardError | None = None
        self._sending = threading.Lock()  # who holds it may use the socket to send; taken before the other one
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    @property
    def is_usable(self) -> bool:
        """It has not ended, and the server has not said that it is about to (ESHUTDOWN)."""
        return self._failure is None and not self._client.shutdown_seen

    @property
    def pending(self) -> int:
        """Requests without an answer."""
        return len(self._waiters)

    def ask(self, queue: Queue, deadline: Deadline) -> Done:
        """The answer, an error of the server's included. Raises ConnectionLost, TimedOut, ProtocolError."""
        if not self._room.acquire(timeout=deadline.left()):
            raise deadline.over()
        try:
            waiter = _Waiter()
            try:
                self._send(queue, waiter, deadline)
                if not waiter.answered.wait(deadline.left()):
                    raise deadline.over()
            except NbdshardError as error:
                self.fail(error)  # from now on nobody else touches the waiter
                if not waiter.answered.is_set():
                    raise
        finally:
            self._room.release()
        if waiter.failure is not None:
            raise waiter.failure
        assert waiter.done is not None
        return waiter.done

    def fail(self, error: NbdshardError) -> None:
        """Nobody gets an answer any more, but for `error`. From any thread, and as often as one likes."""
        with self._lock:
            if self._failure is None:
                self._failure = error
            waiters, self._waiters = self._waiters, {}
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        for waiter in waiters.values():
            waiter.failure = self._failure
            waiter.answered.set()

    def close(self) -> None:
        """Disconnect softly, when nobody waits for anything, and end."""
        deadline = Deadline(self.peer, "disconnecting", DISCONNECT_SECONDS)
        with contextlib.suppress(NbdshardError):
            self._send(lambda client, _: client.disconnect(), None, deadline)
            self._receiver.join(deadline.left())
        self.fail(ConnectionLost(self.peer, "disconnecting", "it is closed"))
        self._receiver.join(DISCONNECT_SECONDS)

    def _send(self, queue: Queue, waiter: _Waiter | None, deadline: Deadline) -> None:
        if not self._sending.acquire(timeout=deadline.left()):
            raise deadline.over()
        try:
            with self._lock:
                if self._failure is not None:
                    if waiter is not None:
                        waiter.failure = self._failure
                        waiter.answered.set()
                    return
                handle = self._free[-1] if waiter is not None else -1
                queue(self._client, handle)
                if waiter is not None:
                    self._waiters[self._free.pop()] = waiter
                pieces = in_memory(self._client.data_to_send())
            self._push(pieces, deadline)
            with self._lock:
                if self._failure is None:
                    self._note(self._client.sent(sum(map(len, pieces))))
        finally:
            self._sending.release()

    def _push(self, pieces: Sequence[memoryview | bytes], deadline: Deadline) -> None:
        rest = [memoryview(piece) for piece in pieces if len(piece)]
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while rest:
            try:
                count = self._socket.sendmsg(rest[:SENT_PIECES_MAX])
            except BlockingIOError:
                if not poll.poll(deadline.left() * 1000):
                    raise deadline.over() from None
                continue
            except OSError as error:
                raise ConnectionLost(self.peer, deadline.doing, cause_of(error)) from None
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]

    def _receive(self) -> None:
        """The receiver's thread."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            while self._failure is None:
                with self._lock:
                    targets = self._client.receive_target()
                poll.poll()  # `fail` shuts the connection down, which ends this too
                try:
                    count = self._socket.recvmsg_into(targets)[0]
                except BlockingIOError:
                    continue
                with self._lock:
                    if not count:
                        self._client.end_of_stream()
                        break
                    self._note(self._client.received(count))
        except OSError as error:
            self.fail(ConnectionLost(self.peer, "receiving", cause_of(error)))
        except NbdshardError as error:
            self.fail(error)
        except Exception as error:  # unnoticed, everybody would wait until their time is over
            self.fail(BugError(f"{type(error).__name__}: {error}"))
        finally:
            self.fail(ConnectionLost(self.peer, "idle", "the server closed the connection"))
            with self._sending:  # nobody uses the descriptor's number any more
                self._socket.close()

    def _note(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Done) and (waiter := self._waiters.pop(event.handle, None)) is not None:
                self._free.append(event.handle)
                waiter.done = event
                waiter.answered.set()
