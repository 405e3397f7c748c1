"""An NBD server double: correct unless a test overrides a step. Written on its own struct code, from the NBD spec.

It shares nothing with nbdshard's wire code, so a fault there is not mirrored here. Each connection runs in one
thread and answers one request after the other; every request is kept in `requests` for the test to look at.

A test misbehaves by overriding one method of `Double` (`greet`, `go`, `read`, `write`, ...): the rest stays correct.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from support.listening import Listening, listening, receive_exactly

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY = 1, 2, 3, 6, 7, 8
OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 9, 10, 11
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID, REP_ERR_UNKNOWN = (1 << 31 | n for n in (1, 2, 3, 6))
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = 1, 2, 4, 8, 32, 64
SEND_DF, CAN_MULTI_CONN = 128, 256

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = range(8)
REPLY_NONE, REPLY_OFFSET_DATA, REPLY_OFFSET_HOLE, REPLY_BLOCK_STATUS, REPLY_BLOCK_STATUS_EXT = 0, 1, 2, 5, 6
REPLY_ERROR, REPLY_ERROR_OFFSET = 0x8001, 0x8002
FLAG_DONE = 1
EPERM, EIO, EINVAL, ENOSPC, ESHUTDOWN = 1, 5, 22, 28, 108
HOLE, ZERO = 1, 2
CONTEXT_ID = 7
HINTS_QUERY = b"x-nbdshard:hints"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was received."""

    connection: int
    command: int
    flags: int
    cookie: int
    offset: int
    length: int


class Talk:
    """One connection of a double: its socket and what was negotiated on it."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.socket = connection
        self.structured = False
        self.extended = False
        self.contexts = False
        self.no_zeroes = False

    def receive(self, length: int) -> bytes:
        return receive_exactly(self.socket, length)

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def hang_up(self) -> None:
        """Close this connection at once: ends its thread."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        raise EOFError

    # -- replies to options

    def reply_to_option(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(data)), data)

    # -- replies to requests

    def chunk(self, request: Request, kind: int, payload: bytes = b"", flags: int = FLAG_DONE) -> None:
        """One chunk of a structured (or extended) reply."""
        self.send(self.chunk_header(request, kind, len(payload), flags), payload)

    def chunk_header(self, request: Request, kind: int, length: int, flags: int = FLAG_DONE) -> bytes:
        if self.extended:
            fields = (EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length)
            return struct.pack(">IHHQQQ", *fields)
        return struct.pack(">IHHQI", STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)

    def simple(self, request: Request, error: int = 0, payload: bytes = b"") -> None:
        self.send(struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, error, request.cookie), payload)

    def done(self, request: Request, error: int = 0, message: str = "") -> None:
        """The answer to a request that carries no payload, or the failure of any."""
        if not (self.structured or self.extended):
            self.simple(request, error)
        elif error:
            text = message.encode()
            self.chunk(request, REPLY_ERROR, struct.pack(">IH", error, len(text)) + text)
        elif self.extended:
            self.chunk(request, REPLY_NONE)
        else:
            self.simple(request)


