"""The bytes of one reply, in the pieces that must stay whole, and in any of the forms the specification allows."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from simulation.disk import DATA, HOLE, ZERO, Extent
from simulation.server_rules import CMD_BLOCK_STATUS, CMD_READ, Extents

if TYPE_CHECKING:
    from simulation.session import Request, Session

NONE, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
DONE = 1
CHUNKS_MAX = 6
CHUNK_BYTES_MIN = 512  # smaller ones are within the specification, but clients may take many of them for babble
CONTEXT_ID = 7
ZEROES = re.compile(rb"\0{%d,}" % CHUNK_BYTES_MIN)

Chunk = tuple[int, bytes]  # type, payload


def make_reply(session: Session, request: Request, error: int, chance: random.Random) -> list[bytes]:
    """All of the answer to `request`."""
    if not session.structured:
        payload = b"" if error or request.command != CMD_READ else _content(session, request)
        return [_simple(request, error) + payload]
    if request.command == CMD_READ:
        chunks = _read(session, request, error, chance)
    elif error:
        chunks = [_error(request, error, chance)]
    elif request.command == CMD_BLOCK_STATUS:
        chunks = [_block_status(session, request, chance)]
    elif not session.extended and chance.random() < 0.5:
        return [_simple(request, 0)]
    else:
        chunks = [(NONE, b"")]
    if not session.extended and error and request.command != CMD_READ and chance.random() < 0.3:
        return [_simple(request, error)]
    if chunks[-1][0] != NONE and chance.random() < 0.3:
        chunks.append((NONE, b""))
    return [
        _chunk(session, request, kind, payload, DONE if index == len(chunks) - 1 else 0)
        for index, (kind, payload) in enumerate(chunks)
    ]


def _simple(request: Request, error: int) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, request.cookie)


def _chunk(session: Session, request: Request, kind: int, payload: bytes, flags: int) -> bytes:
    if session.extended:
        fields = (0x6E8A278C, flags, kind, request.cookie, request.offset, len(payload))
        return struct.pack(">IHHQQQ", *fields) + payload
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, request.cookie, len(payload)) + payload


def _error(request: Request, error: int, chance: random.Random) -> Chunk:
    text = chance.choice((b"", b"a simulated fault"))
    head = struct.pack(">IH", error, len(text)) + text
    if request.command == CMD_READ and chance.random() < 0.5:
        return ERROR_OFFSET, head + struct.pack(">Q", request.offset)
    return ERROR, head


def _content(session: Session, request: Request) -> bytes:
    return bytes(session.server.disk.data[request.offset : request.offset + request.length])


def _read(session: Session, request: Request, error: int, chance: random.Random) -> list[Chunk]:
    """The data in chunks, in any order; with an error, some of them filled with rubbish and the error behind them."""
    data = _content(session, request)
    chunks = []
    for start, end in _cuts(data, chance):
        piece = data[start:end]
        offset = struct.pack(">Q", request.offset + start)
        if not any(piece) and chance.random() < 0.7:
            chunks.append((OFFSET_HOLE, offset + struct.pack(">I", end - start)))
        else:
            chunks.append((OFFSET_DATA, offset + (b"\xee" * len(piece) if error else piece)))
    if chance.random() < 0.5:
        chance.shuffle(chunks)
    if error:
        return [*chunks[: chance.randint(0, len(chunks))], _error(request, error, chance)]
    return chunks


def _cuts(data: bytes, chance: random.Random) -> list[tuple[int, int]]:
    """Where a reply is cut: nowhere, anywhere, or where zeroes begin and end."""
    length = len(data)
    if chance.random() < 0.4 or length < 2 * CHUNK_BYTES_MIN:
        return [(0, length)]
    count = min(CHUNKS_MAX, length // CHUNK_BYTES_MIN)
    places: Sequence[int] = range(1, length)
    if chance.random() < 0.5:
        places = sorted({at for zeroes in ZEROES.finditer(data) for at in zeroes.span()} - {0, length})
    marks = [0, *sorted(chance.sample(places, min(len(places), chance.randint(0, count - 1)))), length]
    return list(pairwise(marks))


def _block_status(session: Session, request: Request, chance: random.Random) -> Chunk:
    descriptors = [(end - start, flags) for start, end, flags in _extents(session, request, chance)]
    if session.extended:
        body = b"".join(struct.pack(">QQ", *descriptor) for descriptor in descriptors)
        return BLOCK_STATUS_EXT, struct.pack(">II", CONTEXT_ID, chance.choice((0, len(descriptors)))) + body
    body = b"".join(struct.pack(">II", *descriptor) for descriptor in descriptors)
    return BLOCK_STATUS, struct.pack(">I", CONTEXT_ID) + body


def _extents(session: Session, request: Request, chance: random.Random) -> list[Extent]:
    """True of the disk, in the form the rules want."""
    disk, rules = session.server.disk, session.rules
    found = list(disk.extents(request.offset, request.offset + request.length))
    minimum = rules.block_minimum if rules.knows_go else 1
    if rules.extents is Extents.FRAGMENTED:
        found = [piece for extent in found for piece in _fragments(extent, minimum, chance)]
    elif rules.extents is Extents.SHORT:
        found = found[: chance.randint(1, len(found))]
        start, end, flags = found[-1]
        blocks = -(-(end - start) // minimum)
        found[-1] = (start, min(end, start + minimum * chance.randint(1, blocks)), flags)
    if found[-1][1] == request.offset + request.length and chance.random() < 0.3:
        # "The last extent may extend beyond the request": as far as the disk's own extent does.
        beyond = [end for start, end, _ in disk.layout if start <= found[-1][0] < end]
        found[-1] = (found[-1][0], beyond[0], found[-1][2])
    return [(start, end, _dress(flags, chance)) for start, end, flags in found]


def _fragments(extent: Extent, minimum: int, chance: random.Random) -> list[Extent]:
    start, end, flags = extent
    blocks = -(-(end - start) // minimum)
    count = min(blocks, chance.randint(1, 4))
    marks = sorted(start + minimum * mark for mark in chance.sample(range(1, blocks), count - 1)) if count > 1 else []
    edges = [start, *marks, end]
    return [(first, last, flags) for first, last in pairwise(edges)]


def _dress(flags: int, chance: random.Random) -> int:
    """Data may be called a hole whose content is unknown; zeroes may be allocated or not."""
    if flags == DATA:
        return chance.choice((DATA, DATA, HOLE))
    return chance.choice((ZERO, ZERO | HOLE))
