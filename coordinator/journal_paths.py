"""Where journals are kept when nobody says where."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

from nbdshard.common.errors import UserError

SUFFIX: Final = ".journal"
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def state_directory(environment: Mapping[str, str] = os.environ) -> str:
    """The folder of journals: $STATE_DIRECTORY of a systemd unit, else nbdshard in $XDG_STATE_HOME or ~/.local/state.

    It need not exist. What is no absolute path does not count, as the XDG specification says. Raises UserError when
    there is no home directory either.
    """
    # systemd.exec(5), StateDirectory=: several are separated by colons.
    of_unit = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    if of_unit.startswith("/"):
        return of_unit
    states = environment.get("XDG_STATE_HOME", "")
    if states.startswith("/"):
        return os.path.join(states, "nbdshard")
    home = environment.get("HOME", "") or os.path.expanduser("~")
    if home.startswith("/"):
        return os.path.join(home, ".local", "state", "nbdshard")
    raise UserError("there is no home directory to keep the journal in", advice="name a file with --journal")


def default_path(uuid: str, environment: Mapping[str, str] = os.environ) -> str:
    """The journal of the job `uuid`. Raises UserError when that is no uuid in its canonical form."""
    if _UUID.fullmatch(uuid) is None:
        raise UserError("is not the uuid of a job", uuid)
    return os.path.join(state_directory(environment), uuid + SUFFIX)


def journals(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The paths of all journals in the state directory, by name. Raises UserError when it cannot be read."""
    folder = state_directory(environment)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot be listed: {error.strerror}", folder) from None
    return [os.path.join(folder, name) for name in sorted(names) if name.endswith(SUFFIX)]
