"""The coordinator's state tables: ranges, workers and the job, as data.

::

    range    PENDING -> LEASED -> WRITTEN -> DURABLE        back to PENDING when what was done does not count any more
                          \\-> FAILED
    worker   JOINING -> READY -> DRAINING -> GONE           READY -> WAITING -> READY when its connections were lost
    job      OPENING -> PREPARING -> COPYING <-> FLUSHING -> VERIFYING -> STOPPING -> DONE

A step that is not in its table raises IllegalEvent and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final, Generic, TypeVar

import msgspec

from nbdshard.common import messages
from nbdshard.common.errors import IllegalEvent

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class Table(Generic[State, Event], msgspec.Struct, frozen=True):
    """The moves of one machine, and a sentence for each of its states."""

    machine: str
    sentences: Mapping[State, str]
    moves: Mapping[tuple[State, Event], State]

    def step(self, state: State, event: Event, story: object = "") -> State:
        """The state after `event`. Raises IllegalEvent, telling `story` (which range or worker), if none.

        `story` is made a text only then: that of a range costs more than its step.
        """
        after = self.moves.get((state, event))
        if after is None:
            raise IllegalEvent(self.machine, state.name, event.name, str(story))
        return after


# -- a range -----------------------------------------------------------------------------------------------------------


class RangeState(Enum):
    PENDING = auto()
    LEASED = auto()
    WRITTEN = auto()
    DURABLE = auto()
    FAILED = auto()


class RangeEvent(Enum):
    GRANT = auto()
    WRITTEN = auto()
    SETTLED = auto()
    GIVEN_BACK = auto()
    SPENT = auto()


RANGES: Final = Table(
    "range",
    {
        RangeState.PENDING: "Nobody works on it; nothing written to it counts.",
        RangeState.LEASED: "One worker copies it under the only valid lease.",
        RangeState.WRITTEN: "The destination acknowledged every byte, but no flush has covered them yet.",
        RangeState.DURABLE: "A flush on the connections that wrote it covered it, or none can be had; an older flush "
        "without an answer may still take it back.",
        RangeState.FAILED: "Its attempts are spent, or its failure is final; the job fails with it.",
    },
    {
        (RangeState.PENDING, RangeEvent.GRANT): RangeState.LEASED,
        (RangeState.LEASED, RangeEvent.WRITTEN): RangeState.WRITTEN,
        (RangeState.LEASED, RangeEvent.GIVEN_BACK): RangeState.PENDING,
        (RangeState.LEASED, RangeEvent.SPENT): RangeState.FAILED,
        (RangeState.WRITTEN, RangeEvent.SETTLED): RangeState.DURABLE,
        (RangeState.WRITTEN, RangeEvent.GIVEN_BACK): RangeState.PENDING,
        (RangeState.WRITTEN, RangeEvent.SPENT): RangeState.FAILED,
        (RangeState.DURABLE, RangeEvent.GIVEN_BACK): RangeState.PENDING,  # a flush sent before the covering one failed
        (RangeState.DURABLE, RangeEvent.SPENT): RangeState.FAILED,
    },
)


# -- a worker ----------------------------------------------------------------------------------------------------------


class WorkerState(Enum):
    JOINING = auto()
    READY = auto()
    WAITING = auto()
    DRAINING = auto()
    GONE = auto()


class WorkerEvent(Enum):
    OPENED = auto()
    LOST = auto()
    STOPPED = auto()
    LEFT = auto()


WORKERS: Final = Table(
    "worker",
    {
        WorkerState.JOINING: "It said Hello; it opens the connections it was given, or stands by without any.",
        WorkerState.READY: "It has a connection to either side and may hold leases.",
        WorkerState.WAITING: "It lost its connections, or got none while nobody had any; it is given new ones later.",
        WorkerState.DRAINING: "It was told to stop, or is being killed; it gets nothing new.",
        WorkerState.GONE: "It is not waited for any more: it left, it is dead, or it is listed as unfenced.",
    },
    {
        (WorkerState.JOINING, WorkerEvent.OPENED): WorkerState.READY,
        (WorkerState.READY, WorkerEvent.OPENED): WorkerState.READY,
        (WorkerState.WAITING, WorkerEvent.OPENED): WorkerState.READY,
        (WorkerState.JOINING, WorkerEvent.LOST): WorkerState.WAITING,
        (WorkerState.READY, WorkerEvent.LOST): WorkerState.WAITING,
        (WorkerState.WAITING, WorkerEvent.LOST): WorkerState.WAITING,
        (WorkerState.JOINING, WorkerEvent.STOPPED): WorkerState.DRAINING,
        (WorkerState.WAITING, WorkerEvent.STOPPED): WorkerState.DRAINING,
        (WorkerState.READY, WorkerEvent.STOPPED): WorkerState.DRAINING,
        (WorkerState.DRAINING, WorkerEvent.STOPPED): WorkerState.DRAINING,
        (WorkerState.JOINING, WorkerEvent.LEFT): WorkerState.GONE,
        (WorkerState.READY, WorkerEvent.LEFT): WorkerState.GONE,
        (WorkerState.WAITING, WorkerEvent.LEFT): WorkerState.GONE,
        (WorkerState.DRAINING, WorkerEvent.LEFT): WorkerState.GONE,
    },
)


class Reception(Enum):
    """What becomes of a message, by its type and its sender's state."""

    TAKEN = auto()  # acted upon
    LATE = auto()  # it crossed one of ours on the way: dropped and counted
    WRONG = auto()  # a worker that keeps the protocol cannot send it now: it is stopped


