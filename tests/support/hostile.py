"""Servers that are wrong on purpose: a peer that sends no NBD, or an NBD server's lie; each with its name."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import cast

from support.doubles import (
    CMD_READ,
    CMD_WRITE,
    CONTEXT_ID,
    EIO,
    FLAG_DONE,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBDMAGIC,
    OPT_GO,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_INFO,
    REPLY_BLOCK_STATUS,
    REPLY_ERROR,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    REPLY_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Double,
    Request,
    Talk,
)
from support.images import random_bytes
from support.listening import Serve, receive_exactly, wait_until_closed

GREETING = struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 3)
OLDSTYLE = struct.pack(">QQQI", NBDMAGIC, 0x00420281861253, 1 << 20, 1) + bytes(124)
HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
SSH = b"SSH-2.0-OpenSSH_9.2p1\r\n"


def saying(data: bytes, *, then_close: bool = False) -> Serve:
    """Send `data` at once, whatever the client says."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(data)
        if not then_close:
            wait_until_closed(connection)

    return serve


def silent(connection: socket.socket) -> None:
    """Accept, and never say a word."""
    wait_until_closed(connection)


def option_reply(kind: int, data: bytes = b"", option: int = OPT_GO, magic: int = OPTION_REPLY_MAGIC) -> bytes:
    return struct.pack(">QIII", magic, option, kind, len(data)) + data


