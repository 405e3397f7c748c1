"""A listener in threads of the test process: each connection it accepts is served by a function, then closed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from support.servers import private_folder
from support.waiting import WAIT_SECONDS

Serve = Callable[[socket.socket], None]


@dataclass(slots=True)
class Listening:
    """What a listener has seen so far. `errors` are faults of the double itself, not of the client."""

    uri: str
    accepted: int = 0
    errors: list[BaseException] = field(default_factory=list)


@contextlib.contextmanager
def listening(serve: Serve, *, tcp: bool = False, export: str = "") -> Iterator[Listening]:
    """Accept connections and run `serve(socket)` on each, in a thread of its own, until the block ends.

    A connection that breaks ends its thread quietly; any other exception fails the test.
    """
    with contextlib.ExitStack() as stack:
        if tcp:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            uri = f"nbd://127.0.0.1:{server.getsockname()[1]}/{export}"
        else:
            path = stack.enter_context(private_folder()) / "s"
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(str(path))
            path.chmod(0o777)
            server.listen(64)
            uri = f"nbd+unix:///{export}?socket={path}"
        state = Listening(uri)
        accepting = _Accepting(server, serve, state)
        accepting.start()
        try:
            yield state
        finally:
            accepting.stop()
        assert not state.errors, state.errors


class _Accepting:
    """The accepting thread and those of its connections."""

    def __init__(self, server: socket.socket, serve: Serve, state: Listening) -> None:
        self._server = server
        self._serve = serve
        self._state = state
        self._open: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Shut everything down, which wakes every thread from its call, and wait for the threads."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_SECONDS)
        with self._lock:
            for connection in self._open.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            threads = list(self._open)
        for thread in threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "a connection's thread did not end"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            if connection.family == socket.AF_INET:  # as servers do: or a last short piece waits for an acknowledgement
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
            with self._lock:
                self._state.accepted += 1
                self._open[thread] = connection
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except (ConnectionError, EOFError, BrokenPipeError):
            pass
        except BaseException as error:  # whatever it is, the test is told
            self._state.errors.append(error)
        finally:
            with self._lock:
                self._open.pop(threading.current_thread(), None)
            connection.close()


def receive_exactly(connection: socket.socket, length: int) -> bytes:
    """`length` bytes. Raises EOFError when the peer closes before."""
    parts = []
    while length:
        part = connection.recv(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def wait_until_closed(connection: socket.socket) -> None:
    """Answer nothing; take what the peer sends until it closes."""
    with contextlib.suppress(OSError):
        while connection.recv(1 << 16):
            pass
