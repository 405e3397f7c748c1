"""The device: against its twin, and against clients that ask for odd things or read nothing."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import BugError, ConnectionLost, IllegalEvent, ProtocolError
from nbdshard.common.limits import SERVED_BYTES_MAX, SERVED_PAYLOAD_SKIPPED_MAX, SERVED_REQUESTS_MAX
from nbdshard.common.nbd.client import Done
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import Command, CommandFlag, Errno, TransmissionFlag
from nbdshard.common.nbd.export import BlockSizes, Export
from nbdshard.common.nbd.wire import Request as WireRequest
from nbdshard.common.nbd.wire import pack_request
from nbdshard.common.ranges import Range
from nbdshard.server.device import Device, Hole
from nbdshard.server.serving import Request
from nbdshard.server.states import DeviceState
from support.twins import FLAGS, MIB, Pair, feed_device, said_by_device

WAYS = {
    "simple": Wishes("disk", structured=False),
    "structured": Wishes("disk", extended=False),
    "extended": Wishes("disk"),
}
F = CommandFlag


def device(
    *,
    extended: bool = False,
    flags: int = FLAGS,
    requests_max: int = SERVED_REQUESTS_MAX,
    bytes_max: int = SERVED_BYTES_MAX,
) -> Device:
    export = Export("disk", MIB, TransmissionFlag(flags), structured=True, extended=extended)
    return Device(export, "client", requests_max=requests_max, bytes_max=bytes_max)


def request(command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 1) -> bytes:
    return pack_request(WireRequest(flags, command, cookie, offset, length), extended=False)


def error_of(said: bytes) -> tuple[int, str]:
    """(error, sentence) of the one structured reply in `said`."""
    error, length = struct.unpack_from(">IH", said, 20)
    assert len(said) == 26 + length
    return error, said[26:].decode()


# -- twins


@pytest.mark.parametrize("piece", [1, 5, 4096, 1 << 30])
@pytest.mark.parametrize("way", WAYS)
def test_every_command_is_asked_and_answered(way: str, piece: int) -> None:
    pair = Pair.of(WAYS[way], piece=piece)
    client, into = pair.client, memoryview(bytearray(6000))
    client.write(0, Range(512, 1512), [b"w" * 1000], fua=True)
    client.read(1, Range(0, 6000), into)
    client.flush(2)
    client.write_zeroes(3, Range(0, MIB), no_hole=True, fast_zero=True)
    client.trim(4, Range(7, 9))
    client.cache(5, Range(0, MIB))
    if way != "simple":
        client.block_status(6, Range(0, 8192), one=True)
        client.block_status(7, Range(0, 8192))
    requests = pair.ask()
    assert [each.command for each in requests][:6] == [1, 0, 3, 6, 4, 5]
    assert (requests[0].offset, requests[0].length, requests[0].payload) == (512, 1000, b"w" * 1000)
    assert (requests[0].fua, requests[1].fua) == (True, False)
    for each in reversed(requests):
        if each.command == Command.READ:
            pair.device.content(each, [Hole(1000), b"a" * 2000, b"b" * 1000, Hole(2000)])
        elif each.command == Command.BLOCK_STATUS:
            pair.device.extents(each, {"base:allocation": [(Range(0, 4096), 3), (Range(4096, 1 << 40), 0)]})
        else:
            pair.device.done(each)
    done = {each.handle: each for each in pair.answers()}
    assert sorted(done) == list(range(len(requests)))
    assert not any(each.error for each in done.values())
    assert into == bytes(1000) + b"a" * 2000 + b"b" * 1000 + bytes(2000)
    if way != "simple":
        assert done[6].extents == [(Range(0, 4096), 3)]
        assert done[7].extents == [(Range(0, 4096), 3), (Range(4096, 8192), 0)]
    assert pair.device.under_way == 0


@pytest.mark.parametrize("way", ["structured", "extended"])
def test_a_read_that_must_not_be_fragmented_is_one_chunk(way: str) -> None:
    pair = Pair.of(WAYS[way])
    into = memoryview(bytearray(3000))
    pair.client.read(0, Range(0, 3000), into, dont_fragment=True)
    pair.device.content(pair.ask()[0], [b"a" * 1000, Hole(1000), b"b" * 1000])
    assert pair.answers() == [Done(0)]
    assert into == b"a" * 1000 + bytes(1000) + b"b" * 1000


@pytest.mark.parametrize("way", WAYS)
def test_an_error_is_told_with_its_sentence(way: str) -> None:
    pair = Pair.of(WAYS[way])
    pair.client.flush(0)
    pair.device.failed(pair.ask()[0], Errno.EIO, "the disk is on fire")
    (done,) = pair.answers()
    assert done.error is not None
    assert done.error.errno_name == "EIO"
    assert done.error.message == ("" if way == "simple" else "the disk is on fire")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (request(Command.WRITE_ZEROES, 0, 512, F.FAST_ZERO), Errno.ENOTSUP),
        (request(Command.WRITE_ZEROES, 0, 512), Errno.EINVAL),
        (request(Command.TRIM, 0, 512), Errno.EINVAL),
    ],
)
def test_only_zeroes_that_are_to_be_fast_are_not_supported(asked: bytes, expected: int) -> None:
    served = device()
    (each,), _ = feed_device(served, asked)
    served.failed(each, Errno.ENOTSUP, "not here")
    assert error_of(said_by_device(served)) == (expected, "not here")


def test_an_error_that_the_protocol_does_not_know_is_invalid() -> None:
    served = device()
    (each,), _ = feed_device(served, request(Command.READ, 0, 512))
    served.failed(each, 4711, "odd")
    assert error_of(said_by_device(served)) == (Errno.EINVAL, "odd")


def test_zeroes_are_many_where_holes_cannot_be_told() -> None:
    pair = Pair.of(WAYS["simple"])
    into = memoryview(bytearray(b"x" * 200_001))
    pair.client.read(0, Range(0, 200_001), into)
    pair.device.content(pair.ask()[0], [Hole(200_001)])
    assert pair.answers() == [Done(0)]
    assert into == bytes(200_001)


# -- what an export does not allow


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (request(99, 0, 1), (Errno.EINVAL, "command 99 is not known here")),
        (request(Command.READ, 0, 0), (Errno.EINVAL, "of 0 bytes")),
        (request(Command.READ, MIB, 1), (Errno.EINVAL, "the export ends at 1048576")),
        (request(Command.READ, 2**64 - 1, 2), (Errno.EINVAL, "the export ends at 1048576")),
        (request(Command.WRITE, MIB - 1, 2) + b"ab", (Errno.ENOSPC, "the export ends at 1048576")),
        (request(Command.WRITE_ZEROES, MIB - 1, 2), (Errno.ENOSPC, "the export ends at 1048576")),
        (request(Command.TRIM, MIB - 1, 2), (Errno.EINVAL, "the export ends at 1048576")),
        (request(Command.FLUSH, 0, 1), (Errno.EINVAL, "with an offset or a length")),
        (request(Command.FLUSH, flags=F.DF), (Errno.EINVAL, "with flags 0x4")),
        (request(Command.READ, 0, 1, F.NO_HOLE), (Errno.EINVAL, "with flags 0x2")),
        (request(Command.WRITE, 0, 1, F.PAYLOAD_LEN) + b"a", (Errno.EINVAL, "with flags 0x20")),
        (request(Command.BLOCK_STATUS, 0, 1), (Errno.EINVAL, "no metadata context was agreed on")),
        (request(Command.RESIZE, 0, 1), (Errno.EINVAL, "is not known here")),
    ],
)
def test_a_request_that_is_not_allowed_is_refused_and_the_next_one_taken(
    asked: bytes, expected: tuple[int, str]
) -> None:
    served = device()
    requests, _ = feed_device(served, asked + request(Command.READ, 0, 512))
    error, sentence = error_of(said_by_device(served))
    assert error == expected[0]
    assert expected[1] in sentence
    assert [(each.command, each.length) for each in requests] == [(Command.READ, 512)]


def test_who_may_not_write_is_told_so() -> None:
    served = device(flags=FLAGS | TransmissionFlag.READ_ONLY)
    for asked in (
        request(Command.WRITE, 0, 2) + b"ab",
        request(Command.TRIM, 0, 2),
        request(Command.WRITE_ZEROES, 0, 2),
    ):
        assert feed_device(served, asked) == ([], b"")
        assert error_of(said_by_device(served))[0] == Errno.EPERM


def test_what_is_not_offered_is_refused() -> None:
    served = device(flags=TransmissionFlag.HAS_FLAGS)
    for command in (Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE):
        asked = request(command) if command == Command.FLUSH else request(command, 0, 1)
        assert feed_device(served, asked) == ([], b"")
        assert error_of(said_by_device(served))[0] == Errno.EINVAL
    assert feed_device(served, request(Command.READ, 0, 1, F.FUA))[0] == []


def test_fua_is_taken_with_every_command() -> None:
    served = device()
    requests, _ = feed_device(served, request(Command.READ, 0, 1, F.FUA) + request(Command.FLUSH, flags=F.FUA))
    assert len(requests) == 2


@pytest.mark.parametrize(("offset", "length", "is_taken"), [(0, 512, True), (256, 512, False), (512, 256, False)])
def test_block_sizes_are_enforced(offset: int, length: int, is_taken: bool) -> None:
    export = Export("disk", MIB, FLAGS, BlockSizes(512, 4096, MIB), structured=True)
    served = Device(export, "client")
    assert bool(feed_device(served, request(Command.READ, offset, length))[0]) is is_taken


def test_more_than_the_maximum_is_refused_and_its_payload_dropped() -> None:
    export = Export("disk", MIB, FLAGS, BlockSizes(1, 4096, 8192), structured=True)
    served = Device(export, "client")
    asked = request(Command.WRITE, 0, 10_000) + b"x" * 10_000 + request(Command.READ, 0, 8192)
    requests, _ = feed_device(served, asked, 999)
    assert [each.command for each in requests] == [Command.READ]
    assert "at most 8192 are served" in error_of(said_by_device(served))[1]


def test_payload_without_end_is_not_waited_for() -> None:
    with pytest.raises(ProtocolError, match="at most 33554432 bytes are served"):
        feed_device(device(), request(Command.WRITE, 0, SERVED_PAYLOAD_SKIPPED_MAX + 1))


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, 99])
def test_payload_that_does_not_belong_there_is_refused(command: int) -> None:
    """With extended headers the header itself says whether payload follows."""
    served = device(extended=True)
    flags, payload = (0, b"") if command == Command.WRITE else (F.PAYLOAD_LEN, b"x" * 512)
    asked = pack_request(WireRequest(flags, command, 1, 0, 512), extended=True) + payload
    after = pack_request(WireRequest(0, Command.FLUSH, 2, 0, 0), extended=True)
    requests, _ = feed_device(served, asked + after, 100)
    assert [each.command for each in requests] == [Command.FLUSH]


def test_another_magic_is_not_the_protocol() -> None:
    served = device()
    with pytest.raises(ProtocolError, match="magic number 0x0"):
        feed_device(served, bytes(28))
    assert (served.state, served.receive_target(), served.finished) == (DeviceState.FAILED, b"", True)


# -- bounds


def test_a_client_that_reads_nothing_is_not_listened_to() -> None:
    served = device(requests_max=4)
    asked = request(Command.READ, 0, 512) * 10
    requests, _ = feed_device(served, asked)
    assert len(requests) == 4
    assert not served.receive_target()
    for each in requests:
        served.content(each, [bytes(512)])
    assert served.is_busy  # nothing is sent yet
    assert served.resume() == []
    pieces = served.data_to_send()
    served.sent(sum(map(len, pieces)))
    assert len(served.resume()) == 4


def test_bytes_are_bounded_too() -> None:
    served = device(bytes_max=1000)
    requests, rest = feed_device(served, request(Command.READ, 0, 900) * 3)
    assert len(requests) == 2  # one request of any size is taken: the second one was under the bound, with the first
    assert not served.receive_target()
    assert rest == b""
    served.failed(requests[0], Errno.EIO)
    served.failed(requests[1], Errno.EIO)
    said_by_device(served)
    assert len(served.resume()) == 1


def test_refusals_are_bounded_as_well() -> None:
    served = device(requests_max=8)
    _, rest = feed_device(served, request(99, 0, 1) * 1000)
    assert rest
    assert len(said_by_device(served)) < 8 * 200


# -- the end


def test_what_was_asked_before_disc_is_answered() -> None:
    served = device()
    requests, rest = feed_device(served, request(Command.FLUSH) + request(Command.DISC) + b"nobody looks at this")
    assert (len(requests), served.state, served.finished) == (1, DeviceState.DISCONNECTING, False)
    assert rest == b""
    served.done(requests[0])
    assert not served.finished
    said_by_device(served)
    assert served.finished
    served.end_of_stream()


def test_who_only_stops_asking_is_answered() -> None:
    served = device()
    requests, _ = feed_device(served, request(Command.FLUSH))
    served.end_of_stream()
    assert not served.finished
    served.done(requests[0])
    assert len(said_by_device(served)) == 16
    assert served.finished


def test_a_client_that_vanishes_in_the_middle_is_told_of() -> None:
    served = device()
    requests, _ = feed_device(served, request(Command.FLUSH) + request(Command.WRITE, 0, 512)[:9])
    with pytest.raises(ConnectionLost, match="receiving a request"):
        served.end_of_stream()
    served.done(requests[0])  # into the void
    assert served.data_to_send() == []
    assert served.under_way == 0
    served = device()
    feed_device(served, request(Command.WRITE, 0, 512) + b"half")
    with pytest.raises(ConnectionLost, match="receiving a request"):
        served.end_of_stream()
    gone = device()
    gone.end_of_stream()  # between two requests it may go
    assert gone.finished


def test_payload_may_go_elsewhere() -> None:
    served = device()
    assert feed_device(served, request(Command.WRITE, 512, 300_000) + b"ab") == ([], b"")
    incoming = served.incoming
    assert incoming is not None
    assert (incoming.payload, served.incoming_left) == (b"ab", 299_998)
    assert not served.moved(299_997)
    assert served.moved(1)
    assert incoming.payload == b"ab"
    assert len(served.receive_target()) == 28  # the payload of the next one may go there too
    served.done(incoming)
    assert feed_device(served, request(Command.WRITE, 0, 2) + b"ab")[0][0].payload == b"ab"
    assert len(served.receive_target()) > 28
    with pytest.raises(BugError, match="1 bytes moved of 0"):
        served.moved(1)


def test_what_fails_before_its_payload_is_there_has_the_rest_dropped() -> None:
    served = device()
    feed_device(served, request(Command.WRITE, 0, 300_000) + b"ab")
    assert served.incoming is not None
    served.failed(served.incoming, Errno.ENOSPC, "no room")
    assert error_of(said_by_device(served)) == (Errno.ENOSPC, "no room")
    (following,), _ = feed_device(served, bytes(299_998) + request(Command.FLUSH))
    assert following.command == Command.FLUSH


def test_memory_is_free_when_the_answer_it_was_held_for_has_left() -> None:
    served = device()
    requests, _ = feed_device(served, request(Command.READ, 0, 10) + request(Command.READ, 0, 20))
    for each in requests:
        each.held = each.length
        served.content(each, [bytes(each.length)])
    said = sum(map(len, served.data_to_send()))
    assert served.sent(said - 21) == 10
    assert served.sent(20) == 0
    assert served.sent(1) == 20


def test_a_server_that_ends_refuses_what_still_comes() -> None:
    served = device()
    (before,), _ = feed_device(served, request(Command.READ, 0, 1))
    served.shut_down()
    assert feed_device(served, request(Command.WRITE, 0, 2) + b"ab" + request(Command.READ, 0, 1))[0] == []
    assert struct.unpack_from(">I", said_by_device(served), 20)[0] == Errno.ESHUTDOWN
    served.content(before, [b"x"])
    assert said_by_device(served).endswith(b"x")


# -- faults of ours


def test_an_answer_that_does_not_fit_is_a_fault_of_ours() -> None:
    served = device()
    requests, _ = feed_device(served, request(Command.READ, 0, 512) + request(Command.FLUSH))
    read, flush = requests
    with pytest.raises(BugError, match="511 bytes as the answer"):
        served.content(read, [bytes(511)])
    with pytest.raises(BugError, match="as the answer"):
        served.content(flush, [])
    with pytest.raises(BugError, match="as the answer"):
        served.extents(flush, {})
    served.done(flush)
    with pytest.raises(BugError, match="a second answer"):
        served.done(flush)
    with pytest.raises(BugError, match="1 bytes sent of 0"):
        served.sent(1)
    with pytest.raises(BugError, match="1 bytes received of 0 offered"):
        served.received(1)  # no target was asked for
    with pytest.raises(BugError, match="bytes received of"):
        served.received(1 << 20)
    closed = device()
    closed.end_of_stream()
    with pytest.raises(IllegalEvent):
        closed.received(1)


@given(st.binary(max_size=400), st.integers(1, 40), st.booleans())
def test_whatever_comes_nothing_but_a_protocol_error_does(stream: bytes, piece: int, extended: bool) -> None:
    served = device(extended=extended)
    magic = struct.pack(">I", 0x21E41C71 if extended else 0x25609513)
    try:
        requests, _ = feed_device(served, magic + stream, piece)
    except ProtocolError:
        assert served.state is DeviceState.FAILED
    else:
        assert all(isinstance(each, Request) for each in requests)
