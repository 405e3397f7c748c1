"""Why a connection of the control channel does not come about: what ZeroMQ's socket monitor tells, in plain
words.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import TYPE_CHECKING

import zmq

from nbdshard.common.limits import MESSAGES_PER_TURN_MAX

if TYPE_CHECKING:
    from nbdshard.common.keys import WorkerKeys

_EVENT = struct.Struct("=HI")  # zmq_socket_monitor(3): event number and its value; the second frame is the endpoint
_MECHANISM_MISMATCH = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_WATCHED = (
    zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Stage(Enum):
    """How far the connection got. A later member says more than an earlier one."""

    NOTHING = 0  # not even an address to connect to: the host's name does not resolve
    CONNECTING = 1  # a connection was tried and neither accepted nor refused
    REFUSED = 2  # a connection was tried and failed
    CONNECTED = 3  # somebody accepts connections, but does not speak ZeroMQ's handshake to its end
    BROKEN_HANDSHAKE = 4  # the other side hung up in the handshake, as it does when it cannot read what we encrypt
    JOINED = 5  # the handshake was done; only the coordinator's first message is missing
    FOREIGN_PROTOCOL = 6  # it answers, but not as ZeroMQ does
    KEYS_MISMATCH = 7  # one side uses keys and the other does not
    TURNED_AWAY = 8  # the coordinator knows our key well enough to refuse it


_STAGE_OF_EVENT = {
    zmq.EVENT_CONNECT_DELAYED: Stage.CONNECTING,
    zmq.EVENT_CLOSED: Stage.REFUSED,
    zmq.EVENT_CONNECTED: Stage.CONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Stage.BROKEN_HANDSHAKE,
    zmq.EVENT_HANDSHAKE_SUCCEEDED: Stage.JOINED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Stage.FOREIGN_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Stage.TURNED_AWAY,
}


class Monitor:
    """Watches one connecting socket. `read` takes in what happened; the rest are questions about it."""

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        self.stage = Stage.NOTHING
        self._watched = watched
        self._events = watched.get_monitor_socket(_WATCHED)
        self._events.linger = 0

    def read(self) -> None:
        """Take in the events so far. Never blocks."""
        for _ in range(MESSAGES_PER_TURN_MAX):
            try:
                frames = self._events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event, value = _EVENT.unpack_from(frames[0])
            stage = _STAGE_OF_EVENT.get(event, Stage.NOTHING)
            if stage is Stage.FOREIGN_PROTOCOL and value == _MECHANISM_MISMATCH:
                stage = Stage.KEYS_MISMATCH
            if stage.value > self.stage.value:
                self.stage = stage

    def final_reason(self, keys: WorkerKeys | None) -> str:
        """Why there is no hope at all, or "" while there is."""
        if self.stage is Stage.TURNED_AWAY and keys is not None:
            return f"refused: this worker's key {keys.own.public} is not on its allow-list"
        if self.stage is Stage.KEYS_MISMATCH and keys is None:
            return "refused: it wants keys; give this worker --key and --coordinator-key"
        if self.stage is Stage.KEYS_MISMATCH:
            return "it uses no keys, this worker does: wrong address, or the coordinator runs without --key"
        return ""

    def likely_reason(self, keys: WorkerKeys | None) -> str:
        """The best guess, once the time is over."""
        match self.stage:
            case Stage.NOTHING:
                return "the host name does not resolve"
            case Stage.CONNECTING:
                return "wrong address, or no route to it"
            case Stage.REFUSED:
                return "nothing accepts connections there"
            case Stage.BROKEN_HANDSHAKE if keys is not None:
                ours, theirs = keys.own.public, keys.coordinator
                return f"wrong address, {theirs} is not its key, or this worker's key {ours} is not allowed"
            case Stage.CONNECTED | Stage.BROKEN_HANDSHAKE | Stage.FOREIGN_PROTOCOL:
                return "wrong address: what answers there is no coordinator"
            case Stage.JOINED | Stage.KEYS_MISMATCH | Stage.TURNED_AWAY:
                return "it took the connection and says nothing"

    def close(self) -> None:
        """Close; call it before the watched socket is closed."""
        self._watched.disable_monitor()
        self._events.close(0)
