"""`[ CMD ARGS ... ]`: an NBD server of our own, started by systemd socket activation.

sd_listen_fds(3): the server finds its listening socket as descriptor 3, LISTEN_FDS=1 and LISTEN_PID, its own process
id, in its environment. Only the process itself knows that number before it runs, so a few words of shell come first.
They also ask the kernel to end the server with us, where setpriv(1) can.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from urllib.parse import quote

from nbdshard.common import logs
from nbdshard.common.child import close_all, spawn
from nbdshard.common.errors import UserError
from nbdshard.common.limits import COMMAND_EXIT_SECONDS, CONNECTIONS_MAX
from nbdshard.common.logins import without_logins
from nbdshard.common.messages import Side
from nbdshard.coordinator.private_directory import PrivateDirectory

# The listening socket comes as standard input and moves to descriptor 3. The shell never parses the command ("$@").
_TRAMPOLINE = """
exec 3<&0 </dev/null
export LISTEN_PID=$$
if setpriv --pdeathsig TERM true 2>/dev/null; then exec setpriv --pdeathsig TERM -- "$@"; fi
exec "$@"
"""
_SHELL = "/bin/sh"
STDERR = 2


class CommandServer:
    """One running server. `descriptor` becomes readable when it ends, `uri` is where it serves."""

    def __init__(self, argv: Sequence[str], side: Side, directory: PrivateDirectory) -> None:
        """Start it with a socket in `directory`. Raises UserError when the command does not exist."""
        self.side = side
        self.shown = without_logins(f"[ {' '.join(argv)} ]")
        _check_exists(argv[0], self.shown)
        path = directory.socket_path(f"{side}.sock")
        self.uri = f"nbd+unix:///?socket={quote(path)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(path)
            listening.listen(CONNECTIONS_MAX)
            environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbd"}
            self._child = spawn(
                [_SHELL, "-c", _TRAMPOLINE, "nbdshard", *argv],
                stdin=listening.fileno(),
                stdout=STDERR,  # ours may be the destination
                environment=environment,
                new_session=True,  # a terminal's Ctrl-C is not for it: workers still have to drain
            )
        # Our own copy of the socket is closed now: when the server ends, connects are refused instead of queued.

    @property
    def descriptor(self) -> int:
        return self._child.descriptor

    def ended(self) -> bool:
        """Whether it has ended. Never blocks."""
        return self._child.ended()

    @property
    def succeeded(self) -> bool:
        """Whether it ended with status 0, as a server does that leaves with its last client."""
        return self._child.succeeded

    def story(self) -> str:
        """The one line for its early end."""
        return f"{self.shown}: the {self.side} server {self._child.story()} before the copy was over"

    def close(self, patience_seconds: float = COMMAND_EXIT_SECONDS) -> None:
        """SIGTERM, and after `patience_seconds` SIGKILL; reaped in any case. Idempotent."""
        if self._child.descriptor >= 0 and not self._child.ended():
            logs.debug(f"stopping {self.shown}")
            self._child.send_signal(signal.SIGTERM)
        close_all([self._child], patience_seconds)


def _check_exists(command: str, shown: str) -> None:
    """A missing command is told at once, in our words instead of the shell's."""
    if "/" in command:
        candidates = [command]
    else:
        candidates = [os.path.join(folder or ".", command) for folder in os.get_exec_path()]
    if not any(os.access(path, os.X_OK) and not os.path.isdir(path) for path in candidates):
        raise UserError(f"no such command: {command}", shown)
