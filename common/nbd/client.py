"""The client: runs one connection in the transmission phase. Requests in, events out. Sans I/O.

The caller's duties:

- send what `data_to_send()` yields, in order, and report how far it got with `sent(count)`;
- keep ONE receive outstanding, into `receive_target()`, and report it with `received(count)`;
- leave buffers of queued requests alone until their `Done`, which never comes before their `Sent`.

`received` raises ProtocolError when the server breaks the protocol: the machine is FAILED then, and everything
pending is lost with it, events of the same call included. Misuse raises BugError and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from nbdshard.common.errors import ConnectionLost, IllegalEvent, ProtocolError
from nbdshard.common.nbd.commands import COMMANDS, CommandTable, Pending
from nbdshard.common.nbd.constants import Command, CommandFlag
from nbdshard.common.nbd.events import Arriving, Done, Event, Sent
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.extents import ExtentCollector
from nbdshard.common.nbd.payload import Piece, as_bytes
from nbdshard.common.nbd.receiver import Receiver
from nbdshard.common.nbd.replies import CHUNKS, ChunkKind
from nbdshard.common.nbd.requests import RequestRules
from nbdshard.common.nbd.sinks import BufferSink, Sink
from nbdshard.common.nbd.states import CLIENT_STATES, ClientState, advance
from nbdshard.common.nbd.wire import Malformed, Request, pack_request
from nbdshard.common.ranges import Range

__all__ = ["Arriving", "Client", "Done", "Event", "Sent"]

_LIVE: Final = (ClientState.RUNNING, ClientState.DISCONNECTING)
_FUA: Final = CommandFlag.FUA.value
_NO_HOLE: Final = CommandFlag.NO_HOLE.value
_DF: Final = CommandFlag.DF.value
_REQ_ONE: Final = CommandFlag.REQ_ONE.value
_BEFORE_US: Final = -1  # in front of all that the client has sent itself
_FAST_ZERO: Final = CommandFlag.FAST_ZERO.value


class Client:
    """Requests and replies on one connection to `export` of `peer`, with handles 0 to `handles` - 1.

    The handle is the caller's choice and is the NBD cookie; it is free again when its `Done` was reported.
    """

    def __init__(
        self,
        export: Export,
        peer: str,
        handles: int,
        *,
        commands: CommandTable = COMMANDS,
        chunks: Mapping[int, ChunkKind] = CHUNKS,
    ) -> None:
        self.export = export
        self.peer = peer
        self.state = ClientState.RUNNING
        self.pending = 0  # requests queued or under way, until their Done
        self.shutdown_seen = False  # an ESHUTDOWN has come: disconnect softly, and come back later
        self._rules = RequestRules(export, commands)
        self._requests: list[Pending | None] = [None] * handles
        # Sending: positions count the bytes of the whole stream.
        self._headers = bytearray()  # requests without payload queue here, so that they leave together
        self._out: list[Piece] = []
        self._queued = 0
        self._handed = 0
        self._sent = 0
        self._unsent: deque[Pending] = deque()
        # Receiving.
        self._receiver = Receiver(export, chunks, self._find, self._finish)
        self._sinks = 0  # pending requests with a sink: payload may come
        self._offered = 0

    # -- queueing -----------------------------------------------------------------------------------------------------

    def read(self, handle: int, where: Range, into: memoryview | Sink, *, dont_fragment: bool = False) -> None:
        """Read `where` into a buffer that is as long, or into a sink."""
        sink = BufferSink(into) if isinstance(into, memoryview) else into
        self.submit(handle, Command.READ, where, flags=_DF if dont_fragment else 0, sink=sink)

    def write(self, handle: int, where: Range, payload: Sequence[Piece], *, fua: bool = False) -> None:
        """Write `payload`, its pieces together as long as `where`."""
        self.submit(handle, Command.WRITE, where, flags=_FUA if fua else 0, payload=payload)

    def write_zeroes(
        self, handle: int, where: Range, *, no_hole: bool = False, fua: bool = False, fast_zero: bool = False
    ) -> None:
        """Make `where` read as zeroes. `fast_zero`: fail with ENOTSUP rather than be as slow as a WRITE."""
        flags = (_NO_HOLE if no_hole else 0) | (_FUA if fua else 0) | (_FAST_ZERO if fast_zero else 0)
        self.submit(handle, Command.WRITE_ZEROES, where, flags=flags)

    def trim(self, handle: int, where: Range, *, fua: bool = False) -> None:
        """Tell that the contents of `where` are not needed any more; what it reads as is undefined then."""
        self.submit(handle, Command.TRIM, where, flags=_FUA if fua else 0)

    def cache(self, handle: int, where: Range) -> None:
        """Tell that `where` will be read soon."""
        self.submit(handle, Command.CACHE, where)

    def flush(self, handle: int) -> None:
        """Make everything durable that was `Done` before this was queued."""
        self.submit(handle, Command.FLUSH, None)

    def block_status(self, handle: int, where: Range, *, one: bool = False) -> None:
        """Ask for the extents of `where` from its start on; the answer may be short. `one`: only the first."""
        self.submit(handle, Command.BLOCK_STATUS, where, flags=_REQ_ONE if one else 0)

    def submit(
        self,
        handle: int,
        command: int,
        where: Range | None,
        *,
        flags: int = 0,
        payload: Sequence[Piece] = (),
        sink: Sink | None = None,
    ) -> None:
        """Queue a request of any command in the table; the methods above are its shorthands.

        Raises BugError where the handle is taken, the export does not allow it, or the sizes do not fit.
        """
        if self.state is not ClientState.RUNNING:
            self._illegal(f"request {command}")
        pieces = [as_bytes(piece) for piece in payload]
        entry = self._rules.check(command, where, flags, pieces, sink)
        if not 0 <= handle < len(self._requests):
            self._illegal(f"a request with handle {handle} of {len(self._requests)}")
        if self._requests[handle] is not None:
            self._illegal(f"a request with handle {handle}, which is taken")
        start, length = (where.start, where.end - where.start) if where is not None else (0, 0)
        request = Pending(handle, entry, start, length, flags)
        request.begins = self._queued
        if sink is not None:
            request.sink = sink
            self._sinks += 1
        if entry.queries_contexts:
            request.extents = ExtentCollector(start, start + length, self.export.contexts)
        self._headers += self._rules.header(entry, handle, flags, start, length)
        self._queued += self._rules.header_bytes
        if pieces:
            self._cut_headers()
            self._out += pieces
            self._queued += length
        request.ends = self._queued
        self._unsent.append(request)
        self._requests[handle] = request
        self.pending += 1

    def adopt(self, handle: int, command: int, where: Range | None, sink: Sink | None = None) -> None:
        """Take over a request that somebody else has sent whole on this connection, and that is not answered.

        Raises BugError where the handle is taken, or is none of ours.
        """
        entry = self._rules.entry(command)
        is_free = 0 <= handle < len(self._requests) and self._requests[handle] is None
        if self.state is not ClientState.RUNNING or not is_free:
            self._illegal(f"adopting a request with handle {handle}")
        start, length = (where.start, where.end - where.start) if where is not None else (0, 0)
        request = Pending(handle, entry, start, length, 0)
        request.begins = request.ends = _BEFORE_US
        request.sink = sink
        self._sinks += sink is not None
        self._requests[handle] = request
        self.pending += 1

    @property
    def at_rest(self) -> bool:
        """Nothing is asked, nothing is to be sent, and no part of a reply has come: somebody else may take over."""
        return not self.pending and self._sent == self._queued and self._receiver.at_rest

    def overhear(self, data: bytes) -> list[Event]:
        """`data` came on this connection while somebody else received: what `received` would have made of it.

        No more than HEAD_BYTES_MAX bytes, from the start of a reply on, while nothing was received here. Raises
        ProtocolError.
        """
        if self.state not in _LIVE:
            self._illegal("overhear")
        events: list[Event] = []
        try:
            self._receiver.overhear(data, events)
        except Malformed as error:
            self._blame(str(error))
        self._offered = 0  # what was offered before led elsewhere
        return events

    def disconnect(self) -> None:
        """Queue NBD_CMD_DISC behind everything else: the server answers what it has, then closes."""
        self._go(ClientState.DISCONNECTING)
        header = pack_request(Request(0, Command.DISC, 0, 0, 0), extended=self.export.extended)
        self._headers += header
        self._queued += len(header)

    def pending_handles(self) -> list[int]:
        """Handles without a `Done` so far, in any state."""
        return [handle for handle, request in enumerate(self._requests) if request is not None]

    # -- sending ------------------------------------------------------------------------------------------------------

    @property
    def has_data_to_send(self) -> bool:
        """Something is queued that `data_to_send` has not handed out."""
        return self._handed < self._queued

    def data_to_send(self) -> list[Piece]:
        """What is queued and not handed out yet, in order; header and payload of a WRITE are neighbours.

        A piece that is `Elsewhere` is for the caller to move.
        """
        if self.state not in _LIVE:
            return []
        if self._handed == self._queued:
            return []
        self._cut_headers()
        out, self._out = self._out, []
        self._handed = self._queued
        return out

    def sent(self, count: int) -> list[Event]:
        """`count` more of the bytes handed out have left. Events: Sent, and Done where the reply was faster."""
        if self.state not in _LIVE:
            self._illegal("sent")
        if not 0 < count <= self._handed - self._sent:
            self._illegal(f"{count} bytes sent of {self._handed - self._sent} handed out")
        self._sent += count
        events: list[Event] = []
        while self._unsent and self._unsent[0].ends <= self._sent:
            request = self._unsent.popleft()
            events.append(Sent(request.handle))
            if request.finished:
                self._release(request, events)
        return events

    def _cut_headers(self) -> None:
        if self._headers:
            self._out.append(bytes(self._headers))
            self._headers.clear()

    # -- receiving ----------------------------------------------------------------------------------------------------

    @property
    def payload_left(self) -> int:
        """Bytes of the current payload still to come: what a sink without a target may splice."""
        return self._receiver.left

    @property
    def payload_sink(self) -> Sink:
        """Where the current payload goes, while there is some left."""
        return self._receiver.sink

    def receive_target(self) -> list[memoryview]:
        """Where the next bytes go: the rest of a payload, then a reply header; any part of it may be received.

        The list is the client's own.
        Empty while a sink wants its payload moved some other way: then `received` is told of up to
        `payload_left` bytes that were.
        """
        if self.state not in _LIVE:
            self._illegal("receive_target")
        target = self._receiver.target(payload_may_come=self._sinks > 0)
        if target:
            self._offered = len(target[0]) if len(target) == 1 else sum(map(len, target))
        else:
            self._offered = self._receiver.left
        return target

    def received(self, count: int) -> list[Event]:
        """`count` bytes have come into the last `receive_target()`, from its start on."""
        if self.state not in _LIVE:
            self._illegal("received")
        if not 0 < count <= self._offered:
            self._illegal(f"{count} bytes received of {self._offered} offered")
        self._offered = 0
        events: list[Event] = []
        try:
            self._receiver.received(count, events)
        except Malformed as error:
            self._blame(str(error))
        return events

    def end_of_stream(self, doing: str = "idle") -> list[int]:
        """The server closed the connection: [] if that was asked for and nothing is pending.

        `doing`: what nothing pending means here, for the error.

        Raises ConnectionLost otherwise; `pending_handles()` tells whose requests died with it.
        """
        if self.state not in _LIVE:
            self._illegal("end_of_stream")
        asked = self.state is ClientState.DISCONNECTING
        self._go(ClientState.CLOSED)
        if asked and not self.pending:
            return []
        if self.pending:
            doing = f"waiting for {self.pending} {'reply' if self.pending == 1 else 'replies'}"
        raise ConnectionLost(self.peer, doing, "the server closed the connection")

    # -- requests -----------------------------------------------------------------------------------------------------

    def _find(self, cookie: int) -> Pending:
        request = self._requests[cookie] if cookie < len(self._requests) else None
        if request is None or request.begins >= self._handed:
            raise Malformed(f"a reply with cookie {cookie}, which no pending request has")
        if request.finished:
            raise Malformed(f"a second reply to {request.entry.name} with cookie {cookie}")
        return request

    def _finish(self, request: Pending, events: list[Event]) -> None:
        """The reply is complete; `Done` is told now, or together with `Sent`."""
        if request.error is None:
            missing = request.entry.missing(request)
            if missing:
                raise Malformed(missing)
        if request.shutdown:
            self.shutdown_seen = True
        request.finished = True
        if request.sink is not None:
            self._sinks -= 1
        # A reply may overtake the report that its request was sent: completions come in any order.
        if request.ends <= self._sent:
            self._release(request, events)

    def _release(self, request: Pending, events: list[Event]) -> None:
        self._requests[request.handle] = None
        self.pending -= 1
        extents = request.extents.extents if request.extents is not None and request.error is None else None
        events.append(Done(request.handle, request.error, extents))

    # -- states -------------------------------------------------------------------------------------------------------

    def _go(self, state: ClientState) -> None:
        self.state = advance(CLIENT_STATES, "client", self.state, state)

    def _illegal(self, event: str) -> NoReturn:
        raise IllegalEvent("client", self.state.name, event, f"{self.peer}, {self.pending} requests pending")

    def _blame(self, what: str) -> NoReturn:
        request = self._receiver.current
        stage = "a reply"
        if request is not None:
            where = f" of [{request.start}, {request.start + request.length})" if request.entry.ranged else ""
            stage = f"the reply to {request.entry.name}{where}"
        self._go(ClientState.FAILED)
        raise ProtocolError(self.peer, stage, what)
