"""The receiving half of the client: from bytes to finished requests, whatever pieces the bytes come in.

One chunk walks HEADER -> HEADER (nothing but a header), HEADER -> PAYLOAD -> HEADER (data for a sink), or
HEADER -> BODY [-> SURPLUS] -> HEADER (what the machine reads itself). Chunks of different replies may follow one
another in any order; a chunk itself is never interrupted.

A payload is received straight into its sink. Only when it is known to come next does the target lead there; so a
target for headers is never longer than what must come before a payload can begin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import Struct
from typing import Final

from nbdshard.common.errors import BugError, RequestError
from nbdshard.common.limits import HEAD_BYTES_MAX
from nbdshard.common.nbd import wire
from nbdshard.common.nbd.commands import Pending
from nbdshard.common.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ReplyFlag,
    ReplyType,
    errno_name,
    reply_type_name,
)
from nbdshard.common.nbd.events import Arriving, Event
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.replies import ChunkKind, chunk_kind
from nbdshard.common.nbd.sinks import BufferSink, DrainSink, Sink
from nbdshard.common.nbd.states import RECEIVE_STATES, ReceiveState, advance
from nbdshard.common.nbd.wire import Malformed

_DATA: Final = ReplyType.OFFSET_DATA.value
_NONE: Final = ReplyType.NONE.value
_DONE: Final = ReplyFlag.DONE.value
_OFFSET_BYTES: Final = wire.OFFSET.size
_NOTHING: Final = memoryview(b"")

Fields = tuple[int, int, int, int]  # flags, type, cookie, length: what structured and extended headers share


class Receiver:
    """Reads replies. `find` gives the request a cookie belongs to (or raises Malformed), `finish` ends it."""

    def __init__(
        self,
        export: Export,
        chunks: Mapping[int, ChunkKind],
        find: Callable[[int], Pending],
        finish: Callable[[Pending, list[Event]], None],
    ) -> None:
        self.state = ReceiveState.HEADER
        self.left = 0  # bytes still to come for the current sink
        self.current: Pending | None = None  # whose chunk it is
        self._export = export
        self._chunks = chunks
        self._find = find
        self._finish = finish
        self._parsers = _parsers(export)
        self._head_exact = _head_exact(export)
        self._head = memoryview(bytearray(HEAD_BYTES_MAX))
        self._one_header = [self._head[: self._head_exact]]
        self._many_headers = [self._head]
        self._filled = 0
        self._last = False  # the current chunk is the last one of its reply
        self._drain = DrainSink()
        self.sink: Sink = self._drain
        self._body = _NOTHING
        self._body_kind: ChunkKind | None = None
        self._body_type = 0
        self._body_length = 0

    def target(self, *, payload_may_come: bool) -> list[memoryview]:
        """The rest of a payload, then a header; empty where a sink wants `left` bytes moved some other way."""
        left = self.left
        if not left:
            # While no READ is pending no payload can come, so many headers may be taken at once. A READ queued
            # after that may still get the first bytes of its payload here; they are handed on (`Sink.take`).
            if self._filled:
                return [self._head[self._filled : self._head_exact if payload_may_come else HEAD_BYTES_MAX]]
            return self._one_header if payload_may_come else self._many_headers
        target = self.sink.target()
        if len(target) < left:
            return [target] if target else []
        return [target, self._head[: self._head_exact]]

    def received(self, count: int, events: list[Event]) -> None:
        """`count` bytes have come into the last target. Raises Malformed where they break the protocol."""
        left = self.left
        if left:
            taken = count if count < left else left
            self.sink.advance(taken)
            self.left = left - taken
            if taken < left:
                return
            count -= taken
            self._sink_filled(events)
        self._filled += count
        if self._filled:
            self._parse(events)

    @property
    def at_rest(self) -> bool:
        """Between two replies."""
        return not self.left and not self._filled

    def overhear(self, data: bytes, events: list[Event]) -> None:
        """`data`, from the start of a reply on, has come somewhere else. Raises Malformed."""
        if self.left or self._filled or len(data) > len(self._head):
            raise BugError(f"overhearing {len(data)} bytes in the middle of a reply")
        self._head[: len(data)] = data
        self._filled = len(data)
        if data:
            self._parse(events)

    # -- headers ------------------------------------------------------------------------------------------------------

    def _parse(self, events: list[Event]) -> None:
        """Take every whole header out of the head buffer, and hand on payload that came behind one."""
        at, filled, head = 0, self._filled, self._head
        while True:
            if self.left:
                taken = min(self.left, filled - at)
                if not taken:
                    break
                self.sink.take(head[at : at + taken])
                at += taken
                self.left -= taken
                if not self.left:
                    self._sink_filled(events)
                continue
            if filled - at < wire.SIMPLE_REPLY.size:
                break
            (magic,) = wire.MAGIC.unpack_from(head, at)
            parser = self._parsers.get(magic)
            if parser is None:
                raise Malformed(f"magic number {magic:#x}, which starts no reply on this connection")
            used = parser(self, at, filled, events)
            if not used:
                break
            at += used
        rest = filled - at
        if at and rest:
            head[:rest] = bytes(head[at:filled])
        self._filled = rest

    def _simple(self, at: int, filled: int, events: list[Event]) -> int:
        """A simple reply: all of the answer, with the payload of a READ behind it."""
        del filled
        _, error, cookie = wire.SIMPLE_REPLY.unpack_from(self._head, at)
        request = self._current_request(cookie)
        entry = request.entry
        if self._export.structured and entry.receives_payload:
            raise Malformed("a simple reply with payload where structured replies were agreed on")
        if request.chunks:
            raise Malformed("a simple reply after structured chunks")
        self._last = True
        if error:
            request.fail(RequestError(errno_name(error), error))
        elif request.sink is not None:
            request.cover(request.start, request.length)
            self._begin_payload(request, request.sink, 0, request.length, events)
            return wire.SIMPLE_REPLY.size
        self._chunk_end(events)
        return wire.SIMPLE_REPLY.size

    def _structured(self, at: int, filled: int, events: list[Event]) -> int:
        if filled - at < wire.STRUCTURED_REPLY.size:
            return 0
        _, *fields = wire.STRUCTURED_REPLY.unpack_from(self._head, at)
        return self._chunk(at, filled, wire.STRUCTURED_REPLY, tuple(fields), events)

    def _extended(self, at: int, filled: int, events: list[Event]) -> int:
        if filled - at < wire.EXTENDED_REPLY.size:
            return 0
        _, flags, kind, cookie, offset, length = wire.EXTENDED_REPLY.unpack_from(self._head, at)
        start = self._current_request(cookie).start
        if offset != start:
            raise Malformed(f"a reply for offset {offset} to a request for offset {start}")
        return self._chunk(at, filled, wire.EXTENDED_REPLY, (flags, kind, cookie, length), events)

    def _chunk(self, at: int, filled: int, layout: Struct, fields: Fields, events: list[Event]) -> int:
        """One chunk header; returns the bytes of the head buffer it took, 0 where more are needed."""
        flags, kind, cookie, length = fields
        used = layout.size
        if kind == _DATA and filled - at < used + _OFFSET_BYTES:
            return 0
        request = self._current_request(cookie)
        request.count_chunk()
        self._last = bool(flags & _DONE)
        if kind != _DATA:
            self._begin_body(request, kind, length, events)
            return used
        self._check_content(request, kind)
        if length <= _OFFSET_BYTES:
            raise Malformed(f"{reply_type_name(kind)} of {length} bytes")
        length -= _OFFSET_BYTES
        (offset,) = wire.OFFSET.unpack_from(self._head, at + used)
        start = request.cover(offset, length)
        assert request.sink is not None  # the command's table entry allows data, so it was checked to have a sink
        self._begin_payload(request, request.sink, start, length, events)
        return used + _OFFSET_BYTES

    def _current_request(self, cookie: int) -> Pending:
        self.current = None  # what is wrong with the cookie is not the fault of the last request
        self.current = self._find(cookie)
        return self.current

    def _check_content(self, request: Pending, reply_type: int) -> None:
        if reply_type not in request.entry.content:
            raise Malformed(f"{reply_type_name(reply_type)}, which is no answer to it")

    # -- what follows a header ----------------------------------------------------------------------------------------

    def _begin_payload(self, request: Pending, sink: Sink, start: int, length: int, events: list[Event]) -> None:
        if request.contents == 1:
            events.append(Arriving(request.handle))
        sink.begin(start, length)
        self.sink = sink
        self.left = length
        self._go(ReceiveState.PAYLOAD)

    def _begin_body(self, request: Pending, reply_type: int, length: int, events: list[Event]) -> None:
        """A chunk the machine reads itself: the part that is kept goes into a buffer of just that size."""
        kind = chunk_kind(self._chunks, reply_type)
        if kind.content:
            self._check_content(request, reply_type)
        if kind.extended_only and not self._export.extended:
            raise Malformed(f"{reply_type_name(reply_type)} where extended headers were not agreed on")
        if reply_type == _NONE and not self._last:
            raise Malformed("NBD_REPLY_TYPE_NONE without NBD_REPLY_FLAG_DONE")
        kind.check_length(length)
        kept = min(length, kind.kept_max)
        if kept == 0:
            self._chunk_end(events)
            return
        self._body = memoryview(bytearray(kept))
        self._body_kind, self._body_type, self._body_length = kind, reply_type, length
        self.sink = BufferSink(self._body)
        self.sink.begin(0, kept)
        self.left = kept
        self._go(ReceiveState.BODY)

    def _sink_filled(self, events: list[Event]) -> None:
        """The bytes the current sink waited for are all there."""
        self.sink = self._drain  # lets go of the caller's buffer
        surplus = self._complete_body(events) if self.state is ReceiveState.BODY else 0
        if surplus:
            self.sink.begin(0, surplus)
            self.left = surplus
            self._go(ReceiveState.SURPLUS)
            return
        self._go(ReceiveState.HEADER)
        self._chunk_end(events)

    def _complete_body(self, events: list[Event]) -> int:
        """Handle a whole body; returns how many bytes of its chunk are still to come, and unwanted."""
        request, kind = self.current, self._body_kind
        assert request is not None
        assert kind is not None
        contents = request.contents
        kind.complete(request, self._body, self._body_type, self._body_length)
        if contents == 0 and request.contents:
            events.append(Arriving(request.handle))
        surplus = self._body_length - len(self._body)
        self._body, self._body_kind = _NOTHING, None
        return surplus

    def _chunk_end(self, events: list[Event]) -> None:
        request = self.current
        assert request is not None
        if self._last:
            self._finish(request, events)
        self.current = None

    def _go(self, state: ReceiveState) -> None:
        self.state = advance(RECEIVE_STATES, "receiver", self.state, state)


_Parser = Callable[[Receiver, int, int, list[Event]], int]


def _parsers(export: Export) -> Mapping[int, _Parser]:
    """Reply magic -> parser, as negotiated (spec: extended headers rule out the other two)."""
    if export.extended:
        return {EXTENDED_REPLY_MAGIC: Receiver._extended}
    if export.structured:
        return {STRUCTURED_REPLY_MAGIC: Receiver._structured, SIMPLE_REPLY_MAGIC: Receiver._simple}
    return {SIMPLE_REPLY_MAGIC: Receiver._simple}


def _head_exact(export: Export) -> int:
    """The bytes that always come before a payload can begin: header, and the offset of OFFSET_DATA.

    Whatever header is shorter than that is followed by the next header at once.
    """
    if export.extended:
        return wire.EXTENDED_REPLY.size + _OFFSET_BYTES
    if export.structured:
        return wire.STRUCTURED_REPLY.size + _OFFSET_BYTES
    return wire.SIMPLE_REPLY.size
