"""The same bytes give the same events, however they are cut: the machines must not care what a receive brings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common.errors import NbdshardError
from nbdshard.common.nbd.client import Arriving, Client, Done, Event
from nbdshard.common.nbd.connecter import Connecter, Goal, Wishes
from nbdshard.common.nbd.constants import Info, Option, OptionReply, ReplyType
from nbdshard.common.nbd.replies import CHUNKS
from nbdshard.common.nbd.wire import pack_block_status, pack_error, pack_hole, pack_simple_reply
from nbdshard.common.nbd.wire_options import (
    pack_export_name_reply,
    pack_greeting,
    pack_info_block_size,
    pack_info_text,
    pack_meta_context,
    pack_server,
)
from nbdshard.common.ranges import Range
from support.nbd_feeding import (
    ACK,
    GREETING,
    MIB,
    UNSUP,
    an_export,
    before_go,
    chunk,
    feed_client,
    feed_connecter,
    info,
    reply,
    send_all,
    size_info,
    sizes_of,
)

CUTS = st.lists(st.integers(1, 60), max_size=40)

# -- negotiation -------------------------------------------------------------------------------------------------------

CONTEXT = reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, pack_meta_context(3, "base:allocation"))
NEGOTIATIONS = {
    "structured": (
        Wishes("disk"),
        before_go()
        + info(pack_info_block_size(1, 4096, MIB))
        + info(pack_info_text(Info.DESCRIPTION, "a disk"))
        + size_info()
        + reply(Option.GO, ACK),
    ),
    "extended": (
        Wishes("disk"),
        GREETING
        + reply(Option.EXTENDED_HEADERS, ACK)
        + CONTEXT
        + reply(Option.SET_META_CONTEXT, ACK)
        + size_info()
        + reply(Option.GO, ACK),
    ),
    "export name": (
        Wishes("disk", structured=False),
        pack_greeting(1) + reply(Option.GO, UNSUP, b"too old") + pack_export_name_reply(MIB, 1, zeroes=True),
    ),
    "newstyle": (Wishes("disk"), pack_greeting(2) + pack_export_name_reply(MIB, 1, zeroes=False)),
    "info": (
        Wishes("disk", structured=False, goal=Goal.INFO),
        GREETING + size_info(option=Option.INFO) + reply(Option.INFO, ACK),
    ),
    "list": (
        Wishes(goal=Goal.LIST),
        GREETING + reply(Option.LIST, OptionReply.SERVER, pack_server("one", "x")) + reply(Option.LIST, ACK),
    ),
    "refused": (Wishes(), before_go() + reply(Option.GO, OptionReply.ERR_UNKNOWN, b"no such disk")),
    "broken": (Wishes(), before_go() + size_info(1 << 63)),
    "not NBD": (Wishes(), b"220 mail.example.com ESMTP\r\n"),
}


def negotiate(name: str, cuts: list[int]) -> tuple[object, ...]:
    """Everything observable: events, error, bytes sent, what was left of the stream, the state."""
    wishes, stream = NEGOTIATIONS[name]
    connecter = Connecter(wishes, "srv")
    events: list[object] = []
    error, rest = "", b""
    try:
        found, rest = feed_connecter(connecter, stream + b"the transmission phase", sizes_of(*cuts))
        events += found
    except NbdshardError as caught:
        error = repr(caught)
    return events, error, b"".join(connecter.data_to_send()), rest, connecter.state


@given(st.sampled_from(sorted(NEGOTIATIONS)), CUTS)
def test_a_negotiation_does_not_depend_on_the_cuts(name: str, cuts: list[int]) -> None:
    assert negotiate(name, cuts) == negotiate(name, [])


@pytest.mark.parametrize("name", sorted(NEGOTIATIONS))
def test_a_negotiation_survives_byte_by_byte(name: str) -> None:
    assert negotiate(name, [1] * len(NEGOTIATIONS[name][1])) == negotiate(name, [])


# -- transmission ------------------------------------------------------------------------------------------------------

READS = [Range.of(1000, 37), Range.of(0, 64), Range.of(5000, 1)]  # handles 0 to 2
STATUS = Range.of(4096, 4096)  # handles 3 and 4
CONTENTS = bytes(range(7, 253)) * 40
FEW_KEPT = {  # so that a surplus is short enough for a test
    **CHUNKS,
    5: type(CHUNKS[5])(5, CHUNKS[5].complete, 12, 4 + 8 * 100, step=8, kept_max=4 + 8 * 2, content=True),
}
DESCRIPTORS = [(512, 0), (512, 3), (1024, 1), (512, 0), (4096, 2)]


@st.composite
def answers(draw: st.DrawFn, mode: str) -> bytes:
    """Correct replies to all requests, in chunks that are cut, ordered and mixed at random."""
    wide = mode == "extended"

    def one(last: bool, kind: int, handle: int, payload: bytes, offset: int) -> bytes:
        return chunk(int(last), kind, handle, payload, extended=wide, offset=offset)

    queues: list[list[bytes]] = []
    for handle, where in enumerate(READS):
        if mode == "simple":
            queues.append([pack_simple_reply(handle) + CONTENTS[where.start : where.end]])
            continue
        at, pieces = where.start, []
        while at < where.end:
            end = min(where.end, at + draw(st.integers(3, 60)))  # fewer chunks than are held to be babbling
            pieces.append(
                (ReplyType.OFFSET_HOLE, pack_hole(at, end - at))
                if draw(st.booleans())
                else (ReplyType.OFFSET_DATA, at.to_bytes(8, "big") + CONTENTS[at:end])
            )
            at = end
        if draw(st.booleans()):
            pieces.append((ReplyType.ERROR_OFFSET, pack_error(5, b"bad", where.start)))
        chunks = [one(False, kind, handle, payload, where.start) for kind, payload in draw(st.permutations(pieces))]
        queues.append([*chunks, one(True, ReplyType.NONE, handle, b"", where.start)])
    if mode != "simple":
        for handle in (3, 4):
            kind = ReplyType.BLOCK_STATUS_EXT if wide and draw(st.booleans()) else ReplyType.BLOCK_STATUS
            payload = pack_block_status(7, DESCRIPTORS, wide=kind == ReplyType.BLOCK_STATUS_EXT)
            queues.append([one(True, kind, handle, payload, STATUS.start)])
    queues.append([one(True, 0, 5, b"", 0) if mode != "simple" else pack_simple_reply(5, 28)])
    stream = b""
    while any(queues):
        stream += draw(st.sampled_from([queue for queue in queues if queue])).pop(0)
    return stream


def run(mode: str, stream: bytes, cuts: list[int]) -> tuple[list[Event], list[bytes]]:
    client = Client(an_export(mode=mode), "srv", 6, chunks=FEW_KEPT)
    buffers = [bytearray(b"\xee" * where.length) for where in READS]
    for handle, (where, buffer) in enumerate(zip(READS, buffers, strict=True)):
        client.read(handle, where, memoryview(buffer))
    if mode != "simple":
        client.block_status(3, STATUS)
        client.block_status(4, STATUS)
    client.flush(5)
    send_all(client)
    events = feed_client(client, stream, sizes_of(*cuts))
    assert client.pending == 0
    return events, [bytes(buffer) for buffer in buffers]


def plain(event: Event) -> tuple[object, ...]:
    """Errors are exceptions, which do not compare by their contents."""
    error = str(event.error) if isinstance(event, Done) else ""
    return type(event), event.handle, error, getattr(event, "extents", None)


def same(mode: str, stream: bytes, cuts: list[int]) -> None:
    expected, buffers = run(mode, stream, [])
    events, found = run(mode, stream, cuts)
    assert list(map(plain, events)) == list(map(plain, expected))
    assert found == buffers


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_replies_do_not_depend_on_the_cuts(mode: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(answers(mode), CUTS)
    def check(stream: bytes, cuts: list[int]) -> None:
        same(mode, stream, cuts)

    check()


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_replies_survive_byte_by_byte(mode: str) -> None:
    @settings(max_examples=20, deadline=None)
    @given(answers(mode))
    def check(stream: bytes) -> None:
        same(mode, stream, [1] * len(stream))

    check()


def test_the_data_that_was_asked_for_is_what_arrives() -> None:
    stream = b"".join(
        pack_simple_reply(handle) + CONTENTS[READS[handle].start : READS[handle].end] for handle in (2, 0, 1)
    )
    events, buffers = run("simple", stream + pack_simple_reply(5), [])
    assert events == [Arriving(2), Done(2), Arriving(0), Done(0), Arriving(1), Done(1), Done(5)]
    assert buffers == [CONTENTS[where.start : where.end] for where in READS]


def test_extents_beyond_those_that_are_kept_are_dropped_as_they_arrive() -> None:
    client = Client(an_export(), "srv", 6, chunks=FEW_KEPT)
    client.block_status(3, STATUS)
    client.flush(5)
    send_all(client)
    stream = chunk(1, 5, 3, pack_block_status(7, DESCRIPTORS)) + chunk(1, 0, 5)
    assert feed_client(client, stream) == [
        Done(3, None, [(Range(4096, 4608), 0), (Range(4608, 5120), 3)]),
        Done(5),
    ]
