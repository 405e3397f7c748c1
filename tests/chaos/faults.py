"""What goes wrong in a run of chaos, and to what kind of copy: chosen by the seed and a number, never by the clock.

So `make chaos SEED=N` makes the same choices again. When each of them strikes depends on the machine, a little.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Final

from support.sides import RINGS

PAUSE_SECONDS: Final = (0.05, 0.9)  # between two faults
FAULTS_PER_COPY: Final = 10  # then it is left to come to its end: a range may be lost so often, and not more often


class Kind(Enum):
    """A fault, in words. `SERVER_KINDS` strike one side's server, the others processes of the copy."""

    KILL_SERVER = "is killed, and started again"
    STALL_SERVER = "is stopped, and goes on"
    CUT = "loses a connection"
    CUT_ALL = "loses all its connections"
    KILL_WORKER = "a worker is killed"
    STOP_WORKER = "a worker is stopped, and goes on"
    STOP_WORKER_LONG = "a worker is stopped for longer than it may be"
    STOP_COORDINATOR = "the coordinator is stopped, and goes on"
    KILL_COORDINATOR = "the coordinator is killed, and the copy resumed"


SERVER_KINDS: Final = (Kind.KILL_SERVER, Kind.STALL_SERVER, Kind.CUT, Kind.CUT_ALL)

# How often each is chosen, and for how many seconds it lasts: a request may be 2 s old here, a worker silent for 10 s.
_KINDS: Final = {
    Kind.KILL_SERVER: (24, (0.0, 1.5)),
    Kind.STALL_SERVER: (8, (0.1, 5.0)),
    Kind.CUT: (12, (0.0, 0.0)),
    Kind.CUT_ALL: (8, (0.0, 0.0)),
    Kind.KILL_WORKER: (18, (0.0, 0.0)),
    Kind.STOP_WORKER: (12, (0.1, 4.0)),
    Kind.STOP_WORKER_LONG: (4, (11.0, 13.0)),
    Kind.STOP_COORDINATOR: (4, (0.1, 2.0)),
    Kind.KILL_COORDINATOR: (10, (0.0, 0.0)),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`pause` seconds after the one before; it lasts `seconds`. `pick`: which of several (0 to 1)."""

    kind: Kind
    side: str
    pause: float
    seconds: float
    pick: float

    def __str__(self) -> str:
        whose = f"the {self.side} " if self.kind in SERVER_KINDS else ""
        return f"{whose}{self.kind.value}" + (f" after {self.seconds:.1f} s" if self.seconds else "")


@dataclass(frozen=True, slots=True)
class Shape:
    """One copy: servers of which kind, how they are reached, and with which options it is copied."""

    source: str
    destination: str
    transport: str
    ring: str
    data_path: str
    workers: int
    connections: int
    range_mib: int
    checksum: bool
    verify: bool
    elsewhere: bool  # workers that a coordinator does not start: they connect to it over TCP


# Kinds of servers, source and destination. nbdkit is the one that can be slow, so one side is always nbdkit's. Its
# cache filter keeps what is written in a file of its own until a flush: when it is killed, that is lost, as in a power
# cut.
ENDS: Final = (
    ("nbdkit", "nbdkit"),
    ("nbdkit", "nbdkit-cache"),
    ("nbdkit", "nbdkit-cache"),
    ("nbdkit", "nbdkit-one-writer"),
    ("nbdkit", "qemu-nbd"),
    ("qemu-nbd", "nbdkit"),
    ("qemu-nbd", "nbdkit-cache"),
)


def fault(seed: int, number: int) -> Fault:
    """The fault `number` of the run of `seed`: always the same."""
    chance = random.Random(f"fault {seed} {number}")
    (kind,) = chance.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])
    return Fault(
        kind,
        chance.choice(("source", "destination")),
        chance.uniform(*PAUSE_SECONDS),
        chance.uniform(*_KINDS[kind][1]),
        chance.random(),
    )


def shape(seed: int, number: int) -> Shape:
    """The copy `number` of the run of `seed`: always the same."""
    chance = random.Random(f"shape {seed} {number}")
    ends, transport, ring = chance.choice(ENDS), chance.choice(("unix", "tcp")), chance.choice(RINGS)
    data_path = chance.choice(("auto", "auto", "splice", "buffer"))
    return Shape(
        *ends,
        transport,
        ring,
        data_path,
        workers=chance.randint(2, 4),
        connections=chance.choice((1, 4, 4, 8)),
        range_mib=chance.choice((1, 2, 4, 8)),
        checksum=chance.random() < 0.4 and data_path != "splice",  # it has to look at all data
        verify=chance.random() < 0.3,
        # Where the only writer may have been killed unheard, its role would never move.
        elsewhere=chance.random() < 0.2 and ends[1] != "nbdkit-one-writer",
    )
