"""What a block device calls itself, by whatever name and number it goes: those may change when a machine starts.

The kernel tells in sysfs, and udev makes the links of /dev/disk/by-id out of the same. Nothing is asked of the device.
"""

from __future__ import annotations

import os
from typing import Final

SYSFS: Final = "/sys/dev/block"
_CHARACTERS_MAX: Final = 512
# In the folder of a whole device, and what each is called; the best first.
_TELLING: Final = (
    ("dm/uuid", "dm uuid"),  # LVM, multipath, LUKS; empty of a mapping that was made by hand
    ("dm/name", "dm name"),
    ("wwid", "wwid"),  # NVMe
    ("device/wwid", "wwid"),  # SCSI, and so SATA and USB
    ("serial", "serial"),  # virtio
    ("loop/backing_file", "loop"),
)


def device_identity(number: int, sysfs: str = SYSFS) -> str:
    """One line for the device `number` (st_rdev) that no other device of this machine has, in this life and the next.

    "": it has nothing of the kind. A partition has that of its disk, and its number and place there.
    """
    folder = os.path.realpath(os.path.join(sysfs, f"{os.major(number)}:{os.minor(number)}"))
    part = _read(folder, "partition")
    if part:
        whole = _identity_of_disk(os.path.dirname(folder))
        return whole and f"{whole} partition {part} from {_read(folder, 'start')}"
    return _identity_of_disk(folder)


def _identity_of_disk(folder: str) -> str:
    for attribute, name in _TELLING:
        if text := _read(folder, attribute):
            place = f" from {_read(folder, 'loop/offset')}" if name == "loop" else ""
            return f"{name} {text}{place}"
    return ""


def _read(folder: str, attribute: str) -> str:
    """An attribute on one line; "" where there is none, or it cannot be read."""
    try:
        with open(os.path.join(folder, attribute), "rb") as file:
            text = file.read(_CHARACTERS_MAX)
    except OSError:
        return ""
    return " ".join(text.decode("utf-8", "backslashreplace").replace("\0", " ").split())
