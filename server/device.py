"""The device: serves one connection in the transmission phase. Bytes in, requests out, answers in, bytes out. Sans I/O.

The client's twin. The caller's duties:

- keep ONE receive outstanding, into `receive_target()`, and report it with `received(count)`; while the target is empty
  nothing is wanted: too much is under way, or the connection ends;
- answer each request that `received` returns, once, in any order, with `done`, `failed`, `content` or `extents`;
- send what `data_to_send()` yields, in order, and report how far it got with `sent(count)`; leave buffers of answers
  alone until then;
- payload of the request `incoming` may be moved without the machine, `incoming_left` bytes of it, and told to
  `moved(count)`. Its `payload` is what came along with its header, then; `receive_target()` makes room for all of it;
- close the connection when `finished`.

What the export does not allow is answered here, and never handed out. `received` raises ProtocolError when the client
breaks the protocol: the machine is FAILED then, and what is under way is answered into the void.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import msgspec

from nbdshard.common.errors import BugError, ConnectionLost, IllegalEvent, ProtocolError
from nbdshard.common.limits import (
    ERROR_MESSAGE_BYTES_MAX,
    EXTENTS_TOLD_MAX,
    HEAD_BYTES_MAX,
    SERVED_BYTES_MAX,
    SERVED_PAYLOAD_SKIPPED_MAX,
    SERVED_REQUESTS_MAX,
    SPLICE_BYTES_MIN,
)
from nbdshard.common.nbd import wire
from nbdshard.common.nbd.commands import COMMANDS, CommandTable
from nbdshard.common.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    Errno,
    ReplyFlag,
    ReplyType,
)
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.nbd.payload import Piece, as_bytes
from nbdshard.common.nbd.states import advance
from nbdshard.server.serving import Request, ServingRules
from nbdshard.server.states import DEVICE_STATES, DeviceState

_DF: Final = CommandFlag.DF.value
_REQ_ONE: Final = CommandFlag.REQ_ONE.value
_DONE: Final = ReplyFlag.DONE.value
_NOTHING: Final = memoryview(b"")
_ZEROES: Final = bytes(1 << 16)


class Hole(msgspec.Struct, frozen=True):
    """A part of what is read that is zeroes, `length` bytes of them."""

    length: int


class Device:
    """Serves `export` to `client` (its printable name, for errors)."""

    def __init__(
        self,
        export: Export,
        client: str,
        *,
        commands: CommandTable = COMMANDS,
        requests_max: int = SERVED_REQUESTS_MAX,
        bytes_max: int = SERVED_BYTES_MAX,
    ) -> None:
        """`requests_max`, `bytes_max`: with so much under way no more is taken; one request of any size always is."""
        self.export = export
        self.client = client
        self.state = DeviceState.RUNNING
        self.under_way = 0  # requests that were handed out, or whose payload comes, and that are not answered yet
        self._rules = ServingRules(export, commands)
        self._requests_max, self._bytes_max = requests_max, bytes_max
        self._header = wire.EXTENDED_REQUEST if export.extended else wire.REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if export.extended else REQUEST_MAGIC
        self._is_shutting_down = False
        # Receiving: headers, with what of a payload came along, or payload alone.
        self._head = bytearray(HEAD_BYTES_MAX)
        self._head_view = memoryview(self._head)
        self._offered = 0  # bytes of the last target
        self._filled = 0
        self.incoming: Request | None = None  # its payload comes
        self.incoming_left = 0  # bytes of it that have not come yet
        self._is_narrow = False  # one header at a time: what follows it is payload for elsewhere, as it seems
        self._skip = 0  # bytes of a payload that nobody wants
        # Sending: positions count the bytes of the whole stream.
        self._replies = bytearray()  # answers without payload queue here, so that they leave together
        self._out: list[Piece] = []
        self._queued = 0
        self._handed = 0
        self._sent = 0
        self._load = 0  # bytes of payload, here and in answers, that are not sent yet
        self._unsent: deque[tuple[int, int, int]] = deque()  # where an answer ends, its load, what is held for it

    # -- receiving ----------------------------------------------------------------------------------------------------

    def receive_target(self) -> memoryview:
        """Where the next bytes go. Empty while none are wanted."""
        target = self._target()
        self._offered = len(target)
        return target

    def _target(self) -> memoryview:
        if self.state is not DeviceState.RUNNING:
            return _NOTHING
        if self._skip:
            return self._head_view[: min(self._skip, len(self._head))]
        if self.incoming is not None:
            return self._place(self.incoming)
        if self.is_busy:
            return _NOTHING
        if self._is_narrow and self._filled < self._header.size:
            return self._head_view[self._filled : self._header.size]
        return self._head_view[self._filled :]

    def _place(self, request: Request) -> memoryview:
        """Where the rest of the payload of `request` belongs: room for it is made when it is first asked for."""
        came = request.payload
        if len(came) < request.length:
            request.payload = bytearray(request.length)
            request.payload[: len(came)] = came
        return memoryview(request.payload)[request.length - self.incoming_left :]

    @property
    def is_busy(self) -> bool:
        """So much is under way, or not sent, that the client is not listened to."""
        return self.under_way + len(self._unsent) >= self._requests_max or self._load >= self._bytes_max

    def received(self, count: int) -> list[Request]:
        """`count` bytes have come into the last `receive_target()`: the requests that are whole now, to be answered.

        Raises ProtocolError.
        """
        if self.state is not DeviceState.RUNNING:
            raise IllegalEvent("device", self.state.name, "received", DEVICE_STATES[self.state].sentence)
        if not 0 < count <= self._offered:
            raise BugError(f"{count} bytes received of {self._offered} offered")
        self._offered = 0
        requests: list[Request] = []
        if self._skip:
            self._skip -= count
        elif self.incoming is not None:
            self._came(count, requests)
        else:
            self._filled += count
        self._parse(requests)
        return requests

    def moved(self, count: int) -> bool:
        """`count` bytes of the payload of `incoming` were moved from the stream to elsewhere: whether that was the rest
        of it. Then the request is whole, and to be answered.
        """
        if self.incoming is None or not 0 < count <= self.incoming_left:
            raise BugError(f"{count} bytes moved of {self.incoming_left} that are to come")
        self.incoming_left -= count
        if self.incoming_left:
            return False
        self.incoming = None
        return True

    def resume(self) -> list[Request]:
        """To be called when `is_busy` has ended: the requests that had come, and were not looked at."""
        requests: list[Request] = []
        if self._filled and self.state is DeviceState.RUNNING:
            self._parse(requests)
        return requests

    def end_of_stream(self) -> None:
        """The client sends nothing more. Raises ConnectionLost where it was in the middle of something.

        What it asked before is answered: it may listen still, as `nc -N` does.
        """
        if self.state is not DeviceState.RUNNING:
            return
        in_the_middle = bool(self._filled or self.incoming or self._skip)
        waits = self.under_way or self._sent < self._queued
        self._go(DeviceState.DISCONNECTING if waits and not in_the_middle else DeviceState.CLOSED)
        if in_the_middle:
            raise ConnectionLost(self.client, "receiving a request", "the client closed the connection")

    def _came(self, count: int, requests: list[Request]) -> None:
        self.incoming_left -= count
        if not self.incoming_left and self.incoming is not None:
            requests.append(self.incoming)
            self.incoming = None

    def _parse(self, requests: list[Request]) -> None:
        """Take as many headers out of `_head` as are whole; what follows one may be the start of its payload."""
        at, size, head = 0, self._header.size, self._head_view
        while self.state is DeviceState.RUNNING and self.incoming is None:
            if self._skip:
                dropped = min(self._skip, self._filled - at)
                at, self._skip = at + dropped, self._skip - dropped
            if self._skip or self._filled - at < size or self.is_busy:
                break
            magic, flags, command, cookie, offset, length = self._header.unpack_from(head, at)
            if magic != self._magic:
                self._blame("request", f"magic number {magic:#x} instead of {self._magic:#x}")
            at += size
            request = Request(command, flags, cookie, offset, length)
            if command == Command.DISC:
                self._go(DeviceState.DISCONNECTING)
                break
            self._take(request, requests)
            if self.incoming is not None:
                piece = min(self.incoming_left, self._filled - at)
                request.payload += head[at : at + piece]
                at += piece
                self._came(piece, requests)
        if at:
            rest = self._filled - at
            if rest:
                head[:rest] = bytes(head[at : self._filled])
            self._filled = rest

    def _take(self, request: Request, requests: list[Request]) -> None:
        """A header is there: refuse the request, hand it out, or have its payload come."""
        payload = self._rules.payload_bytes(request)
        if payload > SERVED_PAYLOAD_SKIPPED_MAX:
            self._blame("request", f"{request!r}: at most {self._rules.payload_max} bytes are served")
        refused = self._rules.refusal(request)
        self.under_way += 1
        if refused is not None or self._is_shutting_down:
            self._skip = payload
            if refused is None:
                self.failed(request, Errno.ESHUTDOWN, "the server is shutting down")
            else:
                self.failed(request, refused.errno, refused.sentence)
            return
        request.load = payload or self._rules.answer_bytes(request)
        self._load += request.load
        self._is_narrow = payload >= SPLICE_BYTES_MIN
        if payload:
            self.incoming, self.incoming_left = request, payload
        else:
            requests.append(request)

    # -- answering ----------------------------------------------------------------------------------------------------

    def done(self, request: Request) -> None:
        """`request`, whose answer has neither content nor extents, is carried out."""
        if self._answers(request):
            if self.export.extended:
                self._chunk(request, ReplyType.NONE, _DONE)
            else:
                self._small(wire.pack_simple_reply(request.cookie))
            self._answered(request)

    def failed(self, request: Request, errno: int, sentence: str = "") -> None:
        """`request` has failed with `errno`, a value of the spec; others are told as EINVAL."""
        if request is self.incoming:  # its payload is still coming, and nobody wants it any more
            self.incoming, self._skip = None, self.incoming_left
        if not self._answers(request):
            return
        error = self._rules.error(request, errno)
        if self.export.structured or self.export.extended:
            text = sentence.encode()[:ERROR_MESSAGE_BYTES_MAX]
            self._chunk(request, ReplyType.ERROR, _DONE, wire.pack_error(error, text))
        else:
            self._small(wire.pack_simple_reply(request.cookie, error))
        self._answered(request)

    def content(self, request: Request, parts: Sequence[Piece | Hole]) -> None:
        """What a READ, or what else receives payload, reads: `parts`, in order, together as long as it."""
        if not self._answers(request):
            return
        parts = [part if isinstance(part, Hole) else as_bytes(part) for part in parts]
        length = sum(part.length if isinstance(part, Hole) else len(part) for part in parts)
        if not length or length != self._rules.answer_bytes(request):
            raise BugError(f"{length} bytes as the answer to {request!r}")
        if not (self.export.structured or self.export.extended):
            self._small(wire.pack_simple_reply(request.cookie))
            self._data(_filled(parts))
        elif request.flags & _DF:
            self._run(request, request.offset, _filled(parts), _DONE)
        else:
            self._runs(request, parts)
        self._answered(request)

    def extents(self, request: Request, found: Mapping[str, Extents]) -> None:
        """What BLOCK_STATUS asks: for each context agreed on its extents, in order, from the request's offset on."""
        if not self._answers(request):
            return
        contexts = self.export.contexts
        if request.command != Command.BLOCK_STATUS or not contexts or found.keys() != contexts.keys():
            raise BugError(f"extents of {sorted(found)} as the answer to {request!r}")
        left = len(contexts)
        for name, number in contexts.items():
            left -= 1
            told = _clipped(found[name], request, count_max=1 if request.flags & _REQ_ONE else EXTENTS_TOLD_MAX)
            if not told:
                raise BugError(f"no extents of {name} as the answer to {request!r}")
            kind = ReplyType.BLOCK_STATUS_EXT if self.export.extended else ReplyType.BLOCK_STATUS
            body = wire.pack_block_status(number, told, wide=self.export.extended)
            self._chunk(request, kind, 0 if left else _DONE, body)
        self._answered(request)

    def shut_down(self) -> None:
        """Answer ESHUTDOWN to whatever is asked from now on."""
        self._is_shutting_down = True

    def _answers(self, request: Request) -> bool:
        """Whether an answer to `request` goes anywhere. Raises BugError where it has one already."""
        if request.answered:
            raise BugError(f"a second answer to {request!r}")
        if self.state is DeviceState.RUNNING or self.state is DeviceState.DISCONNECTING:
            return True
        request.answered = True
        self.under_way -= 1
        return False

    def _answered(self, request: Request) -> None:
        request.answered = True
        request.payload = bytearray()
        self.under_way -= 1
        self._unsent.append((self._queued, request.load, request.held))

    def _runs(self, request: Request, parts: Sequence[Piece | Hole]) -> None:
        """A chunk for each hole and for each run of data."""
        at, run = request.offset, list[Piece]()
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            if isinstance(part, Hole):
                hole = wire.pack_hole(at, part.length)
                self._chunk(request, ReplyType.OFFSET_HOLE, _DONE if is_last else 0, hole)
                at += part.length
                continue
            run.append(part)
            if is_last or isinstance(parts[index + 1], Hole):
                self._run(request, at, run, _DONE if is_last else 0)
                at += sum(map(len, run))
                run = []

    def _run(self, request: Request, offset: int, pieces: Sequence[Piece], flags: int) -> None:
        length = sum(map(len, pieces))
        self._header_of_chunk(request, ReplyType.OFFSET_DATA, flags, wire.OFFSET.size + length)
        self._small(wire.OFFSET.pack(offset))
        self._data(pieces)

    def _chunk(self, request: Request, kind: int, flags: int, payload: bytes = b"") -> None:
        self._header_of_chunk(request, kind, flags, len(payload))
        self._small(payload)

    def _header_of_chunk(self, request: Request, kind: int, flags: int, length: int) -> None:
        chunk = wire.Chunk(flags, int(kind), request.cookie, request.offset, length)
        self._small(wire.pack_chunk(chunk, extended=self.export.extended))

    def _small(self, data: bytes) -> None:
        self._replies += data
        self._queued += len(data)

    def _data(self, pieces: Sequence[Piece]) -> None:
        self._cut_replies()
        self._out += pieces
        self._queued += sum(map(len, pieces))

    def _cut_replies(self) -> None:
        if self._replies:
            self._out.append(bytes(self._replies))
            self._replies.clear()

    # -- sending ------------------------------------------------------------------------------------------------------

    def data_to_send(self) -> list[Piece]:
        """What is queued and not handed out yet, in order. A piece that is `Elsewhere` is for the caller to move."""
        if self._handed == self._queued:
            return []  # nothing is queued any more once it is CLOSED or FAILED; what was before may still be sent
        self._cut_replies()
        out, self._out = self._out, []
        self._handed = self._queued
        return out

    @property
    def unsaid(self) -> int:
        """Bytes that `data_to_send` has."""
        return self._queued - self._handed

    def sent(self, count: int) -> int:
        """`count` more of the bytes handed out have left: what was `held` for the requests answered by them, in sum."""
        if not 0 < count <= self._handed - self._sent:
            raise BugError(f"{count} bytes sent of {self._handed - self._sent} handed out")
        self._sent += count
        free = 0
        while self._unsent and self._unsent[0][0] <= self._sent:
            _, load, held = self._unsent.popleft()
            self._load -= load
            free += held
        return free

    @property
    def finished(self) -> bool:
        """Nothing is left to be answered or sent, and the client wants nothing more: close the connection."""
        if self.state is DeviceState.RUNNING:
            return False
        if self.state in (DeviceState.CLOSED, DeviceState.FAILED):
            return True
        return self.state is DeviceState.DISCONNECTING and not self.under_way and self._sent == self._queued

    # -- states -------------------------------------------------------------------------------------------------------

    def _blame(self, stage: str, what: str) -> NoReturn:
        self._go(DeviceState.FAILED)
        raise ProtocolError(self.client, stage, what)

    def _go(self, state: DeviceState) -> None:
        self.state = advance(DEVICE_STATES, "device", self.state, state)


def _filled(parts: Sequence[Piece | Hole]) -> list[Piece]:
    """`parts` with zeroes in the place of holes."""
    pieces: list[Piece] = []
    for part in parts:
        if not isinstance(part, Hole):
            pieces.append(part)
            continue
        whole, rest = divmod(part.length, len(_ZEROES))
        pieces += [_ZEROES] * whole
        if rest:
            pieces.append(_ZEROES[:rest])
    return pieces


def _clipped(extents: Extents, request: Request, count_max: int) -> list[tuple[int, int]]:
    """(length, flags) of the first `count_max` of `extents` at most, and of nothing that `request` did not ask."""
    end = request.offset + request.length
    return [(min(where.end, end) - where.start, flags) for where, flags in extents[:count_max] if where.start < end]
