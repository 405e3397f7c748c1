"""The table as data: what is copied from where to where, how large, and what must be reached. Pure.

A size is that of a full run; `--quick` divides it (`Row.quick_size`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from nbdshard.common.limits import CHECKPOINT_SECONDS, GIB, KIB, MIB

QUICK_DIVISOR: Final = 8
FRAGMENT_BYTES: Final = 64 * KIB


class Content(Enum):
    """What an end holds before the row begins. The plugins that make up what they hold are EMPTY here."""

    EMPTY = "nothing"
    RANDOM = "random data, without a zero block"
    FRAGMENTS = "64 KiB of random data and 64 KiB of hole in turn"


@dataclass(frozen=True, slots=True)
class Nbdkit:
    """`nbdkit PLUGIN size=SIZE PARAMS`. FRAGMENTS are served from a file (plugin "file"), RANDOM is written to it."""

    plugin: str
    params: tuple[str, ...] = ()
    content: Content = Content.EMPTY
    tcp: bool = False

    @property
    def keeps_data(self) -> bool:
        """Whether what was written to it can be read back."""
        return self.plugin != "null"


@dataclass(frozen=True, slots=True)
class QemuNbd:
    """`qemu-nbd` on a raw file in shared memory, any number of clients."""

    content: Content = Content.EMPTY
    keeps_data = True


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A raw file in shared memory, opened by the tool itself. As a destination it is emptied before each run."""

    content: Content = Content.EMPTY
    keeps_data = True


End: TypeAlias = Nbdkit | QemuNbd | LocalFile