RECEPTION: Final[Mapping[WorkerState, Mapping[type[messages.Message], Reception]]] = {
    WorkerState.JOINING: {
        messages.Opened: Reception.TAKEN,
        messages.OpenFailed: Reception.TAKEN,
        messages.Wanted: Reception.TAKEN,
        messages.Progress: Reception.WRONG,
        messages.Leaves: Reception.WRONG,
        messages.Written: Reception.WRONG,
        messages.Compared: Reception.WRONG,
        messages.Failed: Reception.WRONG,
        messages.Flushed: Reception.WRONG,
        messages.Alive: Reception.TAKEN,
        messages.Goodbye: Reception.TAKEN,
    },
    WorkerState.READY: {
        messages.Opened: Reception.TAKEN,
        messages.OpenFailed: Reception.TAKEN,
        messages.Wanted: Reception.TAKEN,
        messages.Progress: Reception.TAKEN,
        messages.Leaves: Reception.TAKEN,
        messages.Written: Reception.TAKEN,
        messages.Compared: Reception.TAKEN,
        messages.Failed: Reception.TAKEN,
        messages.Flushed: Reception.TAKEN,
        messages.Alive: Reception.TAKEN,
        messages.Goodbye: Reception.TAKEN,
    },
    WorkerState.WAITING: {
        messages.Opened: Reception.TAKEN,
        messages.OpenFailed: Reception.TAKEN,
        messages.Wanted: Reception.LATE,
        messages.Progress: Reception.LATE,
        messages.Leaves: Reception.LATE,
        messages.Written: Reception.LATE,
        messages.Compared: Reception.LATE,
        messages.Failed: Reception.LATE,
        messages.Flushed: Reception.LATE,
        messages.Alive: Reception.TAKEN,
        messages.Goodbye: Reception.TAKEN,
    },
    WorkerState.DRAINING: {
        messages.Opened: Reception.LATE,
        messages.OpenFailed: Reception.LATE,
        messages.Wanted: Reception.LATE,
        messages.Progress: Reception.TAKEN,
        messages.Leaves: Reception.TAKEN,
        messages.Written: Reception.TAKEN,
        messages.Compared: Reception.TAKEN,
        messages.Failed: Reception.TAKEN,
        messages.Flushed: Reception.LATE,
        messages.Alive: Reception.TAKEN,
        messages.Goodbye: Reception.TAKEN,
    },
}


# -- the job -----------------------------------------------------------------------------------------------------------


class Phase(Enum):
    OPENING = "opening"
    PREPARING = "preparing"
    COPYING = "copying"
    FLUSHING = "flushing"
    VERIFYING = "verifying"
    STOPPING = "stopping"
    DONE = "done"


class JobEvent(Enum):
    PREPARE = auto()
    COPY = auto()
    FLUSH = auto()
    VERIFY = auto()
    END = auto()
    FINISH = auto()


JOBS: Final = Table(
    "job",
    {
        Phase.OPENING: "One worker, the scout, opens both sides; nothing is known about them yet.",
        Phase.PREPARING: "Both sides were checked; the shell gives the destination its size.",
        Phase.COPYING: "Ranges are leased and copied.",
        Phase.FLUSHING: "Every range is written; those who wrote flush.",
        Phase.VERIFYING: "Ranges are leased and compared: those of two ends, or all that was copied.",
        Phase.STOPPING: "The verdict is known; the workers finish what is on the wire and leave.",
        Phase.DONE: "Finish was given; nothing happens any more.",
    },
    {
        (Phase.OPENING, JobEvent.PREPARE): Phase.PREPARING,
        (Phase.OPENING, JobEvent.COPY): Phase.COPYING,
        (Phase.PREPARING, JobEvent.COPY): Phase.COPYING,
        (Phase.COPYING, JobEvent.FLUSH): Phase.FLUSHING,
        (Phase.FLUSHING, JobEvent.COPY): Phase.COPYING,
        (Phase.OPENING, JobEvent.VERIFY): Phase.VERIFYING,
        (Phase.COPYING, JobEvent.VERIFY): Phase.VERIFYING,
        (Phase.FLUSHING, JobEvent.VERIFY): Phase.VERIFYING,
        (Phase.OPENING, JobEvent.END): Phase.STOPPING,
        (Phase.PREPARING, JobEvent.END): Phase.STOPPING,
        (Phase.COPYING, JobEvent.END): Phase.STOPPING,
        (Phase.FLUSHING, JobEvent.END): Phase.STOPPING,
        (Phase.VERIFYING, JobEvent.END): Phase.STOPPING,
        (Phase.STOPPING, JobEvent.FINISH): Phase.DONE,
    },
)
