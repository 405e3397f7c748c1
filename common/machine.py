"""Names: which machine this is (whether a path means the same file for two processes), and what workers are called."""

from __future__ import annotations

import functools
import os

BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"
MACHINE_ID_PATH = "/etc/machine-id"
WORKER_NAME_BYTES = 16  # random: nobody takes another worker's name over by chance or by guessing


def new_worker_name() -> str:
    """A name for a worker: hexadecimal digits, which are its ZeroMQ routing id too."""
    return os.urandom(WORKER_NAME_BYTES).hex()


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
