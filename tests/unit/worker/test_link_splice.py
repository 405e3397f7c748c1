"""worker/link.py and worker/direct.py on real sockets: payload through pipes, from and to servers of every kind."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from nbdshard.common import logs
from nbdshard.common.ranges import Range
from support.doubles import (
    ENOSPC,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    REPLY_OFFSET_HOLE,
    Double,
    Request,
    Talk,
    double,
)
from support.failing import FAILURES, Crumbling, FailsFirst, RefusesFirst
from support.images import KIB, MIB, random_bytes
from support.link_bench import LinkBench, link_bench

SIZE = 4 * MIB
CONTENT = random_bytes(SIZE)


def source_double() -> Double:
    return Double(bytearray(CONTENT))


def target_double() -> Double:
    return Double(bytearray(SIZE))


# -- round trips ------------------------------------------------------------------------------------------------------


def test_what_is_read_through_pipes_and_written_from_them_is_the_same_bytes(bench: LinkBench, tcp: bool) -> None:
    server = target_double()
    with double(source_double(), tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        lengths = [MIB, 1, 4095, 65_537, 512 * KIB, MIB, 3]
        start = 0
        for handle, length in enumerate(lengths):
            where = Range.of(start, length)
            payload = bench.read_piped(source, handle, where)
            assert payload.in_memory == 0
            bench.done(target.write(handle, where, payload))
            assert payload.pipe.held == 0
            bench.pool.give(payload)
            start += length
        bench.leave()
    assert server.content == CONTENT[:start] + bytes(SIZE - start)
    assert (source.lost, target.lost) == ([], [])


def test_several_payloads_are_under_way_at_a_time_and_written_in_whatever_order(bench: LinkBench, tcp: bool) -> None:
    server = target_double()
    with double(source_double(), tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        pieces = list(Range(0, SIZE).split(256 * KIB))
        waiting = list(enumerate(pieces))
        payloads = {}
        written = 0

        def begin() -> None:
            if waiting:
                number, where = waiting.pop()
                handle = number % 16
                payloads[handle] = (where, bench.room(where.length))
                source.read(handle, *payloads[handle])

        def write(handle: int) -> None:
            assert source.answers[handle].error is None
            target.write(handle, *payloads[handle])

        def next_one(handle: int) -> None:
            nonlocal written
            assert target.answers[handle].error is None
            bench.pool.give(payloads.pop(handle)[1])
            written += 1
            begin()

        source.on_done, target.on_done = write, next_one
        for _ in range(4):
            begin()
        bench.until("everything to be written", lambda: written == len(pieces))
        bench.leave()
    assert server.content == CONTENT


def test_requests_with_payload_in_memory_and_without_any_share_a_spliced_connection(bench: LinkBench) -> None:
    server = source_double()
    with double(server) as uri:
        end = bench.open(uri, "source")
        buffer = bytearray(MIB)
        piped = bench.room(MIB)
        answers = [
            end.read(0, Range.of(5, MIB), memoryview(buffer)),
            end.read(1, Range.of(MIB, MIB), piped),
            end.extents(2, Range(0, SIZE)),
        ]
        bench.done(*answers)
        assert buffer == CONTENT[5 : 5 + MIB]
        assert bench.bytes_of(piped) == CONTENT[MIB : 2 * MIB]
        answers = [
            end.write(0, Range.of(0, MIB), memoryview(buffer)),
            end.write(1, Range.of(2 * MIB, MIB), piped),
            end.zero(2, Range.of(3 * MIB, MIB)),
            end.flush(3),
        ]
        bench.done(*answers)
        assert all(answer.error is None for answer in answers)
    assert server.content == CONTENT[5 : 5 + MIB] + CONTENT[MIB : 2 * MIB] * 2 + bytes(MIB)
    assert end.lost == []


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_replies_of_both_kinds_fill_pipes(bench: LinkBench, structured: bool) -> None:
    server = source_double()
    server.structured = structured
    with double(server) as uri:
        source = bench.open(uri, "source")
        for handle in range(3):
            payload = bench.read_piped(source, handle, Range.of(handle * MIB, MIB))
            assert bench.bytes_of(payload) == CONTENT[handle * MIB : (handle + 1) * MIB]


def test_extended_replies_fill_pipes(bench: LinkBench) -> None:
    server = source_double()
    server.extended = True
    with double(server) as uri:
        source = bench.open(uri, "source")
        payload = bench.read_piped(source, 0, Range.of(0, MIB))
        assert bench.bytes_of(payload) == CONTENT[:MIB]
    assert server.extended_talks == 1


class InOddPieces(Double):
    """Answers a read with data, holes and data out of order."""

    def read(self, talk: Talk, request: Request) -> None:
        third = request.length // 3
        borders = [0, third, 2 * third, request.length]
        for index in (0, 2, 1):
            at, end = request.offset + borders[index], request.offset + borders[index + 1]
            if index == 1:
                talk.chunk(request, REPLY_OFFSET_HOLE, struct.pack(">QI", at, end - at), flags=0)
            else:
                talk.chunk(request, REPLY_OFFSET_DATA, struct.pack(">Q", at) + self.content[at:end], flags=0)
        talk.chunk(request, REPLY_NONE)


def test_payload_partly_in_memory_is_written_as_one(bench: LinkBench, tcp: bool) -> None:
    server = target_double()
    with double(InOddPieces(bytearray(CONTENT)), tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        for handle in range(3):
            where = Range.of(handle * 90_000, 90_000)
            payload = bench.read_piped(source, handle, where)
            assert payload.in_memory == 60_000
            bench.done(target.write(handle, where, payload))
    expected = b"".join(
        CONTENT[at : at + 30_000] + bytes(30_000) + CONTENT[at + 60_000 : at + 90_000] for at in (0, 90_000, 180_000)
    )
    assert server.content == expected + bytes(SIZE - 270_000)


# -- small pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("piece", "length"), [(1, 3000), (512, 200_000), (1448, 500_000)])
def test_payload_that_comes_in_small_pieces_arrives(bench: LinkBench, tcp: bool, piece: int, length: int) -> None:
    crumbling, server = Crumbling(bytearray(CONTENT)), target_double()
    crumbling.piece = piece
    with double(crumbling, tcp=tcp) as one, double(server, tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        payloads = [bench.room(length) for _ in range(2)]
        bench.done(*(source.read(handle, Range.of(handle, length), payloads[handle]) for handle in range(2)))
        for handle, payload in enumerate(payloads):
            bench.done(target.write(handle, Range.of(MIB * handle, length), payload))
    for handle in range(2):
        assert server.content[MIB * handle : MIB * handle + length] == CONTENT[handle : handle + length]


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """The lines logged so far."""
    logs.set_up("", logs.Level.INFO)
    lines: list[str] = []

    def logged() -> list[str]:
        lines.extend(capfd.readouterr().err.splitlines())
        return lines

    yield logged
    logs.set_up("", logs.Level.WARNING)


def test_a_pipe_that_is_full_early_is_said_once_and_the_rest_goes_through_memory(
    ring: str, log: Callable[[], list[str]]
) -> None:
    server = target_double()
    with (
        link_bench(ring, pipe_size=64 * KIB) as bench,
        double(Crumbling(bytearray(CONTENT))) as one,
        double(server) as two,
    ):
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        for handle in range(3):
            where = Range.of(handle * 64 * KIB, 64 * KIB)
            payload = bench.read_piped(source, handle, where)
            assert 0 < payload.spilled_at < 64 * KIB
            assert payload.in_memory == 64 * KIB - payload.spilled_at
            assert bench.bytes_of(payload) == CONTENT[where.start : where.end]
            bench.done(target.write(handle, where, payload))
            bench.pool.give(payload)
        uri = source.link.peer
    assert server.content[: 192 * KIB] == CONTENT[: 192 * KIB]
    said = [line for line in log() if "small pieces" in line]
    assert len(said) == 1
    assert said[0].startswith(f"nbdshard: {uri}: its data comes in small pieces: a pipe of 65536 bytes was full with ")
    assert said[0].endswith("; the rest of such payload goes through a buffer")


def test_a_pipe_that_is_large_enough_is_never_called_full(
    bench: LinkBench, tcp: bool, log: Callable[[], list[str]]
) -> None:
    with double(source_double(), tcp=tcp) as uri:
        source = bench.open(uri, "source")
        for handle in range(12):
            payload = bench.room(MIB)
            bench.done(source.read(handle, Range.of(handle * 256 * KIB, MIB), payload))
            assert payload.spilled_at == -1
            bench.pool.give(payload)
    assert log() == []


# -- errors of requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAILURES)
def test_a_read_that_fails_wherever_the_error_stands_leaves_its_neighbours_alone(bench: LinkBench, name: str) -> None:
    server = FailsFirst(bytearray(CONTENT))
    server.reply = FAILURES[name]
    with double(server) as uri:
        source = bench.open(uri, "source")
        payloads = [bench.room(100_000) for _ in range(3)]
        offsets = (MIB, 0, 2 * MIB)
        answers = [
            source.read(handle, Range.of(offset, 100_000), payloads[handle]) for handle, offset in enumerate(offsets)
        ]
        bench.done(*answers)
        assert [answer.error is None for answer in answers] == [True, False, True]
        assert str(answers[1].error) == "EIO (broken)"
        for handle in (0, 2):
            assert bench.bytes_of(payloads[handle]) == CONTENT[offsets[handle] : offsets[handle] + 100_000]
        bench.pool.give(payloads[1])
        again = bench.read_piped(source, 1, Range.of(3 * MIB, 100_000))
        assert again.pipe is payloads[1].pipe
        assert bench.bytes_of(again) == CONTENT[3 * MIB : 3 * MIB + 100_000]
    assert source.lost == []


class Full(Double):
    """Has no space left for what is written at offset 0."""

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        if request.offset == 0:
            talk.done(request, ENOSPC, "no space")
        else:
            super().write(talk, request, data)


def test_a_write_that_fails_has_emptied_its_pipe_and_leaves_its_neighbours_alone(bench: LinkBench) -> None:
    server = Full(bytearray(SIZE))
    with double(source_double()) as one, double(server) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        offsets = (MIB, 0, 2 * MIB)
        payloads = [bench.read_piped(source, handle, Range.of(handle * MIB, MIB)) for handle in range(3)]
        answers = [target.write(each, Range.of(offset, MIB), payloads[each]) for each, offset in enumerate(offsets)]
        bench.done(*answers)
        assert [str(answer.error) for answer in answers] == ["None", "ENOSPC (no space)", "None"]
        assert [payload.pipe.held for payload in payloads] == [0, 0, 0]
    assert server.content == bytes(MIB) + CONTENT[:MIB] + CONTENT[2 * MIB : 3 * MIB] + bytes(MIB)


def test_an_error_that_overtakes_the_payload_is_told_when_all_of_it_has_left(bench: LinkBench, tcp: bool) -> None:
    with double(source_double(), tcp=tcp) as one, double(RefusesFirst(bytearray(SIZE)), tcp=tcp) as two:
        source, target = bench.open(one, "source"), bench.open(two, "destination")
        for handle in range(3):
            payload = bench.read_piped(source, handle, Range.of(0, MIB))
            answer = target.write(handle, Range.of(0, MIB), payload)
            bench.done(answer)
            assert str(answer.error) == "EIO"
            assert payload.pipe.held == 0
            bench.pool.give(payload)
        assert target.lost == []
