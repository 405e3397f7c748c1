"""Server doubles that fail at a chosen place: errors in every position of an answer, ends amid a payload, slowness."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

from support.doubles import (
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EIO,
    REPLY_ERROR,
    REPLY_ERROR_OFFSET,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    Double,
    Request,
    Talk,
)
from support.pipes import reset
from support.waiting import WAIT_SECONDS

PART = 50_000  # bytes of an answer that come before or behind its error


# -- errors in answer to a READ ----------------------------------------------------------------------------------------


def fail(talk: Talk, request: Request, flags: int = 1) -> None:
    talk.chunk(request, REPLY_ERROR, struct.pack(">IH", EIO, 6) + b"broken", flags=flags)


def fail_at(talk: Talk, request: Request, flags: int = 1) -> None:
    body = struct.pack(">IH", EIO, 6) + b"broken" + struct.pack(">Q", request.offset + 7)
    talk.chunk(request, REPLY_ERROR_OFFSET, body, flags=flags)


def send_data(talk: Talk, request: Request, content: bytearray, start: int, end: int, flags: int = 0) -> None:
    at = request.offset + start
    talk.chunk(request, REPLY_OFFSET_DATA, struct.pack(">Q", at) + content[at : request.offset + end], flags=flags)


Reply = Callable[[Talk, Request, bytearray], None]


def _at_once(talk: Talk, request: Request, content: bytearray) -> None:
    del content
    fail(talk, request)


def _after_a_part(talk: Talk, request: Request, content: bytearray) -> None:
    send_data(talk, request, content, 0, PART)
    fail(talk, request)


def _after_all_of_it(talk: Talk, request: Request, content: bytearray) -> None:
    send_data(talk, request, content, 0, request.length)
    fail(talk, request)


def _in_the_middle(talk: Talk, request: Request, content: bytearray) -> None:
    send_data(talk, request, content, 0, PART)
    fail(talk, request, flags=0)
    send_data(talk, request, content, PART, request.length, flags=1)


def _in_front(talk: Talk, request: Request, content: bytearray) -> None:
    fail_at(talk, request, flags=0)
    send_data(talk, request, content, 0, request.length)
    talk.chunk(request, REPLY_NONE)


def _last_but_for_the_end(talk: Talk, request: Request, content: bytearray) -> None:
    send_data(talk, request, content, 0, PART)
    fail_at(talk, request, flags=0)
    talk.chunk(request, REPLY_NONE)


def _after_what_did_not_come_in_order(talk: Talk, request: Request, content: bytearray) -> None:
    send_data(talk, request, content, PART, request.length)
    send_data(talk, request, content, 0, PART // 5)
    fail(talk, request)


# Structured and extended replies. An error has one position only in a simple one: `AT_ONCE`.
AT_ONCE = "at once"
FAILURES: dict[str, Reply] = {
    AT_ONCE: _at_once,
    "after a part": _after_a_part,
    "after all of it": _after_all_of_it,
    "in the middle": _in_the_middle,
    "in front of all the data": _in_front,
    "last but for the end": _last_but_for_the_end,
    "after what did not come in order": _after_what_did_not_come_in_order,
}


class FailsFirst(Double):
    """Answers every read at offset `fails_at` as `reply` says, `times` times, and all others well."""

    reply: Reply = staticmethod(_at_once)
    fails_at = 0
    times = 1 << 30

    def read(self, talk: Talk, request: Request) -> None:
        if request.offset != self.fails_at or not self.times:
            super().read(talk, request)
            return
        self.times -= 1
        if talk.structured or talk.extended:
            self.reply(talk, request, self.content)
        else:
            talk.simple(request, EIO)


# -- errors in answer to a WRITE ---------------------------------------------------------------------------------------

# How much of the payload is taken before the error is sent; the rest is taken afterwards.
REFUSALS: dict[str, Callable[[int], int]] = {
    "before the payload": lambda _length: 0,
    "within the payload": lambda length: length // 2,
    "behind the payload": lambda length: length,
}


class RefusesFirst(Double):
    """Refuses every write at offset `fails_at` with EIO, `times` times, when it has `taken` of its payload."""

    taken: Callable[[int], int] = staticmethod(REFUSALS["before the payload"])
    fails_at = 0
    times = 1 << 30

    def answer(self, talk: Talk, request: Request) -> None:
        if request.command != CMD_WRITE or request.offset != self.fails_at or not self.times:
            super().answer(talk, request)
            return
        self.times -= 1
        first = self.taken(request.length)
        talk.receive(first)
        talk.done(request, EIO)
        talk.receive(request.length - first)


class RefusesZeroes(Double):
    """Refuses the WRITE_ZEROES with number `number`, from 0 on, with `error`."""

    number = 0
    error = EIO

    def zero(self, talk: Talk, request: Request) -> None:
        if self.count(CMD_WRITE_ZEROES) == self.number + 1:
            talk.done(request, self.error)
        else:
            super().zero(talk, request)


# -- ends --------------------------------------------------------------------------------------------------------------

Going = Callable[[Talk], None]


def hangs_up(talk: Talk) -> None:
    talk.hang_up()


def resets(talk: Talk) -> None:
    """With bytes of ours unread, or over TCP without the usual goodbye."""
    reset(talk.socket)
    raise EOFError


def says_no_more(talk: Talk) -> None:
    """Ends its stream, and goes on listening."""
    talk.socket.shutdown(socket.SHUT_WR)
    while talk.socket.recv(1 << 16):
        pass


GOINGS: dict[str, Going] = {"hangs up": hangs_up, "resets": resets, "says no more": says_no_more}


def data_reply(talk: Talk, request: Request, content: bytearray) -> bytes:
    """The whole answer to a READ, in one chunk."""
    data = bytes(content[request.offset : request.offset + request.length])
    return talk.chunk_header(request, REPLY_OFFSET_DATA, len(data) + 8) + struct.pack(">Q", request.offset) + data


class GoesInAReply(Double):
    """Sends the first `length` bytes of its answer to a read at offset `goes_at` or behind it, and goes."""

    length = 0
    goes_at = 0
    go_away: Going = staticmethod(hangs_up)

    def read(self, talk: Talk, request: Request) -> None:
        if request.offset < self.goes_at:
            super().read(talk, request)
            return
        talk.socket.sendall(data_reply(talk, request, self.content)[: self.length])
        self.go_away(talk)


class GoesInAWrite(Double):
    """Takes some of the payload of a WRITE at offset `goes_at` or behind it, and goes. `acknowledged`: bytes."""

    length = 0
    share = 0.0  # of the payload, in the place of `length`
    goes_at = 0
    acknowledged = 0
    go_away: Going = staticmethod(hangs_up)

    def answer(self, talk: Talk, request: Request) -> None:
        if request.command == CMD_WRITE and request.offset >= self.goes_at:
            talk.receive(int(request.length * self.share) or self.length)
            self.go_away(talk)
        super().answer(talk, request)
        if request.command in (CMD_WRITE, CMD_WRITE_ZEROES):
            self.acknowledged += request.length


# -- slowness ----------------------------------------------------------------------------------------------------------


class Crumbling(Double):
    """Sends each answer to a READ in pieces of `piece` bytes."""

    piece = 512

    def read(self, talk: Talk, request: Request) -> None:
        stream = data_reply(talk, request, self.content)
        for at in range(0, len(stream), self.piece):
            talk.socket.sendall(stream[at : at + self.piece])


class AcknowledgesAhead(Double):
    """Acknowledges every WRITE when it has its header, and takes nothing more from `goes_on_until` on."""

    goes_on_until = 0

    def __init__(self, content: bytearray) -> None:
        super().__init__(content)
        self.released = threading.Event()

    def answer(self, talk: Talk, request: Request) -> None:
        if request.command != CMD_WRITE:
            super().answer(talk, request)
            return
        talk.done(request)
        if request.offset >= self.goes_on_until:
            assert self.released.wait(WAIT_SECONDS)
        self.content[request.offset : request.offset + request.length] = talk.receive(request.length)


class PausesInAReply(Double):
    """Sends `length` bytes of its answer to a read in pieces of `piece`, and the rest when `released` is set."""

    length = 50_000
    piece = 1 << 20

    def __init__(self, content: bytearray) -> None:
        super().__init__(content)
        self.released = threading.Event()
        self.paused = threading.Event()

    def read(self, talk: Talk, request: Request) -> None:
        stream = data_reply(talk, request, self.content)
        for at in range(0, self.length, self.piece):
            talk.socket.sendall(stream[at : min(at + self.piece, self.length)])
        self.paused.set()
        assert self.released.wait(WAIT_SECONDS)
        talk.socket.sendall(stream[self.length :])
