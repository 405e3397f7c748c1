"""What checkpoints cost: the same copy to a file on a disk, flushed and journaled often, and only at its end."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.commands import copy_command
from benchmarks.results import NBDSHARD, CheckpointCost
from benchmarks.rows import CHECKPOINT_SECONDS_NEVER, CHECKPOINT_SECONDS_OFTEN
from benchmarks.series import Runner, alternate
from support.servers import nbdkit

DISK: Final = Path("/var/tmp")  # kept through a restart (FHS): not in memory, where a flush would cost nothing


def measure_checkpoints(size: int, rounds: int, deadline: float) -> CheckpointCost:
    """Copy `size` bytes of nbdkit's pattern to its file plugin, in alternation."""
    with tempfile.TemporaryDirectory(prefix="nbdshard-bench-", dir=DISK) as folder:
        file, journal = Path(folder) / "file", Path(folder) / "journal"
        _reset(file, size)
        with nbdkit("pattern", size=size) as source, nbdkit("file", str(file)) as destination:
            runners = []
            for seconds in (CHECKPOINT_SECONDS_OFTEN, CHECKPOINT_SECONDS_NEVER):
                options = ["--checkpoint", f"{seconds:g}", "--journal", str(journal)]
                words = copy_command(NBDSHARD, source.uri, destination.uri, detects_zeroes=False, more=options)
                runners.append(Runner(" ".join((NBDSHARD, *options[:2])), words))
            often, never = alternate(runners, rounds, deadline, lambda: _reset(file, size))
    return CheckpointCost(size, CHECKPOINT_SECONDS_OFTEN, often, never)


def _reset(file: Path, size: int) -> None:
    """An empty file, and a disk that has nothing left to write back."""
    with file.open("wb") as stream:
        stream.truncate(size)
    os.sync()