def replying_to_first_option(reply: Callable[[int], bytes], *, then_close: bool = False) -> Serve:
    """Greet well, then answer the first option with `reply(option)`."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        receive_exactly(connection, 4)
        _, option, length = struct.unpack(">QII", receive_exactly(connection, 16))
        receive_exactly(connection, length)
        connection.sendall(reply(option))
        if not then_close:
            wait_until_closed(connection)

    return serve


# Servers that never reach transmission: name -> how they serve.
BROKEN_HANDSHAKES: dict[str, Serve] = {
    "an HTTP server": saying(HTTP),
    "an SSH server": saying(SSH),
    "an oldstyle server": saying(OLDSTYLE),
    "zeroes for ever": saying(bytes(1 << 16)),
    "noise": saying(random_bytes(4096, 7)),
    "closes at once": saying(b"", then_close=True),
    "closes within the greeting": saying(GREETING[:11], then_close=True),
    "a greeting without fixed newstyle": saying(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 0)),
    "closes after the greeting": saying(GREETING, then_close=True),
    "an option reply with another magic": replying_to_first_option(
        lambda option: option_reply(REP_ACK, option=option, magic=0x1234567812345678)
    ),
    "an answer to another option": replying_to_first_option(lambda _: option_reply(REP_ACK, option=0x7777)),
    "an option reply of 4 GiB": replying_to_first_option(
        lambda option: struct.pack(">QIII", OPTION_REPLY_MAGIC, option, REP_ACK, 0xFFFFFFFF)
    ),
    "an option reply cut short": replying_to_first_option(
        lambda option: option_reply(REP_ACK, option=option)[:13], then_close=True
    ),
    "an error text of 64 KiB": replying_to_first_option(
        lambda option: option_reply(1 << 31 | 2, b"x" * 65_537, option=option)
    ),
}


def _inform_twisted(info: bytes, *, ack: bool = True) -> type[Double]:
    """A double whose GO is answered with `info` for the one information it gives."""

    class Twisted(Double):
        def inform(self, talk: Talk, option: int) -> None:
            talk.reply_to_option(option, REP_INFO, info)
            if ack:
                talk.reply_to_option(option, REP_ACK)

    return Twisted


_EXPORT = struct.pack(">HQH", INFO_EXPORT, 1 << 20, 0x1ED)


class _BabblingInfo(Double):
    """Information without end."""

    def inform(self, talk: Talk, option: int) -> None:
        while True:
            talk.reply_to_option(option, REP_INFO, struct.pack(">HH", 0x4242, 0))


class _BlocksTwisted(Double):
    def inform(self, talk: Talk, option: int) -> None:
        talk.reply_to_option(option, REP_INFO, _EXPORT)
        talk.reply_to_option(option, REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 3, 5, 1))
        talk.reply_to_option(option, REP_ACK)


# Servers that lie while they answer GO.
BROKEN_GO: dict[str, type[Double]] = {
    "no export information": _inform_twisted(struct.pack(">HH", 1, 0)),
    "export information cut short": _inform_twisted(_EXPORT[:9]),
    "export information too long": _inform_twisted(_EXPORT + b"more"),
    "an export of 2^64 - 1 bytes": _inform_twisted(struct.pack(">HQH", INFO_EXPORT, (1 << 64) - 1, 0x1ED)),
    "block sizes that are no powers of two": _BlocksTwisted,
    "information without end": _BabblingInfo,
}


class _Reads(Double):
    """A double that is wrong in its answer to READ only. `has_spoken`: it has said all it says to the first one.

    What it says is longer than a socket's buffer, so that the client has heard nearly all of it, or has gone.
    """

    def __init__(self, content: bytearray, **options: bool) -> None:
        super().__init__(content, **options)  # type: ignore[arg-type]
        self.has_spoken = threading.Event()

    def answer(self, talk: Talk, request: Request) -> None:
        try:
            super().answer(talk, request)
        finally:
            if request.command == CMD_READ:
                self.has_spoken.set()

    def read(self, talk: Talk, request: Request) -> None:
        raise NotImplementedError


def _data(request: Request, content: bytearray) -> bytes:
    return bytes(content[request.offset : request.offset + request.length])


class _UnknownHandle(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        body = struct.pack(">Q", request.offset) + _data(request, self.content)
        header = (STRUCTURED_REPLY_MAGIC, FLAG_DONE, REPLY_OFFSET_DATA, request.cookie ^ 0x5A5A5A5A5A, len(body))
        talk.send(struct.pack(">IHHQI", *header), body)


class _BadMagic(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.send(struct.pack(">IIQ", 0xDEADBEEF, 0, request.cookie))


class _OversizedChunk(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.send(talk.chunk_header(request, REPLY_OFFSET_DATA, 0xFFFFFFF0))
        talk.send(struct.pack(">Q", request.offset), _data(request, self.content))


class _TooMuchData(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        body = struct.pack(">Q", request.offset) + _data(request, self.content) + b"more"
        talk.chunk(request, REPLY_OFFSET_DATA, body)


class _BeforeTheRequest(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        body = struct.pack(">Q", (request.offset - 1) % (1 << 64)) + _data(request, self.content)
        talk.chunk(request, REPLY_OFFSET_DATA, body)


class _BehindTheRequest(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.chunk(request, REPLY_OFFSET_HOLE, struct.pack(">QI", request.offset, request.length + 512))


class _Overlap(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        half = struct.pack(">Q", request.offset) + _data(request, self.content)[: request.length // 2]
        talk.chunk(request, REPLY_OFFSET_DATA, half, flags=0)
        talk.chunk(request, REPLY_OFFSET_DATA, struct.pack(">Q", request.offset) + _data(request, self.content))


class _Gap(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        half = struct.pack(">Q", request.offset) + _data(request, self.content)[: request.length // 2]
        talk.chunk(request, REPLY_OFFSET_DATA, half)


class _Nothing(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.chunk(request, REPLY_NONE)


class _SimpleAnswer(_Reads):
    """A simple reply to READ after structured replies were agreed: forbidden by the spec."""

    def read(self, talk: Talk, request: Request) -> None:
        talk.send(struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, 0, request.cookie), _data(request, self.content))


class _UnknownType(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.chunk(request, 0x4242, b"what is this", flags=FLAG_DONE)


class _StatusForRead(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.chunk(request, REPLY_BLOCK_STATUS, struct.pack(">III", CONTEXT_ID, request.length, 0))


class _ErrorTextTooLong(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.chunk(request, REPLY_ERROR, struct.pack(">IH", EIO, 60_000) + b"short")


class _EmptyChunksForEver(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        while True:
            talk.chunk(request, REPLY_NONE, flags=0)


class _AnswersTwice(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        Double.read(self, talk, request)
        Double.read(self, talk, request)


class _ClosesInPayload(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.send(talk.chunk_header(request, REPLY_OFFSET_DATA, request.length + 8))
        talk.send(struct.pack(">Q", request.offset), _data(request, self.content)[: request.length // 2])
        talk.hang_up()


class _ClosesInHeader(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        talk.send(talk.chunk_header(request, REPLY_OFFSET_DATA, request.length + 8)[:9])
        talk.hang_up()


class _WriteUnknownHandle(Double):
    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        talk.send(struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, 0, request.cookie ^ 0x5A5A5A5A5A))


class _WriteBadMagic(Double):
    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        talk.send(struct.pack(">IIQ", 0xDEADBEEF, 0, request.cookie))


class _WriteAnsweredWithData(Double):
    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        talk.chunk(request, REPLY_OFFSET_DATA, struct.pack(">Q", request.offset) + data)


class _WriteAnsweredTwice(Double):
    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        talk.done(request)
        talk.done(request)


class _WriteClosesInReply(Double):
    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        talk.send(struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, 0, request.cookie)[:9])
        talk.hang_up()


class _WriteClosesAtHeader(Double):
    """Closes before it has taken the payload."""

    def answer(self, talk: Talk, request: Request) -> None:
        if request.command == CMD_WRITE:
            talk.hang_up()
        super().answer(talk, request)


class _NeverAnswersReads(_Reads):
    def read(self, talk: Talk, request: Request) -> None:
        pass


# Sources that break the protocol in their answer to READ: the peer is blamed.
LYING_SOURCES: dict[str, type[_Reads]] = {
    "a reply with an unknown handle": _UnknownHandle,
    "a reply with another magic": _BadMagic,
    "a chunk of 4 GiB": _OversizedChunk,
    "more data than was asked": _TooMuchData,
    "a chunk that begins before the request": _BeforeTheRequest,
    "a hole that ends behind the request": _BehindTheRequest,
    "chunks that overlap": _Overlap,
    "chunks that leave a gap": _Gap,
    "an empty answer": _Nothing,
    "a simple reply where structured was agreed": _SimpleAnswer,
    "a chunk of unknown type": _UnknownType,
    "block status in answer to a read": _StatusForRead,
    "an error chunk whose text does not fit": _ErrorTextTooLong,
    "empty chunks for ever": _EmptyChunksForEver,
    "two answers to one request": _AnswersTwice,
}

# Sources that vanish while they answer.
VANISHING_SOURCES: dict[str, type[Double]] = {
    "closes in the middle of the payload": _ClosesInPayload,
    "closes in the middle of a header": _ClosesInHeader,
}

# Destinations that are wrong in their answer to WRITE.
LYING_DESTINATIONS: dict[str, type[Double]] = {
    "a reply with an unknown handle": _WriteUnknownHandle,
    "a reply with another magic": _WriteBadMagic,
    "data in answer to a write": _WriteAnsweredWithData,
    "two answers to one write": _WriteAnsweredTwice,
}
VANISHING_DESTINATIONS: dict[str, type[Double]] = {
    "closes in the middle of a reply": _WriteClosesInReply,
    "closes before the payload": _WriteClosesAtHeader,
}


class _CutSocket:
    """A socket on which only so many bytes get out; then it is closed."""

    def __init__(self, connection: socket.socket, length: int) -> None:
        self._connection = connection
        self._left = length

    def sendall(self, data: bytes) -> None:
        self._connection.sendall(data[: self._left])
        self._left -= min(len(data), self._left)
        if not self._left:
            self._connection.shutdown(socket.SHUT_RDWR)
            raise EOFError

    def recv(self, length: int) -> bytes:
        return self._connection.recv(length)

    def shutdown(self, how: int) -> None:
        self._connection.shutdown(how)


def cut_after(server: Double, length: int) -> Serve:
    """`server`, whose every connection ends after `length` bytes of it."""

    def serve(connection: socket.socket) -> None:
        server.serve(cast(socket.socket, _CutSocket(connection, length)))

    return serve


NEVER_ANSWERS_READS = _NeverAnswersReads

__all__ = [
    "BROKEN_GO",
    "BROKEN_HANDSHAKES",
    "LYING_DESTINATIONS",
    "LYING_SOURCES",
    "NEVER_ANSWERS_READS",
    "VANISHING_DESTINATIONS",
    "VANISHING_SOURCES",
    "cut_after",
    "option_reply",
    "replying_to_first_option",
    "saying",
    "silent",
]
