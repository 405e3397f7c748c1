"""One NBD connection on the ring: resolve, connect, negotiate, then requests until a soft disconnect. A dull shell.

::

    RESOLVING -> CONNECTING -> NEGOTIATING -> READY -> LEAVING -> CLOSED

The bytes are the business of common.nbd's connecter and client; this file moves them, by operations of the ring (ONE
receive outstanding) or, where payload may be spliced, by direct calls (direct.py), and looks at the clock. A link that
fails in any state says so once (`on_lost`) and closes; nothing is heard of it then.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Sequence
from enum import Enum, auto

from nbdshard.common.dial import unreachable
from nbdshard.common.errors import ConnectionLost, NbdshardError, TimedOut, UserError
from nbdshard.common.limits import (
    ADDRESSES_MAX,
    BUFFERS_PER_SEND_MAX,
    DISCONNECT_SECONDS,
    FLUSH_BYTES_PER_SECOND,
    FLUSH_SECONDS,
    MIB,
    REQUEST_SECONDS_PER_MIB,
)
from nbdshard.common.messages import EndpointDescription, Side
from nbdshard.common.nbd.client import Client, Done, Event, Sent
from nbdshard.common.nbd.connecter import Connecter, Negotiated
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.options import Wishes
from nbdshard.common.nbd.payload import Elsewhere, Piece, in_memory
from nbdshard.common.nbd.uri import NbdUri
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Descriptor, Kind, Operation, Ring
from nbdshard.worker.deadlines import Outstanding, Timeouts
from nbdshard.worker.describing import describe
from nbdshard.worker.direct import DirectStream
from nbdshard.worker.pipes import Plumbing
from nbdshard.worker.ports import Listener, Payload
from nbdshard.worker.sockets import SYSTEM_SOCKETS, Address, Connector


class LinkState(Enum):
    """Where a link is in its life."""

    RESOLVING = auto()
    CONNECTING = auto()
    NEGOTIATING = auto()
    READY = auto()
    LEAVING = auto()
    CLOSED = auto()


class NbdLink:
    """A connection to one export. Implements `ports.Connection`.

    `on_ready(link)` is called once the export is negotiated and `description` is set, `on_lost(link, error)` at most
    once; both come out of a ring completion, `pump` or `tick`, never out of `start` or a request.
    """

    def __init__(
        self,
        ring: Ring,
        uri: NbdUri,
        side: Side,
        timeouts: Timeouts,
        on_ready: Callable[[NbdLink], None],
        on_lost: Callable[[NbdLink, NbdshardError], None],
        connector: Connector = SYSTEM_SOCKETS,
        plumbing: Plumbing | None = None,
        look: Callable[[], object] = lambda: None,
    ) -> None:
        """`plumbing`: None for a link that splices nothing. `look`: look at the clock; whoever does may `close` us."""
        self.peer = str(uri)
        self.side = side
        self.state = LinkState.RESOLVING
        self.description = EndpointDescription(self.peer, None)
        self.listener: Listener | None = None
        self._ring = ring
        self._uri = uri
        self._timeouts = timeouts
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._connector = connector
        self._plumbing = plumbing
        self._look = look
        self._addresses: list[Address] = []
        self._attempt_by = 0.0  # until then the present address may take
        self._busy_address: Address | None = None  # its server has not yet accepted those before us
        self._descriptor: Descriptor | None = None
        self._closing = 0  # descriptors of addresses that could not be reached, until the ring has let go of them
        self._deadline = 0.0  # of the present state, up to READY; in LEAVING, of the soft disconnect
        self._connecter: Connecter | None = None
        self._client: Client | None = None
        self._handles = 0
        self._out: list[Piece] = []
        self._out_of: Client | None = None  # whose bytes these are; None: the connecter's
        self._sending = Operation(Kind.SEND, owner=self._sent)
        self._receiving = Operation(Kind.RECEIVE, owner=self._received)
        self._stream: DirectStream | None = None  # once it is ready, if payload may be spliced
        self.has_work = False  # there is something to do for `pump`
        self._outstanding: dict[int, Outstanding] = {}
        self._outstanding_bytes = 0
        self._unflushed_bytes = 0
        self._now = 0.0
        self._has_told_loss = False
        self._pending_failure: NbdshardError = ConnectionLost(self.peer, "connecting", "no address")

    # -- opening -------------------------------------------------------------------------------------------------------

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
        self._connecter = Connecter(Wishes(self._uri.export_name), self.peer)

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

    def _negotiated(self, export: Export) -> None:
        self.description = describe(export, self.peer)
        self._client = Client(export, self.peer, self._handles)
        self._connecter = None
        self.state = LinkState.READY
        self._on_ready(self)

    # -- ports.Connection ----------------------------------------------------------------------------------------------

    @property
    def splices(self) -> bool:
        return self._plumbing is not None

    def read(self, handle: int, where: Range, into: Payload) -> None:
        self._running().read(handle, where, into)
        self._expect(handle, "reading", where.length)

    def write(self, handle: int, where: Range, payload: Payload) -> None:
        self._running().write(handle, where, [payload] if isinstance(payload, memoryview) else payload.pieces)
        self._unflushed_bytes += where.length
        self._expect(handle, "writing", where.length)
        if self._stream is not None and not isinstance(payload, memoryview):
            self._stream.push()  # while it is in the CPU's cache

    def zero(self, handle: int, where: Range, *, allocated: bool) -> None:
        self._running().write_zeroes(handle, where, no_hole=allocated)
        self._unflushed_bytes += where.length
        self._expect(handle, "zeroing", where.length)

    def extents(self, handle: int, where: Range) -> None:
        self._running().block_status(handle, where)
        self._expect(handle, "asking for block status", 0)

    def flush(self, handle: int) -> None:
        self._running().flush(handle)
        seconds = FLUSH_SECONDS + self._unflushed_bytes / FLUSH_BYTES_PER_SECOND
        self._unflushed_bytes = 0
        self._outstanding[handle] = Outstanding(self._now + seconds, "flushing", seconds, 0)

    def _running(self) -> Client:
        assert self._client is not None
        self.has_work = True
        return self._client

    def _expect(self, handle: int, doing: str, size: int) -> None:
        # All that is under way goes over the same wire: a slow one is not a dead one.
        self._outstanding_bytes += size
        seconds = self._timeouts.request + self._outstanding_bytes / MIB * REQUEST_SECONDS_PER_MIB
        self._outstanding[handle] = Outstanding(self._now + seconds, doing, seconds, size)

    # -- the loop ------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self.state is LinkState.CLOSED and self._descriptor is None and not self._closing

    @property
    def quiet(self) -> bool:
        """No request is outstanding and nothing is queued."""
        return self._client is None or (self._client.pending == 0 and not self._out)

    def pump(self, now: float) -> None:
        """Send what is queued, take what has arrived, and see to it that the ring tells when more can be done."""
        self._now = now
        if not self.has_work:
            return
        self.has_work = False
        if self._descriptor is None or self.state is LinkState.CLOSED:
            return
        try:
            if self._plumbing is not None and self._client is not None:
                self._move(self._plumbing, self._client, self._descriptor)
            else:
                self._keep_moving()
        except NbdshardError as error:
            self._fail(error)

    # -- by operations of the ring: the negotiation, and payload that goes through buffers
    #
    # The clock is looked at before a SEND is submitted, and what it then waits for the ring does alone: room in the
    # socket. A process that was stopped meanwhile goes on with that, inside the ring or the kernel, before any code of
    # ours can look at the clock again. So writes under leases that end never go this way (service.py sees to it): each
    # is a call that does not wait, made right after a look.

    def _keep_moving(self) -> None:
        """Keep one send (while there is something to send) and one receive outstanding."""
        machine = self._client or self._connecter
        if machine is None:
            return
        if not self._sending.pending:
            if not self._out:
                self._out = list(machine.data_to_send())
                self._out_of = self._client
            if self._out:
                if not self._may_send():
                    return
                self._submit(self._sending, in_memory(self._out[:BUFFERS_PER_SEND_MAX]))
            elif self.state is LinkState.LEAVING and self.quiet:
                self.close()
                return
        if not self._receiving.pending:
            target = machine.receive_target()
            self._submit(self._receiving, [target] if isinstance(target, memoryview) else target)

    # -- by direct calls, whenever the socket is ready: payload that may be spliced

    def _move(self, plumbing: Plumbing, client: Client, descriptor: Descriptor) -> None:
        """Move what can be moved now, both ways."""
        stream = self._stream
        if stream is None:
            if self._sending.pending or self._receiving.pending:
                return  # of the negotiation; its end has `pump` called again
            stream = DirectStream(self._ring, descriptor, plumbing, client, self.peer, self._changed, self._may_send)
            self._stream = stream
        stream.send(self._dispatch)
        if stream.has_more and not stream.error:
            stream.receive(self._dispatch)
        self._after_move(stream)

    def _may_send(self) -> bool:
        """Whether the connection may be written to, by a clock that is looked at now."""
        self._look()
        return self.state is not LinkState.CLOSED

    def _after_move(self, stream: DirectStream) -> None:
        """Act on what the stream came to."""
        if self.state is LinkState.CLOSED:
            return
        if stream.error:
            raise self._broken(stream.error)
        if stream.ended:
            self._ended()
        elif self.state is LinkState.LEAVING and stream.idle and self.quiet:
            self.close()
        elif stream.has_more:
            self.has_work = True

    def _changed(self, operation: Operation) -> bool:
        """The socket has become readable or writable, or has failed. False where nobody needs to know."""
        stream = self._stream
        if stream is None or self.state is LinkState.CLOSED:
            return False
        if operation.result < 0:  # it could not be watched
            self._fail(self._broken(operation.result))
            return True
        try:
            told = stream.take_note(operation.result)
            if told:
                stream.send(self._dispatch)
            if stream.has_more and not stream.error:
                told = stream.receive(self._dispatch) or told
            if not (told or stream.has_more or stream.ended or stream.error):
                return False
            self._after_move(stream)
        except NbdshardError as error:
            self._fail(error)
        return True

    def _submit(self, operation: Operation, buffers: Sequence[memoryview | bytes]) -> None:
        operation.descriptor = self._descriptor
        operation.buffers = buffers
        self._ring.submit(operation)

    def tick(self, now: float) -> None:
        """Look at the clock; call about once a second."""
        self._now = now
        if self.state is LinkState.RESOLVING and now >= self._deadline:
            self._fail(TimedOut(self.peer, "resolving the host name", self._timeouts.connect))
        elif self.state is LinkState.CONNECTING:
            self._tick_connecting(now)
        elif self.state is LinkState.NEGOTIATING and now >= self._deadline:
            self._fail(TimedOut(self.peer, "negotiating", self._timeouts.handshake))
        elif self.state is LinkState.LEAVING and now >= self._deadline:
            self.close()
        elif self.state is LinkState.READY and self._outstanding:
            oldest = min(self._outstanding.values(), key=lambda request: request.deadline)
            if now >= oldest.deadline:
                self._fail(TimedOut(self.peer, oldest.doing, oldest.seconds))

    def disconnect(self) -> None:
        """Leave softly: finish what is outstanding, send NBD_CMD_DISC, close; at once before READY."""
        if self.state is not LinkState.READY or self._client is None:
            self.close()
            return
        self.state = LinkState.LEAVING
        self.has_work = True
        self._deadline = self._now + DISCONNECT_SECONDS
        self._client.disconnect()

    def close(self) -> None:
        """Shut the connection down at once; `closed` is true when the ring has let go of it. Idempotent."""
        if self.state is LinkState.CLOSED:
            return
        self.state = LinkState.CLOSED
        if self._descriptor is not None:
            self._ring.submit(Operation(Kind.CLOSE, self._descriptor, owner=self._closed))

    def _closed(self, _: Operation) -> None:
        self._descriptor = None

    def _fail(self, error: NbdshardError, *, softly: bool = False) -> None:
        if self.state is not LinkState.CLOSED:
            (self.disconnect if softly else self.close)()
            if not self._has_told_loss:
                self._has_told_loss = True
                self._on_lost(self, error)

    # -- completions ---------------------------------------------------------------------------------------------------

    def _sent(self, operation: Operation) -> None:
        self.has_work = True
        if self.state is LinkState.CLOSED:
            return
        try:
            if operation.result < 0:
                raise self._broken(operation.result)
            self._consume(operation.result)
            # The reply that ended the negotiation may be heard of before the send that asked for it.
            if self._out_of is not None:
                self._dispatch(self._out_of.sent(operation.result))
        except NbdshardError as error:
            self._fail(error)

    def _consume(self, count: int) -> None:
        """Drop `count` bytes from the front of what is to be sent."""
        index = 0
        while count:
            buffer = self._out[index]
            assert not isinstance(buffer, Elsewhere)
            if count < len(buffer):
                self._out[index] = memoryview(buffer)[count:]
                break
            count -= len(buffer)
            index += 1
        del self._out[:index]

    def _received(self, operation: Operation) -> None:
        self.has_work = True
        if self.state is LinkState.CLOSED:
            return
        try:
            if operation.result > 0:
                self._take(operation.result)
            elif operation.result == 0:
                self._ended()
            else:
                raise self._broken(operation.result)
        except NbdshardError as error:
            self._fail(error)

    def _take(self, count: int) -> None:
        if self._client is not None:
            self._dispatch(self._client.received(count))
        elif self._connecter is not None:
            for event in self._connecter.received(count):
                if isinstance(event, Negotiated):
                    self._negotiated(event.export)

    def _dispatch(self, events: list[Event]) -> None:
        listener = self.listener
        if listener is None:
            return
        for event in events:
            if isinstance(event, Done):
                length = self._outstanding.pop(event.handle).length
                self._outstanding_bytes -= length
                listener.done(event.handle, event.error, length, event.extents)
            elif isinstance(event, Sent):
                listener.sent(event.handle)
            else:
                listener.arriving(event.handle)
        if self._client is not None and self._client.shutdown_seen and self.state is LinkState.READY:
            # ESHUTDOWN: the specification asks for a soft disconnect.
            self._fail(ConnectionLost(self.peer, "copying", "the server is shutting down"), softly=True)

    def _ended(self) -> None:
        """The server closed the connection. The machine knows what was cut short."""
        if self.state is LinkState.LEAVING:
            self.close()
        elif self._client is not None:
            self._client.end_of_stream()
        elif self._connecter is not None:
            self._connecter.end_of_stream()

    def _broken(self, result: int) -> ConnectionLost:
        doing = "negotiating"
        if self._client is not None:
            doing = f"waiting for {self._client.pending} replies" if self._client.pending else "idle"
        return ConnectionLost(self.peer, doing, os.strerror(-result).lower())
