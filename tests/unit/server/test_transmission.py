"""The ways of a request: through a pipe, at once, away and later; and what of each is seen from outside."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from nbdshard.common.limits import INLINE_SECONDS_MAX, MIB, SERVED_AT_ONCE, SERVER_BYTES_MAX
from nbdshard.common.nbd.client import Done
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend, Place
from nbdshard.server.backends.file import FileBackend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.budget import Budget, Share
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.device import Hole
from nbdshard.server.exports import Exports
from nbdshard.server.layers.base import Passing
from support import images
from support.visitor import WAYS, Visitor, exporting, visiting
from support.waiting import wait_for

SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return images.random_image(tmp_path / "image", SIZE)


# -- through pipes and past them


@pytest.mark.parametrize("way", WAYS)
def test_requests_of_any_size_and_place_leave_what_a_reference_holds(image: Path, way: str) -> None:
    """Large ones go through pipes, small ones do not, and those around a bound go either way."""
    chance = random.Random(2)
    reference = bytearray(image.read_bytes())
    with visiting(FileBackend(image), WAYS[way]) as visitor:
        for _ in range(150):
            length = chance.choice([1, 4096, 5000, 65_536, 262_143, 262_144, 300_001, MIB, MIB + 1, 3 * MIB])
            start = chance.choice([0, chance.randrange(SIZE - length), SIZE - length])
            where = Range(start, start + length)
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                assert visitor.write(where, data, fua=chance.random() < 0.3) == ""
                reference[where.start : where.end] = data
            else:
                assert visitor.read(where) == reference[where.start : where.end]
    assert image.read_bytes() == reference


def test_many_large_requests_at_once_are_all_answered(image: Path) -> None:
    content = image.read_bytes()
    with visiting(FileBackend(image)) as visitor:
        into = [bytearray(262_144) for _ in range(16)]
        for index, buffer in enumerate(into):
            visitor.client.read(index, Range.of(index * 262_144, 262_144), memoryview(buffer))
        for index in range(16, 32):
            visitor.client.write(index, Range.of(index * 262_144 - 4 * MIB, 262_144), [content[:262_144]])
        assert not any(done.error for done in visitor.ask(count=32))
    assert image.read_bytes() == content[:262_144] * 16 + content[4 * MIB :]


def test_payload_in_tiny_pieces_fills_the_pipe_early_and_arrives(image: Path) -> None:
    data = random.Random(3).randbytes(400_000)
    with visiting(FileBackend(image)) as visitor:
        visitor.client.write(0, Range.of(1000, len(data)), [data])
        stream = b"".join(map(bytes, in_memory(visitor.client.data_to_send())))
        for start in range(0, len(stream), 500):
            visitor.socket.sendall(stream[start : start + 500])
        visitor.client.sent(len(stream))
        assert visitor.answers(1)[0].error is None
    assert image.read_bytes()[1000 : 1000 + len(data)] == data


@pytest.mark.parametrize("length", [4096, 300_000, 3 * MIB])
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_became_shorter_is_an_error_and_the_next_request_is_served(
    image: Path, way: str, length: int
) -> None:
    with visiting(FileBackend(image), WAYS[way]) as visitor:
        os.truncate(image, 5000)
        assert visitor.read(Range.of(4000, length)) == "EIO"
        assert visitor.read(Range(0, 5000)) == image.read_bytes()


# -- at once, and away


class Slow(FileBackend):
    """Nothing is at hand, and what is read begins, and ends when it may. So do flushes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun, self.may_end = threading.Semaphore(0), threading.Event()

    def _wait(self) -> None:
        self.begun.release()
        assert self.may_end.wait(30)

    def read_now(self, where: Range) -> None:
        return None

    def reading(self, where: Range) -> AbstractContextManager[None]:
        return nullcontext(None)

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        self._wait()
        return super().read(where)

    def flush(self) -> None:
        self._wait()
        super().flush()


@pytest.mark.parametrize("length", [4096, 300_000])
def test_what_is_not_at_hand_is_read_side_by_side(image: Path, length: int) -> None:
    backend = Slow(image)
    with visiting(backend) as visitor:
        into = [bytearray(length) for _ in range(8)]
        for index, buffer in enumerate(into):
            visitor.client.read(index, Range.of(index * length, length), memoryview(buffer))
        visitor.push()
        assert all(backend.begun.acquire(timeout=30) for _ in range(8))
        backend.may_end.set()
        assert not any(done.error for done in visitor.answers(8))
        assert b"".join(into) == image.read_bytes()[: 8 * length]


