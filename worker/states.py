"""The states of one operation, as data: what each means, and which event leads where. Pure.

::

    EMPTY -> REQUESTING -> WAITING -> READING -> WRITING -> CONFIRMING -> EMPTY
                 ^            |          |  \\-> MERGING --^       |
                 \\------------+----------/                        |   (a failed read asks again)
    EMPTY -> ZEROING --------------------------> CONFIRMING       |
                                       WRITING <------------------+   (a failed write writes again: its data is held)
                                    REQUESTING <------------------/   (or it was spliced, and is gone: it is read again)

A short transfer is not an event: the connection repeats the step until it is whole.
"""

from __future__ import annotations

from enum import IntEnum, auto

from nbdshard.common.errors import IllegalEvent


class OperationState(IntEnum):
    """Where an operation is."""

    EMPTY = auto()
    REQUESTING = auto()
    WAITING = auto()
    READING = auto()
    MERGING = auto()
    WRITING = auto()
    ZEROING = auto()
    CONFIRMING = auto()


class OperationEvent(IntEnum):
    """What can happen to an operation."""

    BEGIN_READ = auto()
    BEGIN_ZERO = auto()
    REQUEST_SENT = auto()
    REPLY_ARRIVING = auto()
    READ_DONE = auto()
    READ_FAILED = auto()
    MERGE = auto()
    WRITES_SENT = auto()
    WRITE_FAILED = auto()
    DATA_LOST = auto()
    ZERO_FAILED = auto()
    CONFIRMED = auto()
    DROPPED = auto()


_S, _E = OperationState, OperationEvent

MEANING: dict[OperationState, str] = {
    _S.EMPTY: "The slot is free.",
    _S.REQUESTING: "The READ request is queued or being sent to the source, or waits for its next try.",
    _S.WAITING: "The source has the request; no payload has arrived.",
    _S.READING: "Payload is arriving; nothing is written before all of it is held and the reply ended without error.",
    _S.MERGING: "The destination's own last block is being read, to keep its bytes after the source's end.",
    _S.WRITING: "All payload is held; its WRITE requests are queued or being sent to the destination.",
    _S.ZEROING: "WRITE_ZEROES requests are queued or being sent to the destination; there is no payload.",
    _S.CONFIRMING: "The destination has every request whole; at least one is not yet acknowledged.",
}

TRANSITIONS: dict[tuple[OperationState, OperationEvent], OperationState] = {
    (_S.EMPTY, _E.BEGIN_READ): _S.REQUESTING,
    (_S.EMPTY, _E.BEGIN_ZERO): _S.ZEROING,
    (_S.REQUESTING, _E.REQUEST_SENT): _S.WAITING,
    (_S.WAITING, _E.REPLY_ARRIVING): _S.READING,
    # Completions come in any order: a reply may be heard of before the send that asked for it.
    (_S.REQUESTING, _E.REPLY_ARRIVING): _S.READING,
    (_S.READING, _E.REQUEST_SENT): _S.READING,
    # A reply that carries no payload (an error, a hole) ends the read without ever having arrived.
    (_S.WAITING, _E.READ_DONE): _S.WRITING,
    (_S.READING, _E.READ_DONE): _S.WRITING,
    (_S.WAITING, _E.READ_FAILED): _S.REQUESTING,
    (_S.READING, _E.READ_FAILED): _S.REQUESTING,
    (_S.WRITING, _E.MERGE): _S.MERGING,
    (_S.MERGING, _E.READ_DONE): _S.WRITING,
    (_S.MERGING, _E.READ_FAILED): _S.MERGING,
    (_S.WRITING, _E.WRITES_SENT): _S.CONFIRMING,
    (_S.ZEROING, _E.WRITES_SENT): _S.CONFIRMING,
    (_S.CONFIRMING, _E.WRITE_FAILED): _S.WRITING,
    (_S.WRITING, _E.WRITE_FAILED): _S.WRITING,
    (_S.CONFIRMING, _E.DATA_LOST): _S.REQUESTING,
    (_S.CONFIRMING, _E.ZERO_FAILED): _S.ZEROING,
    (_S.ZEROING, _E.ZERO_FAILED): _S.ZEROING,
    # The server refused to zero at all: zeroes are written as data instead.
    (_S.ZEROING, _E.WRITE_FAILED): _S.WRITING,
    # ... and another request of the same run, sent before that was known, fails in its turn.
    (_S.WRITING, _E.ZERO_FAILED): _S.WRITING,
    (_S.CONFIRMING, _E.CONFIRMED): _S.EMPTY,
    # All of the payload was zeroes, and they joined the zeroes of the range; or the range was given up.
    (_S.REQUESTING, _E.DROPPED): _S.EMPTY,
    (_S.WAITING, _E.DROPPED): _S.EMPTY,
    (_S.READING, _E.DROPPED): _S.EMPTY,
    (_S.MERGING, _E.DROPPED): _S.EMPTY,
    (_S.WRITING, _E.DROPPED): _S.EMPTY,
    (_S.ZEROING, _E.DROPPED): _S.EMPTY,
    (_S.CONFIRMING, _E.DROPPED): _S.EMPTY,
}


# The same by numbers, which count from 1: six lookups for every request, and a tuple of two enums is slow to hash.
NEXT: list[list[OperationState | None]] = [
    [None, *(TRANSITIONS.get((state, event)) for event in _E)] for state in (_S.EMPTY, *_S)
]


def illegal(state: OperationState, event: OperationEvent, story: object) -> IllegalEvent:
    """What to raise where the table has no entry."""
    return IllegalEvent("operation", state.name, event.name, str(story))
