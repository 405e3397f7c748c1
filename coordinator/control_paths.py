"""Where running jobs listen for `nbdshard ctl`: a unix socket for each, named by the job's uuid and the running kernel.

It is in the folder of the journals: $XDG_RUNTIME_DIR goes away when its user logs out, and a job may outlive that
(nohup, tmux). Only where that folder cannot be had it is in $XDG_RUNTIME_DIR. Homes are shared by machines, and
a socket can be connected to under the kernel only that made it: so sockets of other kernels are not looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.limits import UNIX_PATH_BYTES_MAX
from nbdshard.common.machine import machine_id
from nbdshard.coordinator.journal_paths import state_directory

_NAME: Final = re.compile(r"nbdshard-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([0-9a-f]{0,8})\.ctl")


def socket_name(uuid: str) -> str:
    """The file name of the socket of the job `uuid`, under this kernel."""
    return f"nbdshard-{uuid}.{_kernel()}.ctl"


def _kernel() -> str:
    return re.sub("[^0-9a-f]", "", machine_id())[:8]


def is_private(folder: str, *, looks: bool = False) -> bool:
    """Whether `folder` is ours, and nobody else can put anything into it. Where root only `looks`, it is another's."""
    try:
        facts = os.stat(folder)
    except OSError:
        return False
    is_ours = facts.st_uid == os.geteuid() or (looks and os.geteuid() == 0)
    return stat.S_ISDIR(facts.st_mode) and is_ours and not facts.st_mode & 0o022


def places(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The folders where sockets may be, best first; they need not exist."""
    found: list[str] = []
    with contextlib.suppress(UserError):  # no home directory
        found.append(state_directory(environment))
    found.append(environment.get("XDG_RUNTIME_DIR", ""))
    return [folder for folder in found if folder.startswith("/")]


def usable_places(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Those of `places` that are private. The folder of the journals is made, as by a journal."""
    with contextlib.suppress(UserError, OSError):
        os.makedirs(state_directory(environment), 0o700, exist_ok=True)
    return [folder for folder in places(environment) if is_private(folder)]


def sockets(environment: Mapping[str, str] = os.environ, beside: Sequence[str] = ()) -> dict[str, str]:
    """The sockets there are, by uuid, in order, also in the folders `beside`. A job that was killed leaves its own."""
    found: dict[str, str] = {}
    for folder in (*places(environment), *beside):
        if not is_private(folder, looks=True):
            continue
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(folder)):
                if (match := _NAME.fullmatch(name)) and match[2] == _kernel():
                    found.setdefault(match[1], os.path.join(folder, name))
    return found


def remove_stale(uuid: str, folder: str) -> None:
    """Remove sockets of the job `uuid` that earlier kernels left in `folder`. Never raises.

    To be called by whoever holds its journal: there is no other run of it.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if (match := _NAME.fullmatch(name)) and match[1] == uuid and match[2] != _kernel():
                os.unlink(os.path.join(folder, name))


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