def test_flushes_that_hang_do_not_hold_up_anybodys_reads_and_writes(image: Path) -> None:
    backend = Slow(image)
    exports = exporting(backend)
    visitors = [Visitor(exports) for _ in range(3)]
    for visitor in visitors:
        for handle in range(1, 17):
            visitor.client.flush(handle)
        visitor.push()
    assert backend.begun.acquire(timeout=30)
    for visitor in visitors:
        assert visitor.write(Range(0, 4096), b"w" * 4096) == ""
        assert visitor.write(Range(0, MIB), b"w" * MIB) == ""
    backend.may_end.set()
    for visitor in visitors:
        assert not any(done.error for done in visitor.answers(16))
        visitor.go()
    backend.close()


def test_fua_is_answered_when_a_flush_has_returned(image: Path) -> None:
    for length in (4096, 300_000):
        backend = Slow(image)
        with visiting(backend) as visitor:
            visitor.client.write(0, Range.of(0, length), [b"f" * length], fua=True)
            visitor.push()
            assert backend.begun.acquire(timeout=30)
            assert image.read_bytes()[:length] == b"f" * length  # written, and not answered:
            visitor.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                visitor.socket.recv(1)
            visitor.socket.settimeout(30)
            backend.may_end.set()
            assert visitor.answers(1)[0].error is None


class Lost(FileBackend):
    def flush(self) -> None:
        raise OSError(errno.EIO, "a write-back failed")


@pytest.mark.parametrize("length", [4096, 300_000])
def test_fua_that_cannot_be_made_durable_is_an_error(image: Path, length: int) -> None:
    with visiting(Lost(image)) as visitor:
        assert visitor.write(Range.of(0, length), bytes(length), fua=True) == "EIO"
        assert visitor.write(Range.of(0, length), bytes(length)) == ""


def test_after_a_write_that_took_long_others_do_not_wait_for_one_another(image: Path) -> None:
    class Throttled(FileBackend):
        """A disk whose queue is full: every call waits, and notes whose it was."""

        def __init__(self) -> None:
            super().__init__(image)
            self.threads: set[int] = set()

        def write(self, where: Range, data: memoryview) -> None:
            self.threads.add(threading.get_ident())
            end = time.monotonic() + INLINE_SECONDS_MAX
            wait_for("the clock to go on", lambda: time.monotonic() > end)
            super().write(where, data)

    backend = Throttled()
    with visiting(backend) as visitor:
        for length in (4096, 4096, 300_000):
            assert visitor.write(Range.of(0, length), bytes(length)) == ""
    assert visitor.thread.ident in backend.threads
    assert len(backend.threads) > 1


def test_a_layer_that_is_not_asked_what_it_would_do_gets_every_request(image: Path) -> None:
    class Counting(Passing):
        count = 0

        def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
            self.count += 1
            return super().read(where)

    layer = Counting(FileBackend(image))
    with visiting(layer) as visitor:
        for length in (1, 4096, 300_000):
            assert visitor.read(Range.of(0, length)) == image.read_bytes()[:length]
    assert layer.count == 3


def test_who_stops_asking_gets_its_answers(image: Path) -> None:
    backend = Slow(image)
    with visiting(backend) as visitor:
        into = bytearray(4096)
        visitor.client.read(0, Range(0, 4096), memoryview(into))
        visitor.push()
        visitor.socket.shutdown(socket.SHUT_WR)
        assert backend.begun.acquire(timeout=30)
        backend.may_end.set()
        assert visitor.answers(1) == [Done(0)]
        assert visitor.socket.recv(1) == b""
    assert into == image.read_bytes()[:4096]


# -- memory


def unread(exports: Exports, length: int, count: int = 16) -> Visitor:
    """Somebody who asks for much and reads nothing."""
    visitor = Visitor(exports)
    for handle in range(count):
        visitor.client.read(handle, Range.of(0, length), memoryview(bytearray(length)))
    visitor.push()
    return visitor


