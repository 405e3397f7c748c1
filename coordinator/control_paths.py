"""Where running jobs listen for `nbdshard ctl`: a unix socket for each, named by the job's uuid.

It is in $XDG_RUNTIME_DIR, which is the user's own; where there is none, in the folder of the journals.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.limits import UNIX_PATH_BYTES_MAX
from nbdshard.coordinator.journal_paths import state_directory

_PREFIX: Final = "nbdshard-"
_SUFFIX: Final = ".ctl"
_NAME: Final = re.compile(r"nbdshard-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.ctl")


def socket_name(uuid: str) -> str:
    """The file name of the socket of the job `uuid`."""
    return f"{_PREFIX}{uuid}{_SUFFIX}"


def is_private(folder: str) -> bool:
    """Whether `folder` is ours, and nobody else can put anything into it."""
    try:
        facts = os.stat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022


def places(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The folders where sockets may be, best first; they need not exist."""
    found = [environment.get("XDG_RUNTIME_DIR", "")]
    with contextlib.suppress(UserError):  # no home directory
        found.append(state_directory(environment))
    return [folder for folder in found if folder.startswith("/")]


def usable_places(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Those of `places` that are private. Where there is none, the folder of the journals is made, as by a journal."""
    if found := [folder for folder in places(environment) if is_private(folder)]:
        return found
    with contextlib.suppress(UserError, OSError):
        folder = state_directory(environment)
        os.makedirs(folder, 0o700, exist_ok=True)
        return [folder] if is_private(folder) else []
    return []


def sockets(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The sockets there are, by uuid, in order. A job that was killed may have left one behind."""
    found: dict[str, str] = {}
    for folder in places(environment):
        if not is_private(folder):
            continue
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(folder)):
                if match := _NAME.fullmatch(name):
                    found.setdefault(match[1], os.path.join(folder, name))
    return found


@contextlib.contextmanager
def reachable(path: str) -> Iterator[str]:
    """A path for bind(2) and connect(2): `path` itself, or by way of its folder's descriptor where it is too long."""
    if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)