@dataclass
class Double:
    """A server of `content`. `blocks` is (minimum, preferred, maximum), None: it names none."""

    content: bytearray
    structured: bool = True
    extended: bool = False
    extents: bool = True
    hints: str = ""  # the answer to the query for them
    go: bool = True
    blocks: tuple[int, int, int] | None = (1, 4096, 32 << 20)
    flags: int = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_WRITE_ZEROES | SEND_DF | CAN_MULTI_CONN
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    talks: int = 0
    extended_talks: int = 0  # those that agreed on extended headers

    def running(self, *, tcp: bool = False) -> contextlib.AbstractContextManager[Listening]:
        """Serve until the block ends; gives the URI."""
        return listening(self.serve, tcp=tcp)

    def serve(self, connection: socket.socket) -> None:
        with self.lock:
            self.talks += 1
            talk = Talk(self.talks, connection)
        if self.negotiate(talk):
            with self.lock:
                self.extended_talks += talk.extended
            self.transmit(talk)

    def count(self, command: int) -> int:
        """How many requests of this kind have come."""
        with self.lock:
            return sum(request.command == command for request in self.requests)

    # -- handshake: the steps to override

    def negotiate(self, talk: Talk) -> bool:
        """True when transmission begins."""
        self.greet(talk)
        talk.no_zeroes = bool(struct.unpack(">I", talk.receive(4))[0] & 2)
        while True:
            magic, option, length = struct.unpack(">QII", talk.receive(16))
            assert magic == IHAVEOPT, f"the client's option magic is {magic:#x}"
            outcome = self.option(talk, option, talk.receive(length))
            if outcome is not None:
                return outcome

    def greet(self, talk: Talk) -> None:
        talk.send(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 1 | 2))

    def option(self, talk: Talk, option: int, data: bytes) -> bool | None:
        """True: transmission begins; False: the connection ends; None: more options follow."""
        if option == OPT_EXPORT_NAME:
            padding = b"" if talk.no_zeroes else bytes(124)
            talk.send(struct.pack(">QH", len(self.content), self.flags), padding)
            return True
        if option == OPT_ABORT:
            talk.reply_to_option(option, REP_ACK)
            return False
        if option in (OPT_GO, OPT_INFO) and self.go:
            self.inform(talk, option)
            return option == OPT_GO or None
        if option == OPT_STRUCTURED_REPLY and self.structured:
            talk.structured = True
            talk.reply_to_option(option, REP_ACK)
        elif option == OPT_EXTENDED_HEADERS and self.extended:
            talk.extended = True
            talk.reply_to_option(option, REP_ACK)
        elif option == OPT_SET_META_CONTEXT and self.extents and (talk.structured or talk.extended):
            self.set_contexts(talk, option)
        elif option == OPT_LIST_META_CONTEXT and self.hints and (talk.structured or talk.extended):
            if data.endswith(struct.pack(">II", 1, len(HINTS_QUERY)) + HINTS_QUERY):
                talk.reply_to_option(option, REP_META_CONTEXT, bytes(4) + self.hints.encode())
            talk.reply_to_option(option, REP_ACK)
        else:
            talk.reply_to_option(option, REP_ERR_UNSUP)
        return None

    def inform(self, talk: Talk, option: int) -> None:
        """The answers to GO and INFO."""
        export = struct.pack(">HQH", INFO_EXPORT, len(self.content), self.flags)
        talk.reply_to_option(option, REP_INFO, export)
        if self.blocks is not None:
            talk.reply_to_option(option, REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, *self.blocks))
        talk.reply_to_option(option, REP_ACK)

    def set_contexts(self, talk: Talk, option: int) -> None:
        talk.contexts = True
        talk.reply_to_option(option, REP_META_CONTEXT, struct.pack(">I", CONTEXT_ID) + b"base:allocation")
        talk.reply_to_option(option, REP_ACK)

    # -- transmission

    def transmit(self, talk: Talk) -> None:
        while True:
            request = self.receive_request(talk)
            with self.lock:
                self.requests.append(request)
            if request.command == CMD_DISC:
                return
            self.answer(talk, request)

    def receive_request(self, talk: Talk) -> Request:
        if talk.extended:
            header = struct.unpack(">IHHQQQ", talk.receive(32))
            assert header[0] == EXTENDED_REQUEST_MAGIC, f"the request's magic is {header[0]:#x}"
        else:
            header = struct.unpack(">IHHQQI", talk.receive(28))
            assert header[0] == REQUEST_MAGIC, f"the request's magic is {header[0]:#x}"
        _, flags, command, cookie, offset, length = header
        return Request(talk.number, command, flags, cookie, offset, length)

    def answer(self, talk: Talk, request: Request) -> None:
        """Hand the request to its step. A request outside the export is the client's fault and fails the test."""
        if request.command in (CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS):
            assert 0 < request.length <= len(self.content) - request.offset, f"outside the export: {request}"
        if request.command == CMD_READ:
            self.read(talk, request)
        elif request.command == CMD_WRITE:
            self.write(talk, request, talk.receive(request.length))
        elif request.command == CMD_WRITE_ZEROES:
            self.zero(talk, request)
        elif request.command == CMD_BLOCK_STATUS:
            self.block_status(talk, request)
        elif request.command == CMD_FLUSH:
            self.flush(talk, request)
        else:
            talk.done(request, EINVAL)

    # -- one step for each command: to override

    def read(self, talk: Talk, request: Request) -> None:
        data = bytes(self.content[request.offset : request.offset + request.length])
        if talk.structured or talk.extended:
            talk.chunk(request, REPLY_OFFSET_DATA, struct.pack(">Q", request.offset) + data)
        else:
            talk.simple(request, 0, data)

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        self.content[request.offset : request.offset + request.length] = data
        talk.done(request)

    def zero(self, talk: Talk, request: Request) -> None:
        self.content[request.offset : request.offset + request.length] = bytes(request.length)
        talk.done(request)

    def flush(self, talk: Talk, request: Request) -> None:
        talk.done(request)

    def block_status(self, talk: Talk, request: Request) -> None:
        """One extent of data over the whole request."""
        self.send_extents(talk, request, [(request.length, 0)])

    def send_extents(self, talk: Talk, request: Request, extents: list[tuple[int, int]]) -> None:
        if talk.extended:
            body = struct.pack(">II", CONTEXT_ID, len(extents))
            body += b"".join(struct.pack(">QQ", *extent) for extent in extents)
            talk.chunk(request, REPLY_BLOCK_STATUS_EXT, body)
        else:
            body = struct.pack(">I", CONTEXT_ID) + b"".join(struct.pack(">II", *extent) for extent in extents)
            talk.chunk(request, REPLY_BLOCK_STATUS, body)


@contextlib.contextmanager
def double(server: Double, *, tcp: bool = False) -> Iterator[str]:
    """The URI of `server`, which runs until the block ends."""
    with server.running(tcp=tcp) as state:
        yield state.uri
