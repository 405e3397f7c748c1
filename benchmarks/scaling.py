"""How nbdshard does with other numbers of workers and connections, and other request sizes, on the first row's ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from benchmarks.commands import copy_command, scaled_options
from benchmarks.ends import opened
from benchmarks.results import NBDSHARD, Point
from benchmarks.rows import REQUEST_SIZES, SCALED, SCALING_CONNECTIONS, SCALING_WORKERS
from benchmarks.series import Runner, alternate
from nbdshard.common.limits import CONNECTIONS_DEFAULT, REQUEST_BYTES_DEFAULT

Choice: TypeAlias = tuple[int, int, int]  # workers, connections, request size

# A worker without a connection does not take part: fewer connections than workers would be the line before.
BY_WORKERS: Final[Sequence[Choice]] = tuple(
    (workers, connections, REQUEST_BYTES_DEFAULT)
    for workers in SCALING_WORKERS
    for connections in SCALING_CONNECTIONS
    if connections >= workers
)


def by_request_size() -> list[Choice]:
    """The default number of workers (one for each core that may be used) and of connections."""
    workers = min(len(os.sched_getaffinity(0)), CONNECTIONS_DEFAULT)
    return [(workers, CONNECTIONS_DEFAULT, size) for size in REQUEST_SIZES]


def measure_choices(choices: Sequence[Choice], size: int, folder: Path, rounds: int, deadline: float) -> list[Point]:
    """Copy `size` bytes with each of `choices`, in alternation."""
    with (
        opened(SCALED.source, size, folder, "source") as source,
        opened(SCALED.destination, size, folder, "destination") as destination,
    ):
        runners = []
        for choice in choices:
            options = scaled_options(*choice)
            command = copy_command(NBDSHARD, source.address, destination.address, detects_zeroes=False, more=options)
            runners.append(Runner(" ".join((NBDSHARD, *options)), command))
        series = alternate(runners, rounds, deadline, destination.reset)
    return [Point(*choice, one) for choice, one in zip(choices, series, strict=True)]
