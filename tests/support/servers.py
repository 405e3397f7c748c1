"""Real NBD servers in tests: each a context manager that yields once the server accepts, and stops and reaps it after.

Nobody connects in order to find out whether a server is ready: a server that counts its clients (`qemu-nbd -e 2`,
nbdkit's exitlast filter) would be disturbed. The kernel's tables say who listens.

nbdkit 1.32.5 aborts when a client vanishes while several of its replies are under way; tests that kill a client
start it with `threads=1`.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support import processes
from support.waiting import WAIT_SECONDS, wait_for

START_SECONDS = WAIT_SECONDS
STOP_SECONDS = WAIT_SECONDS
LEAVE_SECONDS = 0.5
PORT_TRIES = 5
LOG_TAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its URI, its process (the leader of a group of its own) and where its standard error goes."""

    uri: str
    pid: int
    log: Path
    folder: Path
    process: subprocess.Popen[bytes] | None = None  # None: a daemon, which is not ours to reap

    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill it (and its children) now and reap it, as a crash would."""
        processes.kill_group(self.pid)
        if self.process is not None:
            self.process.wait(STOP_SECONDS)
        wait_for(f"process {self.pid} to end", lambda: not processes.alive(self.pid), STOP_SECONDS)

    def stop(self) -> None:
        """Let it remove its temporary files (nbdkit's eval keeps its scripts in one), then kill what is left."""
        if self.process is not None:
            processes.kill_group(self.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is stopped, or waits for a client
                self.process.wait(LEAVE_SECONDS)
        self.kill()

    def suspend(self) -> None:
        """Stop it without closing anything: a server that no longer answers."""
        processes.kill_group(self.pid, signal.SIGSTOP)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder with a short path (a unix socket's path has at most 107 bytes), removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="nbdt-", dir="/tmp"))
    try:
        folder.chmod(0o755)  # servers and clients of other users connect too
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago; starting a server on it may still fail."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], uri: str, accepts: Callable[[int], bool], folder: Path) -> Iterator[Server]:
    """Run `command` in its own process group until the block ends; yields when `accepts(pid)` holds."""
    log = folder / f"log-{secrets.token_hex(4)}"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True, cwd="/"
        )
    server = Server(uri, process.pid, log, folder, process)
    try:
        wait_for(
            f"`{' '.join(command)}` to accept connections",
            lambda: process.poll() is not None or accepts(process.pid),
            START_SECONDS,
        )
        if process.poll() is not None:
            raise ChildProcessError(f"`{' '.join(command)}` ended with {process.returncode}: {server.stderr().strip()}")
        yield server
    except BaseException:
        tail = server.stderr().splitlines()[-LOG_TAIL_LINES:]
        print(f"--- {' '.join(command)}", *tail, sep="\n")
        raise
    finally:
        server.stop()


@contextlib.contextmanager
def _at_unix(command: Callable[[Path], Sequence[str]], uri: Callable[[Path], str]) -> Iterator[Server]:
    with private_folder() as folder:
        path = folder / "s"
        with running(command(path), uri(path), lambda _: processes.listens_on_unix(path), folder) as server:
            path.chmod(0o777)
            yield server


@contextlib.contextmanager
def _at_tcp(command: Callable[[int], Sequence[str]], uri: Callable[[int], str]) -> Iterator[Server]:
    """Another process may take the port first: then the server ends, and another port is tried."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        for attempt in range(PORT_TRIES):
            port = free_port()

            def accepts(pid: int, port: int = port) -> bool:
                return port in processes.listening_tcp_ports(pid)

            try:
                server = stack.enter_context(running(command(port), uri(port), accepts, folder))
                break
            except ChildProcessError as error:
                if attempt + 1 == PORT_TRIES or "in use" not in str(error):
                    raise
        yield server


@contextlib.contextmanager
def at_socket(path: Path, *command: str) -> Iterator[Server]:
    """A server that `command` starts on the unix socket `path`, which another one before it may have left behind."""
    path.unlink(missing_ok=True)
    uri = _unix_uri("")(path)
    with private_folder() as folder, running(command, uri, lambda _: processes.listens_on_unix(path), folder) as server:
        yield server


def _unix_uri(export: str) -> Callable[[Path], str]:
    return lambda path: f"nbd+unix:///{export}?socket={path}"


def _tcp_uri(export: str) -> Callable[[int], str]:
    return lambda port: f"nbd://127.0.0.1:{port}/{export}"


def nbdkit(
    plugin: str,
    *args: str,
    filters: Sequence[str] = (),
    flags: Sequence[str] = (),
    tcp: bool = False,
    threads: int | None = None,
    export: str = "",
    **params: object,
) -> contextlib.AbstractContextManager[Server]:
    """nbdkit with `plugin`; `args` and `params` go to it and to `filters` (`"error-rate=1%"`, size="1M").

    `flags` are nbdkit's own (`-r`, `--no-sr`, `-o`). `export` only names the export in the URI.
    """

    def command(listen: Sequence[str]) -> list[str]:
        own = ["nbdkit", "-f", "--exit-with-parent", *listen, *flags]
        own += [f"--filter={name}" for name in filters]
        if threads is not None:
            own.append(f"--threads={threads}")
        return [*own, plugin, *args, *(f"{key}={value}" for key, value in params.items())]

    if tcp:
        return _at_tcp(lambda port: command(["-i", "127.0.0.1", "-p", str(port)]), _tcp_uri(export))
    return _at_unix(lambda path: command(["-U", str(path)]), _unix_uri(export))


def qemu_nbd(
    image: Path,
    *flags: str,
    clients: int = 0,
    image_format: str = "raw",
    tcp: bool = False,
    export: str = "",
) -> contextlib.AbstractContextManager[Server]:
    """`qemu-nbd -t` on `image`; `clients` is its `-e` (0: any number), from 2 on it advertises multi-conn."""

    def command(listen: Sequence[str]) -> list[str]:
        own = ["qemu-nbd", "-t", "-f", image_format, "-e", str(clients), "-x", export, *listen, *flags]
        return [*own, str(image)]

    if tcp:
        return _at_tcp(lambda port: command(["-b", "127.0.0.1", "-p", str(port)]), _tcp_uri(export))
    return _at_unix(lambda path: command(["-k", str(path)]), _unix_uri(export))


@contextlib.contextmanager
def nbd_server(image: Path, *settings: str, tcp: bool = False, export: str = "disk") -> Iterator[Server]:
    """nbd-server on `image`; `settings` are lines of the export's section (`flush = true`).

    It serves several clients only as a daemon (with -d it forks for none), so it is found by its pid file, and
    adopted, or it would stay a zombie where the first process reaps nobody.
    """
    with private_folder() as folder:
        path, pid_file, config = folder / "s", folder / "pid", folder / "config"
        port = free_port()
        listen = [f"port = {port}"] if tcp else [f"unixsock = {path}"]
        lines = ["[generic]", "allowlist = true", "listenaddr = 127.0.0.1", *listen]
        config.write_text("\n".join([*lines, f"[{export}]", f"exportname = {image}", *settings]) + "\n")
        command = ["nbd-server", "-C", str(config), "-p", str(pid_file)]
        with processes.adopting_orphans():
            started = subprocess.run(command, capture_output=True, timeout=START_SECONDS, check=False)
        assert started.returncode == 0, started.stderr.decode(errors="replace")
        pid = wait_for("nbd-server's pid file", lambda: pid_file.exists() and int(pid_file.read_text() or "0"))
        log = folder / "log"
        log.write_bytes(started.stderr)
        server = Server(_tcp_uri(export)(port) if tcp else _unix_uri(export)(path), pid, log, folder)
        try:
            wait_for(
                "nbd-server to accept connections",
                lambda: port in processes.listening_tcp_ports(pid) if tcp else processes.listens_on_unix(path),
            )
            yield server
        finally:
            server.kill()
            processes.reap(pid)