@dataclass(frozen=True, slots=True)
class Figure:
    """What a row must reach; None: it is only reported.

    `speed_min` and `cpu_share_max` are against nbdcopy's medians; where they are given, it must not be slower than
    qemu-img either. `*_seconds_max` are for nbdshard alone.
    """

    speed_min: float | None = None
    cpu_share_max: float | None = None
    wall_seconds_max: float | None = None
    cpu_seconds_max: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `detects_zeroes`: every tool by its defaults; otherwise every tool with `-S 0`.

    `weight`: about how many seconds it takes in a full run; a run that has less time shares it out by these.
    `data_share`: how much of the source is data.
    """

    name: str
    title: str
    source: End
    destination: End
    size: int
    figure: Figure
    weight: float
    detects_zeroes: bool = False
    data_share: float = 1.0
    variants: tuple[tuple[str, ...], ...] = ()  # further command lines of nbdshard, by their options
    is_compared_whole: bool = False  # every byte is read: asked for so many extents, nbdkit memory takes minutes
    rounds_factor: int = 1

    def size_of(self, *, quick: bool) -> int:
        """Bytes; a copy that is short already is not made shorter."""
        return self.size // QUICK_DIVISOR if quick and self.size > MIB else self.size

    def memory_bytes(self, size: int) -> int:
        """How much memory both ends take when they hold what they are to hold, and the tools."""
        return int(size * self.data_share) * (_holds(self.source) + _holds(self.destination)) + 512 * MIB


def _holds(end: End) -> bool:
    """Whether its data is in memory, and not made up or forgotten."""
    return not isinstance(end, Nbdkit) or end.plugin in ("memory", "file")


PATTERN: Final = Nbdkit("pattern")
NULL: Final = Nbdkit("null")
MEMORY: Final = Nbdkit("memory")
RANDOM_MEMORY: Final = Nbdkit("memory", content=Content.RANDOM)

FIRST: Final = Row(
    "first",
    "nbdkit pattern to nbdkit null, unix sockets, `-S 0`",
    PATTERN,
    NULL,
    8 * GIB,
    Figure(speed_min=1.5, cpu_share_max=0.45),
    weight=86,
    variants=(("--ring", "epoll"), ("--data-path=buffer",)),
)

ROWS: Final[Sequence[Row]] = (
    FIRST,
    Row(
        "first-zeroes",
        "nbdkit pattern to nbdkit null, unix sockets, zero detection on",
        PATTERN,
        NULL,
        8 * GIB,
        Figure(speed_min=1.2, cpu_share_max=0.75),
        weight=70,
        detects_zeroes=True,
    ),
    Row(
        "first-tcp",
        "nbdkit pattern to nbdkit null, TCP loopback, `-S 0`",
        Nbdkit("pattern", tcp=True),
        Nbdkit("null", tcp=True),
        8 * GIB,
        Figure(speed_min=1.2, cpu_share_max=0.8),
        weight=80,
    ),
    Row(
        "memory",
        "nbdkit memory to nbdkit memory, random data, unix sockets, `-S 0`",
        RANDOM_MEMORY,
        MEMORY,
        4 * GIB,
        Figure(speed_min=1.3, cpu_share_max=0.5),
        weight=68,
    ),
    Row(
        "memory-zeroes",
        "nbdkit memory to nbdkit memory, random data, unix sockets, zero detection on",
        RANDOM_MEMORY,
        MEMORY,
        4 * GIB,
        Figure(speed_min=1.15, cpu_share_max=0.8),
        weight=60,
        detects_zeroes=True,
    ),
    Row(
        "qemu-nbd",
        "qemu-nbd to qemu-nbd, raw files in shared memory, random data, `-S 0`",
        QemuNbd(Content.RANDOM),
        QemuNbd(),
        4 * GIB,
        Figure(speed_min=1.2, cpu_share_max=0.6),
        weight=74,
    ),
    Row(
        "from-file",
        "local file in shared memory to nbdkit memory, random data, `-S 0`",
        LocalFile(Content.RANDOM),
        MEMORY,
        4 * GIB,
        Figure(speed_min=1.2, cpu_share_max=0.7),
        weight=46,
    ),
    Row(
        "to-file",
        "nbdkit pattern to local file in shared memory, `-S 0`",
        PATTERN,
        LocalFile(),
        4 * GIB,
        Figure(speed_min=1.2, cpu_share_max=0.7),
        weight=62,
    ),
    Row(
        "from-file-zeroes",
        "local file in shared memory to nbdkit memory, random data, zero detection on",
        LocalFile(Content.RANDOM),
        MEMORY,
        2 * GIB,
        Figure(speed_min=1.2, cpu_share_max=0.7),
        weight=24,
        detects_zeroes=True,
    ),
    Row(
        "to-file-zeroes",
        "nbdkit pattern to local file in shared memory, zero detection on",
        PATTERN,
        LocalFile(),
        2 * GIB,
        Figure(speed_min=1.2, cpu_share_max=0.7),
        weight=30,
        detects_zeroes=True,
    ),
    Row(
        "sparse",
        "nbdkit sparse-random, 1 % data, to nbdkit memory",
        Nbdkit("sparse-random", ("percent=1", "seed=1")),
        MEMORY,
        100 * GIB,
        Figure(speed_min=1.0),
        weight=26,
        data_share=0.01,
        detects_zeroes=True,
    ),
    Row(
        "fragments",
        "64 KiB of data and of hole in turn, nbdkit file to nbdkit memory",
        Nbdkit("file", content=Content.FRAGMENTS),
        MEMORY,
        8 * GIB,
        Figure(speed_min=1.0),
        weight=106,
        data_share=0.5,
        detects_zeroes=True,
        is_compared_whole=True,
    ),
    Row(
        "start",
        "nbdkit pattern to nbdkit memory, interpreter start included",
        PATTERN,
        MEMORY,
        MIB,
        Figure(wall_seconds_max=0.35, cpu_seconds_max=0.25),
        weight=3,
        detects_zeroes=True,
        rounds_factor=3,
    ),
)

# The row that scaling is measured on, and the choices that are gone through.
SCALED: Final = FIRST
SCALED_BYTES: Final = 4 * GIB
SCALING_WORKERS: Final = (1, 2, 4)
SCALING_CONNECTIONS: Final = (1, 2, 4, 8)
REQUEST_SIZES: Final = (64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB)
SCALING_ROUNDS: Final = 2
SCALING_ROUNDS_QUICK: Final = 1

# The control plane: coordinators with mock workers, and the scheduler alone.
TRANSPORTS: Final = ("ipc", "tcp")
LEASE_WORKERS: Final = (10, 100)
LEASES: Final = 20_000
LEASES_PER_SECOND_MIN: Final = 1000
SCHEDULER_WORKERS: Final = 1000
SCHEDULER_RANGES: Final = (10_000, 100_000, 1_000_000)
FLAT_FACTOR_MAX: Final = 1.25  # the dearest against the cheapest; the tests hold the number of lines run to be flat

# Checkpoints: how much longer a copy to a disk takes when it is flushed, and its journal written, ever so often. At the
# default interval few would fall into a copy that a benchmark has the time for, so they come more often.
CHECKPOINTED_BYTES: Final = GIB
CHECKPOINT_SECONDS_OFTEN: Final = CHECKPOINT_SECONDS / 10
CHECKPOINT_ROUNDS: Final = 3
CHECKPOINT_SECONDS_NEVER: Final = 86_400.0
CHECKPOINT_COST_MAX: Final = 0.03  # of the throughput, at the default interval

# The server beside nbdkit's file plugin: each kind of work, and how many times as fast its servers must be.
NBDKIT: Final = "nbdkit file"
SERVER_RAW: Final = "raw file:"
SERVER_SHARDED: Final = "sharded file:"
SERVER_PROCESSES: Final = "raw file:, 2 processes"
SERVED_BYTES: Final = 4 * GIB
RANDOM_JOBS: Final = 4
RANDOM_DEPTH: Final = 64
RANDOM_PROCESSES: Final = 2
RANDOM_READ_BYTES: Final = 64 * MIB  # by each job


@dataclass(frozen=True, slots=True)
class Work:
    """What a client does, and by server how many times as fast as nbdkit it must be."""

    name: str
    title: str
    servers: Mapping[str, float]


SERVED_WORKS: Final = (
    Work("read", "nbdcopy to null:", {SERVER_RAW: 1.0, SERVER_SHARDED: 0.7}),
    Work("write", "nbdcopy of random data, `-S 0`", {SERVER_RAW: 1.0, SERVER_SHARDED: 0.7}),
    Work("random", "fio: 4 KiB read at random, 4 connections of depth 64", {SERVER_PROCESSES: 0.3}),
)

# Parts that are no rows, with their weights.
PARTS: Final = {
    "serving": 64.0,
    "scaling": 18.0,
    "requests": 18.0,
    "checkpoints": 8.0,
    "leases": 7.0,
    "scheduler": 32.0,
}
