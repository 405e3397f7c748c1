"""What a run of the benchmarks found, as plain records that go to JSON and come back. Pure.

Times are in seconds, sizes in bytes. Medians, ratios and what was asked for are worked out when the page is written:
here is only what was seen.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import msgspec

NBDSHARD = "nbdshard"
NBDCOPY = "nbdcopy"
QEMU_IMG = "qemu-img"

# What `Row.proofs` tells of: the destination as the timed rounds left it, and an empty one after one copy by nbdshard.
AFTER_ROUNDS = "rounds"
AFTER_ONE = "one"
IDENTICAL = "identical"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the results."""


class Sample(Record, frozen=True):
    """One command from its start to its exit. `cpu`: user and system time of all its processes.

    `servers`: what the servers at its ends took meanwhile, in ticks of the kernel's clock.
    """

    wall: float
    cpu: float
    servers: float = 0.0


class Series(Record, frozen=True):
    """The samples of one command line, in the order they were taken. `failed`: why there are none, or no more."""

    name: str  # the tool, with the options that tell it from others of the row
    samples: list[Sample]
    failed: str = ""

    @property
    def wall(self) -> float:
        """Median seconds; only of a series with samples."""
        return median(sample.wall for sample in self.samples)

    @property
    def cpu(self) -> float:
        """Median seconds of CPU; only of a series with samples."""
        return median(sample.cpu for sample in self.samples)

    @property
    def servers(self) -> float:
        """Median seconds of the servers' CPU; only of a series with samples."""
        return median(sample.servers for sample in self.samples)


class Memory(Record, frozen=True):
    """The most memory that was resident in each process of one run of `name`."""

    name: str
    main: int  # of the process that was started: nbdshard's coordinator, or the whole tool
    workers: list[int]


class Row(Record, frozen=True):
    """One row of the table. `skipped`: why it was not run."""

    name: str
    size: int
    series: list[Series] = []
    memory: list[Memory] = []
    data_bytes: dict[str, int] = {}  # by tool: what an empty destination held as data after one copy
    proofs: dict[str, str] = {}  # what `qemu-img compare` said, and when; none where the destination keeps nothing
    notes: list[str] = []
    skipped: str = ""

    def of(self, name: str) -> Series | None:
        """The series called `name`, if it has samples."""
        return next((series for series in self.series if series.name == name and series.samples), None)


class Point(Record, frozen=True):
    """nbdshard with one choice of workers, connections and request size."""

    workers: int
    connections: int
    request_size: int
    series: Series


class CheckpointCost(Record, frozen=True):
    """The same copy to a file on a disk, with checkpoints every `seconds` and without any before its end."""

    size: int
    seconds: float
    often: Series
    never: Series

    @property
    def share(self) -> float | None:
        """How much longer it took with them, of its time without, by the medians; None if one has no samples."""
        if not self.often.samples or not self.never.samples:
            return None
        return self.often.wall / self.never.wall - 1


class ServedWork(Record, frozen=True):
    """What a client of several servers took in turns; the first series is the peer's."""

    name: str
    size: int
    series: list[Series]

    def speed(self, server: str) -> float | None:
        """How many times as fast as beside the peer it was, by the medians; None if one has no samples."""
        peer, own = self.series[0], next(each for each in self.series if each.name == server)
        return peer.wall / own.wall if peer.samples and own.samples else None


class LeaseRate(Record, frozen=True):
    """One coordinator with mock workers, between its first and its last report of a written range."""

    transport: str
    workers: int
    leases: int
    wall: float
    cpu: float  # of the coordinator, ZeroMQ's thread included

    @property
    def per_second(self) -> float:
        return self.leases / self.wall


class SchedulerCost(Record, frozen=True):
    """The scheduler alone, over a whole job."""

    workers: int
    ranges: int
    events: int  # messages from workers
    cpu: float  # inside the scheduler
    resident_peak: int

    @property
    def microseconds(self) -> float:
        """For each event."""
        return self.cpu / self.events * 1e6


class Machine(Record, frozen=True):
    """Where the run took place."""

    cpu: str
    cores: int
    memory: int
    kernel: str
    system: str  # the distribution
    versions: dict[str, str]
    commit: str
    load_before: float  # processes that were running in the minute before
    date: str


class Results(Record, frozen=True):
    """A whole run. `steal`: the share of the machine's CPU that its host gave to others meanwhile."""

    machine: Machine
    quick: bool
    rounds: int  # wanted
    seconds: float
    steal: float
    rows: list[Row] = []
    scaling: list[Point] = []
    requests: list[Point] = []
    checkpoints: list[CheckpointCost] = []
    serving: list[ServedWork] = []
    leases: list[LeaseRate] = []
    scheduler: list[SchedulerCost] = []
    notes: list[str] = []


def save(results: Results, path: Path) -> None:
    """Write `results` as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def load(path: Path) -> Results:
    """What `save` wrote. Raises OSError, or msgspec.ValidationError for another version's results."""
    return msgspec.json.decode(path.read_bytes(), type=Results)
