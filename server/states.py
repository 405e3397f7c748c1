"""The states of the listener and of the device as data: a sentence each, and where each may go."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from nbdshard.common.nbd.states import Row, row


class ListenerState(Enum):
    """Where a negotiation stands, seen from the server."""

    CLIENT_FLAGS = auto()
    OPTION_HEADER = auto()
    OPTION_DATA = auto()
    SKIPPING = auto()
    ENTERED = auto()
    PARTED = auto()
    FAILED = auto()


class DeviceState(Enum):
    """Where the transmission phase of one connection stands, seen from the server."""

    RUNNING = auto()
    DISCONNECTING = auto()
    CLOSED = auto()
    FAILED = auto()


_L = ListenerState
LISTENER_STATES: Final[Mapping[ListenerState, Row]] = {
    _L.CLIENT_FLAGS: row(
        "The greeting is sent; the client's flags are awaited.",
        _L.OPTION_HEADER,
        _L.PARTED,
        _L.FAILED,
    ),
    _L.OPTION_HEADER: row(
        "The header of the client's next option is awaited.",
        _L.OPTION_HEADER,
        _L.OPTION_DATA,
        _L.SKIPPING,
        _L.ENTERED,
        _L.PARTED,
        _L.FAILED,
    ),
    _L.OPTION_DATA: row(
        "The header of an option is there; its data is awaited.",
        _L.OPTION_HEADER,
        _L.ENTERED,
        _L.PARTED,
        _L.FAILED,
    ),
    _L.SKIPPING: row(
        "An option has more data than is looked at: it is dropped as it comes, and refused then.",
        _L.OPTION_HEADER,
        _L.PARTED,
        _L.FAILED,
    ),
    _L.ENTERED: row("The transmission phase has begun: the connection belongs to a device now."),
    _L.PARTED: row("Nothing more is said on this connection, but what is queued still leaves."),
    _L.FAILED: row("The client broke the protocol; not another byte of it is looked at."),
}

_D = DeviceState
DEVICE_STATES: Final[Mapping[DeviceState, Row]] = {
    _D.RUNNING: row(
        "Requests are taken, and answered in any order.",
        _D.DISCONNECTING,
        _D.CLOSED,
        _D.FAILED,
    ),
    _D.DISCONNECTING: row(
        "The client has sent DISC: what it asked before is answered, then the connection ends.",
        _D.CLOSED,
    ),
    _D.CLOSED: row("The stream has ended; answers to what is under way go nowhere."),
    _D.FAILED: row("The client broke the protocol; not another byte of it is looked at."),
}
