"""Whatever a source says of its blocks, right or wrong: the copy is identical, or the source is blamed."""

from __future__ import annotations

import struct

import pytest

from support import images
from support.command import copy
from support.doubles import (
    CMD_BLOCK_STATUS,
    CONTEXT_ID,
    EIO,
    HOLE,
    REP_ERR_UNKNOWN,
    REP_META_CONTEXT,
    REPLY_BLOCK_STATUS,
    ZERO,
    Double,
    Request,
    Talk,
    double,
)

SIZE = 2 * images.MIB
CONTENT = images.random_bytes(images.MIB) + bytes(images.MIB)


def true_extents(request: Request, *, longest: int = SIZE) -> list[tuple[int, int]]:
    """Of CONTENT: data, then zeroes."""
    extents, offset, end = [], request.offset, request.offset + request.length
    while offset < end:
        border = images.MIB if offset < images.MIB else SIZE
        length = min(border, end, offset + longest) - offset
        extents.append((length, 0 if offset < images.MIB else HOLE | ZERO))
        offset += length
    return extents


class _OneByOne(Double):
    """One extent for each question, of 4 KiB at most."""

    def block_status(self, talk: Talk, request: Request) -> None:
        self.send_extents(talk, request, true_extents(request, longest=4096)[:1])


class _Repeated(Double):
    """Neighbours of the same state are told apart."""

    def block_status(self, talk: Talk, request: Request) -> None:
        self.send_extents(talk, request, true_extents(request, longest=512))


class _Long(Double):
    """The last extent reaches beyond the question, as is allowed."""

    def block_status(self, talk: Talk, request: Request) -> None:
        if request.offset < images.MIB:
            extents = [(images.MIB - request.offset, 0), (images.MIB, HOLE | ZERO)]
        else:
            extents = [(SIZE - request.offset, HOLE | ZERO)]
        self.send_extents(talk, request, extents)


class _Failing(Double):
    def block_status(self, talk: Talk, request: Request) -> None:
        talk.done(request, EIO, "no idea")


class _NoAnswerToTheContext(Double):
    """Knows no context at all."""

    def set_contexts(self, talk: Talk, option: int) -> None:
        talk.reply_to_option(option, REP_ERR_UNKNOWN)


class _UnknownFlags(Double):
    def block_status(self, talk: Talk, request: Request) -> None:
        self.send_extents(talk, request, [(length, flags | 0xFF00) for length, flags in true_extents(request)])


RIGHT = {
    "one extent at a time": _OneByOne,
    "extents that repeat a state": _Repeated,
    "extents longer than the question": _Long,
    "an error for every question": _Failing,
    "no context": _NoAnswerToTheContext,
    "flags of the future": _UnknownFlags,
}


class _NoExtents(Double):
    def block_status(self, talk: Talk, request: Request) -> None:
        self.send_extents(talk, request, [])


class _ZeroLength(Double):
    def block_status(self, talk: Talk, request: Request) -> None:
        self.send_extents(talk, request, [(0, HOLE | ZERO)] * 3)


class _UnknownContext(Double):
    def block_status(self, talk: Talk, request: Request) -> None:
        talk.chunk(request, REPLY_BLOCK_STATUS, struct.pack(">III", CONTEXT_ID + 1, request.length, HOLE | ZERO))


class _HalfAnExtent(Double):
    def block_status(self, talk: Talk, request: Request) -> None:
        talk.chunk(request, REPLY_BLOCK_STATUS, struct.pack(">IIH", CONTEXT_ID, request.length, 3))


class _OtherContextSelected(Double):
    """Selects what nobody asked for."""

    def set_contexts(self, talk: Talk, option: int) -> None:
        talk.reply_to_option(option, REP_META_CONTEXT, struct.pack(">I", CONTEXT_ID) + b"x-other:thing")
        super().set_contexts(talk, option)


WRONG = {
    "no extent": _NoExtents,
    "extents of length 0": _ZeroLength,
    "extents of another context": _UnknownContext,
    "half an extent": _HalfAnExtent,
    "a context nobody asked for": _OtherContextSelected,
}


@pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
@pytest.mark.parametrize("name", RIGHT)
def test_every_allowed_answer_gives_the_same_copy(name: str, extended: bool, ring: str) -> None:
    source, target = RIGHT[name](bytearray(CONTENT), extended=extended), Double(bytearray(b"\xee" * SIZE))
    with double(source) as one, double(target) as two:
        copy("--ring", ring, "--workers", "2", one, two).succeeded()
    assert target.content == CONTENT
    assert (source.extended_talks > 0) == extended
    assert (source.count(CMD_BLOCK_STATUS) > 0) == (name != "no context")


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_breaks_the_protocol_never_gives_a_wrong_copy(name: str, ring: str) -> None:
    """Zeroes are claimed for data: whoever believed it would write a wrong destination and call it success."""
    target = Double(bytearray(b"\xee" * SIZE))
    with double(WRONG[name](bytearray(CONTENT))) as one, double(target) as two:
        outcome = copy("--ring", ring, one, two)
    if outcome.code == 0:
        assert target.content == CONTENT
    else:
        outcome.failed(1, saying=["source", "protocol"])
