"""`python -m benchmarks.bare`: the first row beside a copy that has nothing but the calls (bare_copy.py), medians."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import bare_copy
from benchmarks.commands import copy_command
from benchmarks.ends import opened, scratch_folder
from benchmarks.results import NBDCOPY, NBDSHARD
from benchmarks.rows import FIRST
from benchmarks.series import Runner, alternate
from nbdshard.common.nbd.uri import parse_uri

ROUNDS: Final = 5
SECONDS: Final = 300.0


def main() -> int:
    """Measure, and print a line for each."""
    with (
        scratch_folder() as folder,
        opened(FIRST.source, FIRST.size, folder, "source") as source,
        opened(FIRST.destination, FIRST.size, folder, "destination") as destination,
    ):
        addresses = (source.address, destination.address)
        sockets = [parse_uri(address).socket or "" for address in addresses]
        runners = [Runner("bare", [sys.executable, str(Path(bare_copy.__file__)), *sockets, str(FIRST.size)])]
        for tool in (NBDSHARD, NBDCOPY):
            runners.append(Runner(tool, copy_command(tool, *addresses, detects_zeroes=False)))
        for series in alternate(runners, ROUNDS, time.monotonic() + SECONDS, destination.reset):
            if series.failed:
                print(f"{series.name}: {series.failed}")
                return 1
            wall, cpu = (median(of) for of in zip(*((each.wall, each.cpu) for each in series.samples), strict=True))
            print(f"{series.name:10} {wall:.2f} s, CPU {cpu:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
