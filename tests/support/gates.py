"""A server that carries out nothing while a test says so: nbdkit's pause filter, and the socket that controls it."""

from __future__ import annotations

import socket
from pathlib import Path

from support.waiting import WAIT_SECONDS


class Gate:
    """Before an nbdkit with the filter `pause` and the parameter `option`, which listens by the time it is used.

    While it is shut, connections are made as ever, and one request of each, or as many as nbdkit has threads for it, is
    received and waits; the others stay in the sockets.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "gate"

    @property
    def option(self) -> str:
        return f"pause-control={self._path}"

    def shut(self) -> None:
        """Returns when the requests that were let in are answered, so nothing is carried out any more."""
        self._order(b"p", b"P")

    def open(self) -> None:
        self._order(b"r", b"R")

    def _order(self, order: bytes, answer: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(WAIT_SECONDS)
            control.connect(str(self._path))
            control.sendall(order)
            got = control.recv(1)
        assert got == answer, f"nbdkit's pause filter answered {got!r} to {order!r}"
