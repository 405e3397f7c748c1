"""What a connection's traffic looks like while nothing is the matter: for who moves payload without the client. Pure.

A `Quick` knows the one reply to a READ, and the one to what writes, that a server gives when all is well, byte for
byte. Whatever is anything else (an error, a hole, a reply in several chunks, nonsense) it does not judge: it answers
ODD, and the client is given those bytes, and what is unanswered, to make of them what they are (`Client.adopt`).

Spec: "Simple reply message", "Structured reply chunk message", "Extended reply chunk message".
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final, Protocol

from nbdshard.common.nbd import wire
from nbdshard.common.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    ReplyFlag,
    ReplyType,
)
from nbdshard.common.nbd.export import Export

ODD: Final = -1

_DONE: Final = ReplyFlag.DONE.value
_DATA: Final = ReplyType.OFFSET_DATA.value
_NONE: Final = ReplyType.NONE.value
_OFFSET_BYTES: Final = wire.OFFSET.size
_READ: Final = Command.READ.value
_WRITE: Final = Command.WRITE.value
_WRITE_ZEROES: Final = Command.WRITE_ZEROES.value
_FLUSH: Final = Command.FLUSH.value
_PAYLOAD_LEN: Final = CommandFlag.PAYLOAD_LEN.value

# A structured or extended header together with the offset that OFFSET_DATA begins with.
_STRUCTURED_DATA: Final = Struct(">IHHQIQ")
_EXTENDED_DATA: Final = Struct(">IHHQQQQ")


class Quick(Protocol):
    """One kind of connection. `head_bytes`: of a READ's reply before its payload; `ack_bytes`: of a WRITE's reply.

    `starts` and `lengths` say by cookie what was asked, in bytes; a length of 0 means that nothing is.
    """

    head_bytes: int
    ack_bytes: int

    def read(self, cookie: int, start: int, length: int) -> bytes:
        """The request's header."""

    def write(self, cookie: int, start: int, length: int) -> bytes:
        """The request's header; the payload follows."""

    def zero(self, cookie: int, start: int, length: int) -> bytes:
        """A WRITE_ZEROES that may punch a hole."""

    def flush(self, cookie: int) -> bytes:
        """The request."""

    def head(self, data: bytearray, starts: Sequence[int], lengths: Sequence[int]) -> int:
        """The cookie of a READ all of whose payload follows, and nothing else of its reply; or ODD."""

    def ack(self, data: bytearray, at: int, starts: Sequence[int], lengths: Sequence[int]) -> int:
        """The cookie of a request that succeeded, its reply at `at`; or ODD."""


def quick(export: Export) -> Quick:
    """As negotiated. Where replies are structured, a WRITE is answered by a simple one as a rule."""
    if export.extended:
        return _Extended()
    return _Structured() if export.structured else _Simple()


class _Compact:
    """Compact requests, simple replies."""

    head_bytes = wire.SIMPLE_REPLY.size
    ack_bytes = wire.SIMPLE_REPLY.size

    def read(self, cookie: int, start: int, length: int) -> bytes:
        return wire.REQUEST.pack(REQUEST_MAGIC, 0, _READ, cookie, start, length)

    def write(self, cookie: int, start: int, length: int) -> bytes:
        return wire.REQUEST.pack(REQUEST_MAGIC, 0, _WRITE, cookie, start, length)

    def zero(self, cookie: int, start: int, length: int) -> bytes:
        return wire.REQUEST.pack(REQUEST_MAGIC, 0, _WRITE_ZEROES, cookie, start, length)

    def flush(self, cookie: int) -> bytes:
        return wire.REQUEST.pack(REQUEST_MAGIC, 0, _FLUSH, cookie, 0, 0)

    def ack(self, data: bytearray, at: int, starts: Sequence[int], lengths: Sequence[int]) -> int:
        del starts  # a simple reply has no offset
        magic, error, cookie = wire.SIMPLE_REPLY.unpack_from(data, at)
        if magic == SIMPLE_REPLY_MAGIC and not error and cookie < len(lengths) and lengths[cookie]:
            return int(cookie)
        return ODD


class _Simple(_Compact):
    """No structured replies were agreed on."""

    def head(self, data: bytearray, starts: Sequence[int], lengths: Sequence[int]) -> int:
        return self.ack(data, 0, starts, lengths)


class _Structured(_Compact):
    """Structured replies to READs."""

    head_bytes = _STRUCTURED_DATA.size

    def head(self, data: bytearray, starts: Sequence[int], lengths: Sequence[int]) -> int:
        magic, flags, kind, cookie, length, offset = _STRUCTURED_DATA.unpack_from(data)
        if (
            magic == STRUCTURED_REPLY_MAGIC
            and flags == _DONE
            and kind == _DATA
            and cookie < len(lengths)
            and lengths[cookie]
            and length == lengths[cookie] + _OFFSET_BYTES
            and offset == starts[cookie]
        ):
            return int(cookie)
        return ODD


class _Extended:
    """Extended headers, both ways."""

    head_bytes = _EXTENDED_DATA.size
    ack_bytes = wire.EXTENDED_REPLY.size

    def read(self, cookie: int, start: int, length: int) -> bytes:
        return wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, 0, _READ, cookie, start, length)

    def write(self, cookie: int, start: int, length: int) -> bytes:
        return wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, _PAYLOAD_LEN, _WRITE, cookie, start, length)

    def zero(self, cookie: int, start: int, length: int) -> bytes:
        return wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, 0, _WRITE_ZEROES, cookie, start, length)

    def flush(self, cookie: int) -> bytes:
        return wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, 0, _FLUSH, cookie, 0, 0)

    def head(self, data: bytearray, starts: Sequence[int], lengths: Sequence[int]) -> int:
        magic, flags, kind, cookie, request, length, offset = _EXTENDED_DATA.unpack_from(data)
        if (
            magic == EXTENDED_REPLY_MAGIC
            and flags == _DONE
            and kind == _DATA
            and cookie < len(lengths)
            and lengths[cookie]
            and length == lengths[cookie] + _OFFSET_BYTES
            and request == offset == starts[cookie]
        ):
            return int(cookie)
        return ODD

    def ack(self, data: bytearray, at: int, starts: Sequence[int], lengths: Sequence[int]) -> int:
        magic, flags, kind, cookie, offset, length = wire.EXTENDED_REPLY.unpack_from(data, at)
        if (
            magic == EXTENDED_REPLY_MAGIC
            and flags == _DONE
            and kind == _NONE
            and not length
            and cookie < len(lengths)
            and lengths[cookie]
            and offset == starts[cookie]
        ):
            return int(cookie)
        return ODD
