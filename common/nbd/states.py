"""The states of the connecter and of the client as data: a sentence each, and where each may go.

Everything that may happen to a machine is in these tables; `advance` is the only way from state to state.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, auto
from typing import Final, TypeVar

import msgspec

from nbdshard.common.errors import IllegalEvent


class ConnecterState(Enum):
    """Where a negotiation stands."""

    GREETING = auto()
    REPLY_HEADER = auto()
    REPLY_PAYLOAD = auto()
    EXPORT_NAME_REPLY = auto()
    HAGGLED = auto()
    NEGOTIATED = auto()
    ABORTING = auto()
    PARTED = auto()
    FAILED = auto()


class ClientState(Enum):
    """Where the transmission phase of one connection stands."""

    RUNNING = auto()
    DISCONNECTING = auto()
    CLOSED = auto()
    FAILED = auto()


class ReceiveState(IntEnum):
    """What the client's next bytes are."""

    HEADER = auto()
    BODY = auto()
    PAYLOAD = auto()
    SURPLUS = auto()


class Row(msgspec.Struct, frozen=True):
    """One state: what it means, and the states it may go to."""

    sentence: str
    after: frozenset[Enum]


def row(sentence: str, *after: Enum) -> Row:
    """One row of a table of states."""
    return Row(sentence, frozenset(after))


_C = ConnecterState
CONNECTER_STATES: Final[Mapping[ConnecterState, Row]] = {
    _C.GREETING: row(
        "The server's greeting is awaited.",
        _C.REPLY_HEADER,
        _C.EXPORT_NAME_REPLY,
        _C.ABORTING,
        _C.PARTED,
        _C.FAILED,
    ),
    _C.REPLY_HEADER: row(
        "An option was sent; the header of its next reply is awaited.",
        _C.REPLY_HEADER,
        _C.REPLY_PAYLOAD,
        _C.EXPORT_NAME_REPLY,
        _C.HAGGLED,
        _C.NEGOTIATED,
        _C.ABORTING,
        _C.PARTED,
        _C.FAILED,
    ),
    _C.REPLY_PAYLOAD: row(
        "The header of an option reply is there; its payload is awaited.",
        _C.REPLY_HEADER,
        _C.EXPORT_NAME_REPLY,
        _C.HAGGLED,
        _C.NEGOTIATED,
        _C.ABORTING,
        _C.PARTED,
        _C.FAILED,
    ),
    _C.EXPORT_NAME_REPLY: row(
        "EXPORT_NAME was sent; size and flags are awaited, or the end of the stream, which is its refusal.",
        _C.NEGOTIATED,
        _C.PARTED,
        _C.FAILED,
    ),
    _C.HAGGLED: row(
        "What was wished for is known and no transmission phase was asked for; an ABORT is owed.",
        _C.ABORTING,
        _C.PARTED,
    ),
    _C.NEGOTIATED: row(
        "The transmission phase has begun: the connection belongs to a client now.",
        _C.PARTED,
    ),
    _C.ABORTING: row(
        "ABORT was sent; the server may acknowledge it or just close the connection.",
        _C.PARTED,
        _C.FAILED,
    ),
    _C.PARTED: row("Nothing more is said on this connection; only its end may come."),
    _C.FAILED: row("The server broke the protocol or is gone; the connection is of no more use."),
}

_T = ClientState
CLIENT_STATES: Final[Mapping[ClientState, Row]] = {
    _T.RUNNING: row(
        "Requests may be queued, and their replies are taken.",
        _T.DISCONNECTING,
        _T.CLOSED,
        _T.FAILED,
    ),
    _T.DISCONNECTING: row(
        "DISC is queued behind every request; replies are still taken, nothing may be queued.",
        _T.CLOSED,
        _T.FAILED,
    ),
    _T.CLOSED: row("The stream has ended; pending requests will never be answered here."),
    _T.FAILED: row("The server broke the protocol; not another byte of it is looked at."),
}

_R = ReceiveState
RECEIVE_STATES: Final[Mapping[ReceiveState, Row]] = {
    _R.HEADER: row(
        "A reply header, or the rest of one, comes next.",
        _R.HEADER,
        _R.BODY,
        _R.PAYLOAD,
    ),
    _R.BODY: row(
        "The payload of a chunk that the machine itself reads comes next: a hole, extents, an error.",
        _R.HEADER,
        _R.SURPLUS,
    ),
    _R.PAYLOAD: row(
        "Data that belongs in the sink of a READ comes next.",
        _R.HEADER,
    ),
    _R.SURPLUS: row(
        "Extents beyond the number that is kept come next; they are dropped as they arrive.",
        _R.HEADER,
    ),
}

_State = TypeVar("_State", bound=Enum)


def advance(table: Mapping[_State, Row], machine: str, state: _State, to: _State) -> _State:
    """`to`, if the table lets `state` go there. Raises IllegalEvent otherwise."""
    if to not in table[state].after:
        raise IllegalEvent(machine, state.name, f"a move to {to.name}", table[state].sentence)
    return to
