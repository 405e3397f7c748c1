"""The first half of a link's life: resolve the host name, and connect to one of its addresses. A dull shell."""

from __future__ import annotations

import errno
import select
import socket
from abc import ABC, abstractmethod
from enum import Enum, auto

from nbdshard.common.dial import unreachable
from nbdshard.common.errors import ConnectionLost, NbdshardError, TimedOut, UserError
from nbdshard.common.limits import ADDRESSES_MAX
from nbdshard.common.nbd.uri import NbdUri
from nbdshard.common.ring import Descriptor, Kind, Operation, Ring
from nbdshard.worker.deadlines import Timeouts
from nbdshard.worker.sockets import Address, Connector


class LinkState(Enum):
    """Where a link is in its life."""

    RESOLVING = auto()
    CONNECTING = auto()
    NEGOTIATING = auto()
    READY = auto()
    LEAVING = auto()
    CLOSED = auto()


class Dialing(ABC):
    """RESOLVING and CONNECTING; `_dialed` is called when the server has accepted, in NEGOTIATING.

    Each address has its share of the time; one that fails or does not answer in it gives way to the next.
    """

    def __init__(self, ring: Ring, uri: NbdUri, timeouts: Timeouts, connector: Connector) -> None:
        self.peer = str(uri)
        self.state = LinkState.RESOLVING
        self.has_work = False  # there is something to do for `pump`
        self._ring = ring
        self._uri = uri
        self._timeouts = timeouts
        self._connector = connector
        self._handles = 0
        self._now = 0.0
        self._addresses: list[Address] = []
        self._attempt_by = 0.0  # until then the present address may take
        self._busy_address: Address | None = None  # its server has not yet accepted those before us
        self._descriptor: Descriptor | None = None
        self._closing = 0  # descriptors of addresses that could not be reached, until the ring has let go of them
        self._deadline = 0.0  # of the present state, up to READY; in LEAVING, of the soft disconnect
        self._pending_failure: NbdshardError = ConnectionLost(self.peer, "connecting", "no address")

    @abstractmethod
    def _dialed(self) -> None:
        """There is a connection: the negotiation begins."""

    @abstractmethod
    def _fail(self, error: NbdshardError, *, softly: bool = False) -> None:
        """The link is lost."""

    def start(self, now: float, handles: int) -> None:
        """Begin to connect; `handles` requests at most will be outstanding."""
        self._now = now
        self._handles = handles
        self._deadline = now + self._timeouts.connect
        if self._uri.socket is not None:
            self._addresses = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", self._uri.socket)]
            self._connect()
        else:
            host, port = self._uri.host or "localhost", self._uri.port
            resolve = Operation(
                Kind.CALL,
                function=lambda: self._connector.resolve(host, port),
                owner=self._resolved,
            )
            self._ring.submit(resolve)

    def _resolved(self, operation: Operation) -> None:
        if self.state is not LinkState.RESOLVING:
            return
        if operation.result < 0:
            reason = getattr(operation.value, "strerror", None) or str(operation.value)
            self._fail(UserError(f"the host name cannot be resolved: {reason}", self.peer))
            return
        self._addresses = list(operation.value)[:ADDRESSES_MAX]  # type: ignore[call-overload]
        self._connect()

    def _connect(self) -> None:
        """Try the next address, for its share of the time that is left; the last one's failure is the link's."""
        self.state = LinkState.CONNECTING
        self._attempt_by = self._now + (self._deadline - self._now) / len(self._addresses)
        self._begin(self._addresses.pop(0))

    def _begin(self, address: Address) -> None:
        number = self._connector.begin(address)
        if number == -errno.EAGAIN:
            self._busy_address = address  # `tick` tries again
            return
        self._busy_address = None
        if number < 0:
            self._connect_failed(-number)
            return
        self._descriptor = self._ring.attach(number, is_socket=True)
        self._ring.submit(Operation(Kind.POLL, self._descriptor, mask=select.POLLOUT, owner=self._connected))

    def _connected(self, operation: Operation) -> None:
        descriptor = operation.descriptor
        if self.state is not LinkState.CONNECTING or descriptor is not self._descriptor or descriptor is None:
            return
        error = -operation.result if operation.result < 0 else self._connector.error(descriptor.number)
        if error:
            self._end_attempt(descriptor)
            self._connect_failed(error)
            return
        self.state = LinkState.NEGOTIATING
        self.has_work = True
        self._deadline = self._now + self._timeouts.handshake
        self._dialed()

    def _end_attempt(self, descriptor: Descriptor) -> None:
        self._closing += 1
        self._ring.submit(Operation(Kind.CLOSE, descriptor, owner=self._attempt_closed))
        self._descriptor = None

    def _attempt_closed(self, _: Operation) -> None:
        self._closing -= 1

    def _tick_connecting(self, now: float) -> None:
        if now >= self._attempt_by:
            if not self._addresses:
                self._fail(TimedOut(self.peer, "connecting", self._timeouts.connect))
                return
            if self._descriptor is not None:
                self._end_attempt(self._descriptor)
            self._connect()
        elif self._busy_address is not None:
            self._begin(self._busy_address)

    def _connect_failed(self, error: int) -> None:
        if self._addresses:
            self._connect()
        else:
            self._addresses = []
            self._pending_failure = unreachable(self.peer, OSError(error, ""), self._uri.socket)
            # Not called out of `start`: the next turn of the loop tells.
            self._ring.submit(Operation(Kind.CALL, function=lambda: None, owner=self._tell_failure))

    def _tell_failure(self, _: Operation) -> None:
        if self.state is not LinkState.CLOSED:
            self._fail(self._pending_failure)
