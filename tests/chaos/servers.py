"""A server at an address that stays the same, however often it is killed and started again."""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from support import processes
from support.servers import Server, running

RATE = "96M"  # bits a second: there is a middle to every copy
THREADS = "--threads=1"  # nbdkit 1.32.5 aborts when a client vanishes with several replies under way

# Below those that the kernel gives to whoever connects (ip_local_port_range): one that tries to reach a server which is
# gone could be given its port, and even be connected with itself.
PORTS = range(20_000, 30_000)


def lasting_port() -> int:
    """A TCP port of 127.0.0.1 that is free, and will be again when its server is gone."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Place:
    """`image` behind a server of `kind` at one address. `is_slow`: it is what the copy's pace is given by."""

    def __init__(self, kind: str, image: Path, folder: Path, transport: str, *, is_slow: bool) -> None:
        self._folder = folder
        self._path = folder / f"{image.name}.sock"
        self._port = lasting_port() if transport == "tcp" else 0
        self._command = self._words(kind, str(image), is_slow=is_slow)
        self._stack = ExitStack()
        self._server: Server | None = None
        self.deaths = 0  # that nobody asked for

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self._port}/" if self._port else f"nbd+unix:///?socket={self._path}"

    @property
    def pid(self) -> int:
        assert self._server is not None, "the server does not run"
        return self._server.pid

    @property
    def runs(self) -> bool:
        return self._server is not None

    def start(self) -> None:
        """Start it, if it does not run. Returns when it listens."""
        if self._server is not None:
            return
        self._path.unlink(missing_ok=True)
        self._server = self._stack.enter_context(running(self._command, self.uri, self._accepts(), self._folder))

    def kill(self) -> None:
        """SIGKILL, also if it is stopped."""
        if self._server is not None:
            self._server.kill()
            self._server = None
            self._stack.close()

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def died(self) -> str:
        """What it said last, if it ended by itself; then it is not running any more."""
        server = self._server
        if server is None or processes.alive(server.pid):
            return ""
        self.deaths += 1
        lines = server.stderr().strip().splitlines() or ["it said nothing"]
        self.kill()
        return lines[-1]

    def _signal(self, number: signal.Signals) -> None:
        if self._server is not None:
            processes.kill_group(self._server.pid, number)

    def _accepts(self) -> Callable[[int], bool]:
        if self._port:
            return lambda pid: self._port in processes.listening_tcp_ports(pid)
        return lambda _: processes.listens_on_unix(self._path)

    def _words(self, kind: str, image: str, *, is_slow: bool) -> list[str]:
        if kind == "qemu-nbd":
            where = ["-b", "127.0.0.1", "-p", str(self._port)] if self._port else ["-k", str(self._path)]
            return ["qemu-nbd", "-t", "-f", "raw", "-e", "64", *where, image]
        where = ["-i", "127.0.0.1", "-p", str(self._port)] if self._port else ["-U", str(self._path)]
        filters, more = [], []
        if is_slow:
            filters, more = ["--filter=rate"], [f"rate={RATE}", "burstiness=0.2"]
        if kind == "nbdkit-cache":
            filters.append("--filter=cache")
        elif kind == "nbdkit-one-writer":
            filters.append("--filter=multi-conn")
            more.append("multi-conn-mode=disable")
        return ["nbdkit", "-f", "--exit-with-parent", THREADS, *where, *filters, "file", image, *more]
