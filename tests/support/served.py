"""`nbdshard serve` as a server of the tests: started, waited for, and ended like the others."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.ranges import Range
from support.command import EXECUTABLE, Run, started
from support.nbd_blocking import Connection
from support.servers import private_folder
from support.waiting import wait_for

NAME = "disk"
SERVED_SIZE = 16 << 20  # of what the fixture `served` exports
TOOL_SECONDS = 60.0
NBDSH = ("/usr/bin/python3", "-m", "nbd")  # what nbdsh starts; another Python may come first in PATH, without libnbd


@dataclass(frozen=True)
class Served:
    """A server that runs. `socket`: where it listens."""

    run: Run
    socket: Path

    def uri(self, name: str = NAME) -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens on 127.0.0.1, if it was told `--tcp 127.0.0.1:0`."""
        (line,) = (line for line in self.run.err().splitlines() if "nbd://127.0.0.1:" in line)
        return "127.0.0.1", int(line.rpartition(":")[2].rstrip("/"))


def still_serves(served: Served) -> None:
    """Another client comes, is served, and goes."""
    connection = Connection(served.socket, Wishes(NAME))
    connection.read(Range(0, 4096))
    connection.close()


def tool(*command: str | Path) -> str:
    """What a client prints on standard output; it must end well."""
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=TOOL_SECONDS)
    assert run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
    return run.stdout


@contextlib.contextmanager
def serving(conn: str, *words: str, driver: str = "raw", executable: Sequence[str] = (EXECUTABLE,)) -> Iterator[Served]:
    """One export called NAME behind a unix socket, until the block ends."""
    with private_folder() as folder:
        path = folder / "socket"
        with started("serve", "-e", NAME, driver, conn, "--unix", str(path), *words, executable=executable) as run:
            wait_for("the server to listen", lambda: "listens on" in run.err() or run.process.poll() is not None)
            assert run.process.poll() is None, run.err()
            yield Served(run, path)
