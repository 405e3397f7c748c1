"""The client: runs one connection in the transmission phase. Requests in, events out. Sans I/O.

The caller's duties:

- send what `data_to_send()` yields, in order, and report how far it got with `sent(count)`;
- keep ONE receive outstanding, into `receive_target()`, and report it with `received(count)`;
- leave buffers of queued requests alone until their `Done`, which never comes before their `Sent`.

`received` and `sent` raise ProtocolError when the server breaks the protocol: the machine is FAILED then, and
everything pending is lost with it, events of the same call included. Methods that queue raise BugError on
misuse and change nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import Final, NoReturn

from nbdshard.common.errors import ConnectionLost, IllegalEvent, ProtocolError, RequestError
from nbdshard.common.limits import HEAD_BYTES_MAX
from nbdshard.common.nbd import wire
from nbdshard.common.nbd.commands import COMMANDS, CommandTable, Pending
from nbdshard.common.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    Errno,
    ReplyFlag,
    ReplyType,
    errno_name,
)
from nbdshard.common.nbd.events import Arriving, Done, Event, Sent
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.extents import ExtentCollector
from nbdshard.common.nbd.replies import CHUNKS, ChunkKind, chunk_kind
from nbdshard.common.nbd.requests import check_request, request_header
from nbdshard.common.nbd.sinks import BufferSink, DrainSink, Sink
from nbdshard.common.nbd.states import (
    CLIENT_STATES,
    RECEIVE_STATES,
    ClientState,
    ReceiveState,
    advance,
)
from nbdshard.common.nbd.wire import Malformed
from nbdshard.common.ranges import Range

__all__ = ["Arriving", "Client", "Done", "Event", "Sent"]

_Receive = ReceiveState
_LIVE: Final = frozenset({ClientState.RUNNING, ClientState.DISCONNECTING})
_DATA: Final = ReplyType.OFFSET_DATA.value
_DONE: Final = ReplyFlag.DONE.value
_PREFIX: Final = wire.OFFSET.size


class Client:
    """Requests and replies on one connection to `export` of `peer`, with handles 0 to `handles` - 1."""

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
        self.receiving = _Receive.HEADER
        self.pending = 0  # requests queued or under way, until their Done
        self.shutdown_seen = False  # an ESHUTDOWN has come: disconnect softly, and come back later
        self._commands = commands
        self._chunks = chunks
        self._requests: list[Pending | None] = [None] * handles
        # sending: positions count the bytes of the whole stream
        self._headers = bytearray()  # requests without payload queue here, so that they leave together
        self._out: list[memoryview | bytes] = []
        self._queued = 0
        self._handed = 0
        self._sent = 0
        self._unsent: deque[Pending] = deque()
        # receiving
        self._head = bytearray(HEAD_BYTES_MAX)  # the current header, or the beginning of it
        self._head_view = memoryview(self._head)
        self._filled = 0
        self._reads = 0  # requests whose replies carry payload for a sink
        self._offered = 0
        self._left = 0  # bytes still to come for `_sink`
        self._sink: Sink = DrainSink()
        self._drain = self._sink
        self._current: Pending | None = None  # whose chunk is being received
        self._last = False  # ... and whether it is the last one of its reply
        self._body = memoryview(b"")
        self._body_kind: ChunkKind | None = None
        self._body_type = 0
        self._body_length = 0
        self._parsers = _parsers(export)
        self._head_exact = _head_exact(export)

    # -- queueing ----------------------------------------------------------------------------------------------

    def read(self, handle: int, where: Range, buffer: memoryview, *, dont_fragment: bool = False) -> None:
        """Read `where` into `buffer`, which is as long."""
        flags = CommandFlag.DF if dont_fragment else 0
        self.submit(handle, Command.READ, where, flags=flags, sink=BufferSink(buffer))

    def write(self, handle: int, where: Range, payload: Sequence[memoryview | bytes], *, fua: bool = False) -> None:
        """Write `payload`, together as long as `where`."""
        self.submit(handle, Command.WRITE, where, flags=CommandFlag.FUA if fua else 0, payload=payload)

    def write_zeroes(
        self, handle: int, where: Range, *, no_hole: bool = False, fua: bool = False, fast_zero: bool = False
    ) -> None:
        """Make `where` read as zeroes. `fast_zero`: fail with ENOTSUP rather than be slower than it must."""
        flags = CommandFlag.NO_HOLE if no_hole else 0
        flags |= CommandFlag.FUA if fua else 0
        flags |= CommandFlag.FAST_ZERO if fast_zero else 0
        self.submit(handle, Command.WRITE_ZEROES, where, flags=flags)

    def trim(self, handle: int, where: Range, *, fua: bool = False) -> None:
        """Tell that the contents of `where` are not needed any more; what it reads as is undefined then."""
        self.submit(handle, Command.TRIM, where, flags=CommandFlag.FUA if fua else 0)

    def cache(self, handle: int, where: Range) -> None:
        """Tell that `where` will be read soon."""
        self.submit(handle, Command.CACHE, where)

    def flush(self, handle: int) -> None:
        """Make everything durable that was `Done` before this was queued."""
        self.submit(handle, Command.FLUSH, None)

    def block_status(self, handle: int, where: Range, *, one: bool = False) -> None:
        """Ask for the extents of `where` from its start on; the answer may be short. `one`: only the first."""
        self.submit(handle, Command.BLOCK_STATUS, where, flags=CommandFlag.REQ_ONE if one else 0)

    def submit(
        self,
        handle: int,
        command: int,
        where: Range | None,
        *,
        flags: int = 0,
        payload: Sequence[memoryview | bytes] = (),
        sink: Sink | None = None,
    ) -> None:
        """Queue a request of any command in the table; the methods above are its shorthands.

        Raises BugError where the handle is taken, the export does not allow it, or the sizes do not fit.
        """
        if self.state is not ClientState.RUNNING:
            self._illegal("a request")
        entry = check_request(self.export, self._commands, command, where, flags, payload, sink)
        self._check_handle(handle)
        start, length = (where.start, where.length) if where is not None else (0, 0)
        request = Pending(handle, entry, start, length, flags)
        request.sink = sink
        if entry.queries_contexts:
            request.extents = ExtentCollector(start, start + length, self.export.contexts)
        if sink is not None:
            self._reads += 1
        request.begins = self._queued
        self._headers += request_header(self.export, entry, handle, flags, start, length)
        if payload:
            self._out.append(bytes(self._headers))
            self._headers.clear()
            self._out.extend(payload)
        size = wire.EXTENDED_REQUEST.size if self.export.extended else wire.REQUEST.size
        self._queued += size + (length if payload else 0)
        request.ends = self._queued
        self._unsent.append(request)
        self._requests[handle] = request
        self.pending += 1

    def disconnect(self) -> None:
        """Queue NBD_CMD_DISC behind everything else: the server answers what it has, then closes."""
        self._go(ClientState.DISCONNECTING)
        request = wire.Request(0, Command.DISC, 0, 0, 0)
        header = wire.pack_request(request, extended=self.export.extended)
        self._headers += header
        self._queued += len(header)

    def pending_handles(self) -> list[int]:
        """Handles without a `Done` so far, in any state."""
        return [handle for handle, request in enumerate(self._requests) if request is not None]

    # -- sending -----------------------------------------------------------------------------------------------

    def data_to_send(self) -> list[memoryview | bytes]:
        """What is queued and not handed out yet, in order; header and payload of a WRITE are neighbours."""
        if self._headers:
            self._out.append(bytes(self._headers))
            self._headers.clear()
        out, self._out = self._out, []
        self._handed = self._queued
        return out

    def sent(self, count: int) -> list[Event]:
        """`count` more of the bytes handed out have left."""
        if self.state not in _LIVE:
            self._illegal("sent")
        if not 0 < count <= self._handed - self._sent:
            self._illegal(f"{count} bytes sent of {self._handed - self._sent} handed out")
        self._sent += count
        events: list[Event] = []
        unsent = self._unsent
        while unsent and unsent[0].ends <= self._sent:
            request = unsent.popleft()
            events.append(Sent(request.handle))
            if request.finished:
                self._release(request, events)
        return events

    # -- receiving ---------------------------------------------------------------------------------------------

    @property
    def payload_left(self) -> int:
        """Bytes of the current payload still to come: what a sink without a target may splice."""
        return self._left

    def receive_target(self) -> list[memoryview]:
        """Where the next bytes go: the rest of a payload, then a reply header, which may be left out."""
        if self.state not in _LIVE:
            self._illegal("receive_target")
        left = self._left
        if not left:
            # While no READ is pending no payload can come, so many headers may be taken at once. A READ queued
            # after that may still get the first bytes of its payload here; they are handed on (`Sink.take`).
            head = self._head_view[self._filled : self._head_exact if self._reads else HEAD_BYTES_MAX]
            self._offered = len(head)
            return [head]
        target = self._sink.target()
        if len(target) < left:
            self._offered = len(target) or left
            return [target] if len(target) else []
        self._offered = left + self._head_exact
        return [target, self._head_view[: self._head_exact]]

    def received(self, count: int) -> list[Event]:
        """`count` bytes have come into the last `receive_target()`, in order."""
        if self.state not in _LIVE:
            self._illegal("received")
        if not 0 < count <= self._offered:
            self._illegal(f"{count} bytes received of {self._offered} offered")
        self._offered = 0
        events: list[Event] = []
        try:
            left = self._left
            if left:
                taken = count if count < left else left
                self._sink.advance(taken)
                self._left = left - taken
                if taken < left:
                    return events
                count -= taken
                self._payload_end(events)
            self._filled += count
            if self._filled:
                self._parse(events)
        except Malformed as error:
            self._blame(str(error))
        return events

    def end_of_stream(self) -> list[int]:
        """The server closed the connection: [] if that was asked for and nothing is pending.

        Raises ConnectionLost otherwise; `pending_handles()` tells whose requests died with it.
        """
        if self.state not in _LIVE:
            self._illegal("end_of_stream")
        asked = self.state is ClientState.DISCONNECTING
        self._go(ClientState.CLOSED)
        if asked and not self.pending:
            return []
        doing = f"waiting for {self.pending} replies" if self.pending else "idle"
        raise ConnectionLost(self.peer, doing, "the server closed the connection")

    # -- replies -----------------------------------------------------------------------------------------------

    def _parse(self, events: list[Event]) -> None:
        """Take every whole reply header out of the head buffer, and hand on payload that came behind one."""
        at, filled, view = 0, self._filled, self._head_view
        while filled - at >= wire.SIMPLE_REPLY.size:
            (magic,) = wire.MAGIC.unpack_from(view, at)
            parser = self._parsers.get(magic)
            if parser is None:
                raise Malformed(f"magic number {magic:#x}, which starts no reply on this connection")
            used = parser(self, at, filled, events)
            if not used:
                break
            at += used
            left = self._left
            if left and at < filled:
                taken = min(left, filled - at)
                self._sink.take(view[at : at + taken])
                at += taken
                self._left = left - taken
                if taken == left:
                    self._payload_end(events)
        rest = filled - at
        if at and rest:
            view[:rest] = bytes(view[at:filled])
        self._filled = rest

    def _simple(self, at: int, filled: int, events: list[Event]) -> int:
        del filled
        _, error, cookie = wire.SIMPLE_REPLY.unpack_from(self._head, at)
        request = self._find(cookie)
        entry = request.entry
        if self.export.structured and entry.receives_payload:
            raise Malformed(f"a simple reply to {entry.name} where structured replies were agreed on")
        if request.chunks:
            raise Malformed(f"a simple reply to {entry.name} after structured chunks")
        if error:
            request.error = RequestError(errno_name(error), error)
        elif request.sink is not None:
            request.covered = request.length
            self._begin_payload(request, 0, request.length, last=True, events=events)
            return wire.SIMPLE_REPLY.size
        self._finish(request, events)
        return wire.SIMPLE_REPLY.size

    def _structured(self, at: int, filled: int, events: list[Event]) -> int:
        if filled - at < wire.STRUCTURED_REPLY.size:
            return 0
        _, flags, kind, cookie, length = wire.STRUCTURED_REPLY.unpack_from(self._head, at)
        return self._chunk(at, filled, wire.STRUCTURED_REPLY, (flags, kind, cookie, length), events)

    def _extended(self, at: int, filled: int, events: list[Event]) -> int:
        if filled - at < wire.EXTENDED_REPLY.size:
            return 0
        _, flags, kind, cookie, offset, length = wire.EXTENDED_REPLY.unpack_from(self._head, at)
        start = self._find(cookie).start
        if offset != start:
            raise Malformed(f"a reply for offset {offset} to a request for offset {start}")
        return self._chunk(at, filled, wire.EXTENDED_REPLY, (flags, kind, cookie, length), events)

    def _chunk(
        self, at: int, filled: int, layout: Struct, fields: tuple[int, int, int, int], events: list[Event]
    ) -> int:
        """One chunk header; returns the bytes of the head buffer it took, 0 where more are needed."""
        flags, kind, cookie, length = fields
        used = layout.size
        if kind == _DATA and filled - at < used + _PREFIX:
            return 0
        request = self._find(cookie)
        request.count_chunk()
        last = bool(flags & _DONE)
        if kind == _DATA:
            if length <= _PREFIX:
                raise Malformed(f"NBD_REPLY_TYPE_OFFSET_DATA of {length} bytes")
            self._check_content(request, kind)
            (offset,) = wire.OFFSET.unpack_from(self._head, at + used)
            start = request.cover(offset, length - _PREFIX)
            self._begin_payload(request, start, length - _PREFIX, last=last, events=events)
            return used + _PREFIX
        self._begin_body(request, kind, length, last=last, events=events)
        return used

    def _begin_payload(self, request: Pending, start: int, length: int, *, last: bool, events: list[Event]) -> None:
        assert request.sink is not None  # check_request: what receives payload has a sink
        if request.contents <= 1:
            events.append(Arriving(request.handle))
        self._sink = request.sink
        self._sink.begin(start, length)
        self._left = length
        self._current, self._last = request, last
        self._receive(_Receive.PAYLOAD)

    def _begin_body(self, request: Pending, reply_type: int, length: int, *, last: bool, events: list[Event]) -> None:
        """A chunk the machine reads itself: the part that is kept goes into a buffer of just that size."""
        kind = chunk_kind(self._chunks, reply_type)
        if kind.complete is not _ERROR_COMPLETE and reply_type != ReplyType.NONE:
            self._check_content(request, reply_type)
        if reply_type == ReplyType.NONE and not last:
            raise Malformed("NBD_REPLY_TYPE_NONE without NBD_REPLY_FLAG_DONE")
        if kind.extended_only and not self.export.extended:
            raise Malformed(f"chunk type {reply_type} where extended headers were not agreed on")
        kind.check_length(length)
        self._current, self._last = request, last
        self._body_kind, self._body_type, self._body_length = kind, reply_type, length
        kept = min(length, kind.kept_max)
        if kept == 0:
            self._chunk_end(events)
            return
        self._body = memoryview(bytearray(kept))
        self._sink = BufferSink(self._body)
        self._sink.begin(0, kept)
        self._left = kept
        self._receive(_Receive.BODY)

    def _check_content(self, request: Pending, reply_type: int) -> None:
        if reply_type not in request.entry.content:
            raise Malformed(f"a chunk of type {reply_type} in a reply to {request.entry.name}")

    def _payload_end(self, events: list[Event]) -> None:
        """The bytes the current sink waited for are all there."""
        request, kind = self._current, self._body_kind
        assert request is not None
        if self.receiving is _Receive.BODY:
            assert kind is not None
            contents = request.contents
            kind.complete(request, self._body, self._body_type, self._body_length)
            if request.contents > contents == 0:
                events.append(Arriving(request.handle))
            surplus = self._body_length - len(self._body)
            self._body = memoryview(b"")
            if surplus:
                self._sink = self._drain
                self._sink.begin(0, surplus)
                self._left = surplus
                self._receive(_Receive.SURPLUS)
                return
        self._receive(_Receive.HEADER)
        self._chunk_end(events)

    def _chunk_end(self, events: list[Event]) -> None:
        request, self._current = self._current, None
        assert request is not None
        if request.error is not None and request.error.errno_value == Errno.ESHUTDOWN:
            self.shutdown_seen = True
        if self._last:
            self._finish(request, events)

    def _finish(self, request: Pending, events: list[Event]) -> None:
        """The reply is complete; `Done` is told now, or together with `Sent`."""
        if request.error is None:
            missing = request.entry.missing(request)
            if missing:
                raise Malformed(f"{request.entry.name}: {missing}")
        elif request.error.errno_value == Errno.ESHUTDOWN:
            self.shutdown_seen = True
        request.finished = True
        if request.sink is not None:
            self._reads -= 1
        # A reply may overtake the report that the request was sent: completions come in any order.
        if request.ends <= self._sent:
            self._release(request, events)

    def _release(self, request: Pending, events: list[Event]) -> None:
        self._requests[request.handle] = None
        self.pending -= 1
        extents = request.extents.extents if request.extents is not None and request.error is None else None
        events.append(Done(request.handle, request.error, extents))

    def _find(self, cookie: int) -> Pending:
        request = self._requests[cookie] if cookie < len(self._requests) else None
        if request is None or request.begins >= self._handed:
            raise Malformed(f"a reply with cookie {cookie}, which no pending request has")
        if request.finished:
            raise Malformed(f"a second reply to {request.entry.name} with cookie {cookie}")
        return request

    # -- states ------------------------------------------------------------------------------------------------

    def _receive(self, state: ReceiveState) -> None:
        self.receiving = advance(RECEIVE_STATES, "client", self.receiving, state)

    def _go(self, state: ClientState) -> None:
        self.state = advance(CLIENT_STATES, "client", self.state, state)

    def _illegal(self, event: str) -> NoReturn:
        raise IllegalEvent("client", self.state.name, event, f"{self.peer}, {self.pending} requests pending")

    def _check_handle(self, handle: int) -> None:
        if not 0 <= handle < len(self._requests):
            self._illegal(f"a request with handle {handle} of {len(self._requests)}")
        if self._requests[handle] is not None:
            self._illegal(f"a request with handle {handle}, which is taken")

    def _blame(self, what: str) -> NoReturn:
        stage = "a reply"
        if self._current is not None:
            stage = f"the reply to {self._current.entry.name} with handle {self._current.handle}"
        self._go(ClientState.FAILED)
        raise ProtocolError(self.peer, stage, what)


_ERROR_COMPLETE: Final = CHUNKS[ReplyType.ERROR].complete
_Parser = Callable[[Client, int, int, list[Event]], int]


def _parsers(export: Export) -> Mapping[int, _Parser]:
    """Reply magic -> parser, as negotiated (spec: extended headers rule out the other two)."""
    if export.extended:
        return {EXTENDED_REPLY_MAGIC: Client._extended}
    if export.structured:
        return {STRUCTURED_REPLY_MAGIC: Client._structured, SIMPLE_REPLY_MAGIC: Client._simple}
    return {SIMPLE_REPLY_MAGIC: Client._simple}


def _head_exact(export: Export) -> int:
    """The most bytes to take before a payload can begin: header, and the offset of OFFSET_DATA."""
    if export.extended:
        return wire.EXTENDED_REPLY.size + _PREFIX
    if export.structured:
        return wire.STRUCTURED_REPLY.size + _PREFIX
    return wire.SIMPLE_REPLY.size
