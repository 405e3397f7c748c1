"""One NBD connection on the ring: resolve, connect, negotiate, then requests until a soft disconnect. A dull shell.

::

    RESOLVING -> CONNECTING -> NEGOTIATING -> READY -> LEAVING -> CLOSED

The bytes are the business of common.nbd's connecter and client; this file moves them, by operations of the ring (ONE
receive outstanding) or, where payload may be spliced, by direct calls (direct.py), and looks at the clock. A link that
fails in any state says so once (`on_lost`) and closes; nothing is heard of it then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import inf

from nbdshard.common.errors import BugError, ConnectionLost, NbdshardError, RequestError, TimedOut
from nbdshard.common.limits import (
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
from nbdshard.common.nbd.constants import Command
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.options import Wishes
from nbdshard.common.nbd.payload import Elsewhere, Piece, in_memory
from nbdshard.common.nbd.quick import Quick, quick
from nbdshard.common.nbd.sinks import BufferSink
from nbdshard.common.nbd.uri import NbdUri
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Descriptor, Kind, Operation, Ring
from nbdshard.common.ring.base import shut_down
from nbdshard.worker.deadlines import Outstanding, Timeouts
from nbdshard.worker.describing import describe
from nbdshard.worker.dialing import Dialing, LinkState
from nbdshard.worker.direct import DirectStream
from nbdshard.worker.lane_ends import SocketSource, SocketTarget
from nbdshard.worker.lending import LaneAge, LanePort, LaneSource, LaneTarget, Lendable
from nbdshard.worker.pipes import Plumbing
from nbdshard.worker.ports import Listener, Payload
from nbdshard.worker.sockets import SYSTEM_SOCKETS, Connector


class NbdLink(Dialing, Lendable):
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
        super().__init__(ring, uri, timeouts, connector)
        self.side = side
        self.description = EndpointDescription(self.peer, None)
        self.listener: Listener | None = None
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._plumbing = plumbing
        self._look = look
        self._connecter: Connecter | None = None
        self._client: Client | None = None
        self._out: list[Piece] = []
        self._out_of: Client | None = None  # whose bytes these are; None: the connecter's
        self._sending = Operation(Kind.SEND, owner=self._sent)
        self._receiving = Operation(Kind.RECEIVE, owner=self._received)
        self._stream: DirectStream | None = None  # once it is ready, if payload may be spliced
        self._lane: LanePort | None = None  # whom the socket is lent to
        self._is_unwanted = False  # to be left softly when it is back
        self._request_age, self._flush_age = LaneAge(), LaneAge()  # of the lane's
        self._outstanding: dict[int, Outstanding] = {}
        self._outstanding_bytes = 0
        self._unflushed_bytes = self._being_flushed_bytes = 0
        self._has_told_loss = False

    # -- opening: dialing.py comes before ------------------------------------------------------------------------------

    def _dialed(self) -> None:
        self._connecter = Connecter(Wishes(self._uri.export_name, hints=True), self.peer)

    def _negotiated(self, export: Export) -> None:
        self.description = describe(export, self.peer)
        self._timeouts = self._timeouts.hinted(export.hints)
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
        self._expect_flush(handle)

    def _expect_flush(self, handle: int) -> None:
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
        if self._descriptor is None or self.state is LinkState.CLOSED or self._lane is not None:
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
        if stream is None or self.state is LinkState.CLOSED or self._lane is not None:
            return False  # what happens while it is lent is the lane's to find
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
        elif self._lane is not None:
            self._tick_lane(self._lane)
        elif self.state is LinkState.READY and self._outstanding:
            oldest = min(self._outstanding.values(), key=lambda request: request.deadline)
            if now >= oldest.deadline:
                self._fail(TimedOut(self.peer, oldest.doing, oldest.seconds))

    def disconnect(self) -> None:
        """Leave softly: finish what is outstanding, send NBD_CMD_DISC, close; at once before READY. Idempotent."""
        if self.state is LinkState.LEAVING:
            return
        if self.state is not LinkState.READY or self._client is None:
            self.close()
            return
        self._deadline = self._now + DISCONNECT_SECONDS
        if self._lane is not None:
            self._is_unwanted = True
            self._lane.stop()
            return
        self.state = LinkState.LEAVING
        self.has_work = True
        self._client.disconnect()

    def close(self) -> None:
        """Shut the connection down at once; `closed` is true when the ring has let go of it. Idempotent."""
        if self.state is LinkState.CLOSED:
            return
        self.state = LinkState.CLOSED
        if self._descriptor is None:
            return
        if self._lane is not None:
            self._lane.stop()
            shut_down(self._descriptor)  # whatever the lane waits for is over; it still has the number
        else:
            self._ring.submit(Operation(Kind.CLOSE, self._descriptor, owner=self._closed))

    def _closed(self, _: Operation) -> None:
        self._descriptor = None

    def _fail(self, error: NbdshardError, *, softly: bool = False) -> None:
        if self.state is not LinkState.CLOSED:
            (self.disconnect if softly else self.close)()
            if not self._has_told_loss:
                self._has_told_loss = True
                self._on_lost(self, error)

    # -- lending.Lendable: somebody else moves the bytes ---------------------------------------------------------------

    def lend_source(self, lane: LanePort, request_bytes: int) -> LaneSource | None:
        lent = self._lend(lane)
        return SocketSource(*lent, request_bytes) if lent is not None else None

    def lend_target(self, lane: LanePort) -> LaneTarget | None:
        lent = self._lend(lane)
        return SocketTarget(*lent) if lent is not None else None

    def _lend(self, lane: LanePort) -> tuple[int, Quick] | None:
        """The socket, and what is said on it."""
        client, descriptor = self._client, self._descriptor
        if self.state is not LinkState.READY or client is None or descriptor is None or not client.at_rest:
            return None
        if self._stream is None:
            self.has_work = True
            self.pump(self._now)
        if self._stream is None or not self._stream.at_rest or self._is_unwanted:
            return None
        self._stream.pause()
        self._lane = lane
        return descriptor.number, quick(client.export)

    def _tick_lane(self, lane: LanePort) -> None:
        """As for our own requests, by what the lane has outstanding."""
        if self.state is not LinkState.READY:
            return
        if self._is_unwanted and self._now >= self._deadline:
            self.close()
            return
        is_source = self.side == "source"
        since, size = lane.oldest_read() if is_source else lane.oldest_write()
        seconds = self._timeouts.request + size / MIB * REQUEST_SECONDS_PER_MIB
        if self._request_age.seconds(since, self._now) >= seconds:
            self._fail(TimedOut(self.peer, "reading" if is_source else "writing", seconds))
            return
        seconds = FLUSH_SECONDS + self._unflushed_bytes / FLUSH_BYTES_PER_SECOND
        if not is_source and self._flush_age.seconds(lane.flush_sent or inf, self._now) >= seconds:
            self._fail(TimedOut(self.peer, "flushing", seconds))

    def adopt_read(self, handle: int, where: Range, into: Payload) -> None:
        self._running().adopt(handle, Command.READ, where, BufferSink(into) if isinstance(into, memoryview) else into)
        self._expect(handle, "reading", where.length)

    def adopt_write(self, handle: int, where: Range, *, is_zero: bool) -> None:
        self._running().adopt(handle, Command.WRITE_ZEROES if is_zero else Command.WRITE, where)
        self._expect(handle, "zeroing" if is_zero else "writing", where.length)

    def adopt_flush(self, handle: int) -> None:
        self._running().adopt(handle, Command.FLUSH, None)
        self._expect_flush(handle)

    def take_back(self, data: bytes, lost: int | None, reason: str = "") -> None:
        self._lane = None
        if self.state is LinkState.CLOSED:
            if self._descriptor is not None:
                self._ring.submit(Operation(Kind.CLOSE, self._descriptor, owner=self._closed))
            return
        client, stream = self._running(), self._stream
        assert stream is not None
        stream.resume()
        try:
            if reason:
                raise ConnectionLost(self.peer, "copying", reason)
            if lost:
                raise self._broken(-lost)
            if lost == 0:
                self._ended()
            else:
                self._dispatch(client.overhear(data))
        except NbdshardError as error:
            self._fail(error)
        if self._is_unwanted:
            self.disconnect()

    def lane_reads(self, where: Range) -> None:
        """A server needs no hints."""

    def lane_moved(self, where: Range) -> None:
        if self.side == "destination":
            self._unflushed_bytes += where.length

    def lane_flushes(self) -> None:
        self._being_flushed_bytes = self._unflushed_bytes

    def lane_flushed(self) -> None:
        self._unflushed_bytes -= self._being_flushed_bytes

    def refusal(self, error: int) -> RequestError:
        raise BugError(f"{self.peer} reports its errors itself ({error})")

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
            self._client.end_of_stream("copying")  # if not this connection, its lane, or another one
        elif self._connecter is not None:
            self._connecter.end_of_stream()

    def _broken(self, result: int) -> ConnectionLost:
        doing = "negotiating"
        if self._client is not None:
            pending = self._client.pending
            doing = f"waiting for {pending} {'reply' if pending == 1 else 'replies'}" if pending else "copying"
        return ConnectionLost(self.peer, doing, os.strerror(-result).lower())
