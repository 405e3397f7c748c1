"""Who may speak CURVE with us: ZeroMQ's authentication protocol (ZAP, RFC 27), answered from our own loop.

CURVE by itself proves that a client owns its key, and admits any key. libzmq asks the socket bound to
`inproc://zeromq.zap.01` in its context about each connection; while nobody is bound there, everyone is let
in. So the doorkeeper is there before the listening socket binds.
"""

from __future__ import annotations

import zmq

from nbdshard.common import logs
from nbdshard.common.keys import PublicKey
from nbdshard.common.limits import MESSAGES_PER_TURN_MAX, UNKNOWN_KEYS_LOGGED_MAX

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"nbdshard"
_REQUEST_FRAMES_MIN = 6  # version, request id, domain, address, identity, mechanism; then the mechanism's credentials
_CURVE_REQUEST_FRAMES = 7


class Doorkeeper:
    """Answers libzmq's questions about client keys from an allow-list. One per context; close it last."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: frozenset[PublicKey]) -> None:
        self._allowed = allowed
        self._told: set[PublicKey] = set()
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ENDPOINT)

    def answer(self) -> None:
        """Answer what was asked so far; never blocks."""
        for _ in range(MESSAGES_PER_TURN_MAX):
            try:
                request = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._reply(request), zmq.NOBLOCK)

    def _reply(self, request: list[bytes]) -> list[bytes]:
        """The six frames of a ZAP reply; 200 admits, 400 is a final refusal, which the client is told."""
        if len(request) < _REQUEST_FRAMES_MIN:  # libzmq itself asks, so this is a guard against the impossible
            return [b"1.0", request[1] if len(request) > 1 else b"", b"500", b"malformed request", b"", b""]
        version, request_id, _domain, address, _identity, mechanism = request[:_REQUEST_FRAMES_MIN]
        if mechanism == b"CURVE" and len(request) == _CURVE_REQUEST_FRAMES:
            key = PublicKey(request[-1])
            if key in self._allowed:
                return [version, request_id, b"200", b"OK", str(key).encode(), b""]
            self._tell(key, address.decode("ascii", "replace"))
        return [version, request_id, b"400", b"not on the allow-list", b"", b""]

    def _tell(self, key: PublicKey, address: str) -> None:
        if key in self._told or len(self._told) >= UNKNOWN_KEYS_LOGGED_MAX:
            return
        self._told.add(key)
        logs.warning(f"turned away a worker at {address}: its key {key} is not on the allow-list")

    def close(self) -> None:
        self.socket.close(0)
