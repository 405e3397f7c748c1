"""A directory only our user can enter, for the sockets of one job; gone when the job is.

It is among the temporary files, and in $XDG_RUNTIME_DIR only where those have no room for it: that one is removed with
all that is in it when its user logs out, and then a job that goes on (nohup, tmux) could start no worker any more.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import SOCKET_NAME_BYTES_MAX, UNIX_PATH_BYTES_MAX

PREFIX = "nbdshard-"


class PrivateDirectory:
    """A context manager: a new directory of mode 0700 in $TMPDIR, /tmp or $XDG_RUNTIME_DIR, removed at the end.

    What is put in there are sockets and plain files; it has no folders of its own.
    """

    def __init__(self, places: Sequence[str] | None = None) -> None:
        """Create it in the first of `places` that will have it. Raises UserError when none will."""
        reasons: list[str] = []
        for base in places or _places():
            path = os.path.join(base, PREFIX + os.urandom(8).hex())
            if len(os.fsencode(path)) + 1 + SOCKET_NAME_BYTES_MAX > UNIX_PATH_BYTES_MAX:
                reasons.append(f"{base}: too long a name for a unix socket's path")
                continue
            try:
                os.mkdir(path, 0o700)
            except OSError as error:
                reasons.append(f"{base}: {error.strerror}")
                continue
            self.path = path
            self._lock = _keep(path)
            return
        raise UserError(f"no place for a private directory ({'; '.join(reasons)})", advice="set TMPDIR to one")

    def socket_path(self, name: str) -> str:
        """The path of a socket called `name` in here, short enough for the kernel."""
        if len(os.fsencode(name)) > SOCKET_NAME_BYTES_MAX:
            raise ValueError(f"a socket's name has at most {SOCKET_NAME_BYTES_MAX} bytes: {name!r}")
        return os.path.join(self.path, name)

    def remove(self) -> None:
        """Remove it and what is in it. Never raises: it is called while other errors are on their way."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        try:
            with os.scandir(self.path) as entries:
                names = [entry.path for entry in entries]
            for name in names:
                os.unlink(name)
            os.rmdir(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            logs.warning(f"{self.path}: cannot be removed: {error.strerror}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _keep(path: str) -> int:
    """A descriptor with a lock, for which systemd-tmpfiles leaves alone what gets old in there (tmpfiles.d(5)).

    -1: it cannot be had, and is not worth to end for.
    """
    import fcntl

    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
        else:
            return descriptor
    return -1


def _places() -> list[str]:
    """Where to try, best first. $XDG_RUNTIME_DIR must be ours, as its specification says."""
    temporary, runtime = (os.environ.get(name, "") for name in ("TMPDIR", "XDG_RUNTIME_DIR"))
    places = [temporary] if temporary.startswith("/") else []
    places.append("/tmp")
    if runtime.startswith("/"):
        with contextlib.suppress(OSError):
            facts = os.stat(runtime)
            if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid():
                places.append(runtime)
    return places