def test_clients_that_read_nothing_hold_a_bounded_part_and_others_are_served() -> None:
    backend = MemoryBackend(64 * MIB)
    backend.write(Range(0, 64 * MIB), memoryview(bytes(64 * MIB)))
    exports = exporting(backend)
    idle = [unread(exports, length) for length in (MIB, 8 * MIB, 32 * MIB, 65_536) for _ in range(3)]
    wait_for("them to hold what they can", lambda: exports.budget.free < SERVER_BYTES_MAX // 4)
    busy = Visitor(exports)
    for _ in range(20):
        assert busy.read(Range(0, 4096)) == bytes(4096)
        assert busy.write(Range(0, 4096), bytes(4096)) == ""
    for visitor in idle:
        visitor.go()
    assert busy.read(Range(0, 32 * MIB)) == bytes(32 * MIB)  # one request of any size has its turn
    busy.go()
    assert exports.budget.free == Budget().free
    backend.close()


def test_who_holds_memory_and_reads_nothing_is_cut_off_where_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdshard.server.transmission.SERVED_STALL_SECONDS", 0.05)
    monkeypatch.setattr("nbdshard.server.budget.SERVED_STALL_SECONDS", 0.05)
    backend = MemoryBackend(32 * MIB)
    backend.write(Range(0, 32 * MIB), memoryview(bytes(32 * MIB)))
    exports = exporting(backend)
    idle = unread(exports, MIB)
    wait_for("it to hold something", lambda: exports.budget.free < Budget().free)
    busy = Visitor(exports)
    assert busy.read(Range(0, 32 * MIB)) == bytes(32 * MIB)
    idle.thread.join(30)
    assert not idle.thread.is_alive()
    idle.go()
    busy.go()
    assert exports.budget.free == Budget().free
    backend.close()


def test_reads_that_wait_for_their_place_at_the_crew_hold_their_memory_once(image: Path) -> None:
    backend = Slow(image)
    exports = exporting(backend)
    visitor = Visitor(exports)
    for handle in range(32):  # of which SERVED_AT_ONCE are away; the next one is looked at again with every answer
        visitor.client.read(handle, Range(0, 65_536), memoryview(bytearray(65_536)))
    visitor.push()
    assert all(backend.begun.acquire(timeout=30) for _ in range(SERVED_AT_ONCE))
    backend.may_end.set()
    assert not any(done.error for done in visitor.answers(32))
    assert visitor.read(Range(0, 100)) == image.read_bytes()[:100]
    wait_for("all of it to be given back", lambda: exports.budget.free == Budget().free)
    visitor.go()
    backend.close()


def may_take(share: Share, count: int) -> bool:
    if taken := share.take(count):
        share.give(count)
    return taken


def test_nobody_waits_for_who_does_not_need_the_memory_any_more(image: Path) -> None:
    class Cold(FileBackend):
        """What is read comes to hand while it waits for memory."""

        is_at_hand = False

        def reading(self, where: Range) -> AbstractContextManager[Place | None]:
            return super().reading(where) if self.is_at_hand else nullcontext(None)

    backend = Cold(image)
    exports = exporting(backend)
    exports.budget = Budget(MIB, reserve=0)
    first, second, third = (exports.budget.join(bool, bool) for _ in range(3))
    assert first.take(MIB // 2) and second.take(MIB // 4)
    visitor = Visitor(exports)
    into = bytearray(MIB // 2)
    visitor.client.read(0, Range(0, len(into)), memoryview(into))
    visitor.push()
    wait_for("it to have its turn when there is memory", lambda: not may_take(third, 1))
    backend.is_at_hand = True
    second.give(MIB // 4)
    assert visitor.answers(1) == [Done(0)]
    assert into == image.read_bytes()[: len(into)]
    assert may_take(third, MIB // 4)  # it went by a pipe, and has no turn any more
    visitor.go()
    for other in (first, second, third):
        other.leave()
    backend.close()


def test_who_vanishes_while_it_is_served_leaves_nothing(image: Path) -> None:
    backend = Slow(image)
    exports = exporting(backend)
    visitor = Visitor(exports)
    visitor.client.read(0, Range(0, MIB), memoryview(bytearray(MIB)))
    visitor.push()
    assert backend.begun.acquire(timeout=30)
    visitor.socket.close()
    backend.may_end.set()
    visitor.go()
    assert exports.budget.free == Budget().free
    backend.close()


# -- chunks that are files


@pytest.fixture
def chunks(tmp_path: Path) -> Backend:
    (tmp_path / "chunks").mkdir()
    return open_backend(Wanted("disk", "sharded", f"file:{tmp_path}/chunks/?size={SIZE}&chunk=1M"))


def test_chunks_are_spliced_and_hold_what_a_reference_holds(chunks: Backend) -> None:
    chance = random.Random(5)
    reference = bytearray(SIZE)
    with visiting(chunks) as visitor:
        for _ in range(100):
            length = chance.choice([4096, 262_144, 300_001, MIB, MIB + 1])
            start = chance.choice([0, MIB, chance.randrange(SIZE - length)])
            where = Range(start, start + length)
            if chance.random() < 0.6:
                data = chance.choice([chance.randbytes(length), bytes(length), bytes(5000) + b"x" * (length - 5000)])
                data = data[:length].ljust(length, b"y")
                assert visitor.write(where, data) == ""
                reference[where.start : where.end] = data
            assert visitor.read(where) == reference[where.start : where.end]


def test_zeroes_that_went_through_a_pipe_leave_no_chunk(chunks: Backend, tmp_path: Path) -> None:
    with visiting(chunks) as visitor:
        assert visitor.write(Range(0, 300_000), b"x" * 300_000) == ""
        assert (tmp_path / "chunks" / "disk.0.chunk").exists()
        assert visitor.write(Range(0, 300_000), bytes(300_000)) == ""
        assert not (tmp_path / "chunks" / "disk.0.chunk").exists()
        assert visitor.write(Range(MIB, 2 * MIB), bytes(MIB)) == ""
        assert not (tmp_path / "chunks" / "disk.1.chunk").exists()
