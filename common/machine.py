"""Which machine this is: whether a path means the same file for two processes."""

from __future__ import annotations

import functools
import os

BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"
MACHINE_ID_PATH = "/etc/machine-id"


@functools.cache
def machine_id() -> str:
    """A text that is the same for all processes under one running kernel, and differs between machines.

    The kernel's boot id, and not /etc/machine-id: container images and cloned disks carry copies of that one, and then
    two machines would take each other's files for their own.
    """
    for path in (BOOT_ID_PATH, MACHINE_ID_PATH):
        try:
            with open(path, encoding="ascii") as file:
                text = file.read(64).strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            return text
    return f"host {os.uname().nodename}"
