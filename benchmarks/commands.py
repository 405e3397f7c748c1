"""The command lines that are compared: each tool by its defaults, with only what makes them do the same. Pure.

nbdshard flushes and qemu-img does; nbdcopy is told to. Without zero detection every tool is given `-S 0`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.results import NBDCOPY, NBDSHARD, QEMU_IMG

TOOLS: Final = (NBDSHARD, NBDCOPY, QEMU_IMG)
EXECUTABLE: Final = str(Path(sys.executable).with_name("nbdshard"))
RAW: Final = ("-f", "raw", "-O", "raw")


def copy_command(
    tool: str, source: str, destination: str, *, detects_zeroes: bool, more: Sequence[str] = ()
) -> list[str]:
    """How `tool` copies; `more`: further options. The destination exists and is large enough."""
    sparse = [] if detects_zeroes else ["-S", "0"]
    match tool:
        case "nbdshard":
            own = [EXECUTABLE, "copy"]
        case "nbdcopy":
            own = ["nbdcopy", "--flush"]
        case "qemu-img":
            own = ["qemu-img", "convert", "-n", "-W", "-m", "16", *RAW]
        case _:
            raise ValueError(f"{tool} is none of {', '.join(TOOLS)}")
    return [*own, *sparse, *more, source, destination]


def shown(tool: str, *, detects_zeroes: bool) -> str:
    """The command line as a page shows it."""
    command = copy_command(tool, "SOURCE", "DESTINATION", detects_zeroes=detects_zeroes)
    return " ".join([Path(command[0]).name, *command[1:]])


def scaled_options(workers: int, connections: int, request_size: int) -> list[str]:
    """nbdshard's options for one point of the scaling tables."""
    return ["-T", str(workers), "-C", str(connections), "--request-size", str(request_size)]


def compare_command(source: str, destination: str) -> list[str]:
    """Ends with 0 when both hold the same."""
    return ["qemu-img", "compare", "-f", "raw", "-F", "raw", source, destination]


def map_command(address: str) -> list[str]:
    """Tells how much of `address` is data; `data_bytes` reads it."""
    return [EXECUTABLE, "map", "--totals", "--json", address]
