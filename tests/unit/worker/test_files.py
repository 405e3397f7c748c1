"""worker/files.py: regular files, on real file systems and both rings."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.common import file_calls, file_map
from nbdshard.common.errors import TimedOut, UserError
from nbdshard.common.limits import KIB, MIB
from nbdshard.common.messages import EndpointAddress, Side
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Kind, Operation, Ring
from nbdshard.worker import files
from support.local_driver import RINGS, Driver, driver, file_address

HOLE, DATA = 3, 0
Open = Callable[[Path, Side], Driver]


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(ring: str) -> Iterator[Open]:
    """Opens connections that end with the test."""
    with contextlib.ExitStack() as stack:

        def opened(path: Path, side: Side) -> Driver:
            one = stack.enter_context(driver(ring, file_address(path), side))
            one.open()
            return one

        yield opened


def file_of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sparse_file(path: Path, size: int, data: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
    return path


# -- opening ----------------------------------------------------------------------------------------------------------


def test_a_source_is_described_with_its_size_and_what_it_can_do(tmp_path: Path, connect: Open) -> None:
    source = connect(file_of(tmp_path / "disk", b"x" * 1000001), "source")
    found = source.description
    assert (found.peer, found.size, found.read_only) == (str(tmp_path / "disk"), 1000001, True)
    assert (found.can_multi_conn, found.can_flush, found.can_zero, found.can_extents) == (True, True, True, True)
    assert (found.block_minimum, found.block_preferred, found.block_maximum) == (1, 4096, 32 * MIB)
    assert not found.is_stream


def test_a_destination_may_be_read_too(tmp_path: Path, connect: Open) -> None:
    destination = connect(file_of(tmp_path / "disk", b"0123456789"), "destination")
    assert not destination.description.read_only
    assert destination.read(3, 4) == b"3456"


def test_a_file_that_was_replaced_is_refused(tmp_path: Path, ring: str) -> None:
    path = file_of(tmp_path / "disk", b"old")
    address = file_address(path)
    os.rename(file_of(tmp_path / "new", b"new"), path)
    with driver(ring, address, "source") as one:
        error = one.refused()
        assert isinstance(error, UserError)
        assert str(error) == f"{path}: another file than when the copy began (it was replaced meanwhile)"
        assert one.connection.closed


def test_a_file_that_is_gone_is_refused(tmp_path: Path, ring: str) -> None:
    with driver(ring, EndpointAddress(kind="file", address=str(tmp_path / "none"), identity="1:1"), "source") as one:
        assert str(one.refused()) == f"{tmp_path}/none: cannot be opened: No such file or directory"


def test_a_directory_is_refused(tmp_path: Path, ring: str) -> None:
    with driver(ring, file_address(tmp_path), "source") as one:
        assert str(one.refused()) == f"{tmp_path}: neither a regular file nor a block device"


def test_a_fifo_is_refused_and_does_not_wait_for_a_writer(tmp_path: Path, ring: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with driver(ring, file_address(tmp_path / "fifo"), "source") as one:
        assert str(one.refused()) == f"{tmp_path}/fifo: neither a regular file nor a block device"


def test_a_destination_is_neither_created_nor_emptied(tmp_path: Path, ring: str, connect: Open) -> None:
    path = file_of(tmp_path / "disk", b"content")
    connect(path, "destination").leave()
    assert path.read_bytes() == b"content"
    address = file_address(path)
    path.unlink()
    with driver(ring, address, "destination") as one:
        one.refused()
    assert not path.exists()


def test_a_connection_closed_while_it_opens_leaves_no_descriptor(tmp_path: Path, ring: str) -> None:
    with driver(ring, file_address(file_of(tmp_path / "disk", b"x")), "source") as one:
        one.start()
        one.connection.pump(one.now())
        one.connection.close()
        assert not one.connection.closed
        one.until("the close", lambda: one.connection.closed)
        assert (one.ready, one.lost) == (0, [])
    # The descriptor itself is looked for by the fixture that guards every test.


def test_a_connection_closed_before_it_was_started_is_closed(tmp_path: Path, ring: str) -> None:
    with driver(ring, file_address(file_of(tmp_path / "disk", b"x")), "source") as one:
        one.connection.close()
        assert one.connection.closed


# -- reading and writing ----------------------------------------------------------------------------------------------


def test_what_is_read_is_what_is_there(tmp_path: Path, connect: Open) -> None:
    content = random.Random(1).randbytes(3 * MIB + 12345)
    source = connect(file_of(tmp_path / "disk", content), "source")
    pieces = list(Range(0, len(content)).split(256 * KIB))
    buffers = [bytearray(piece.length) for piece in pieces]
    source.answered(
        *(source.ask("read", piece, memoryview(buffer)) for piece, buffer in zip(pieces, buffers, strict=True))
    )
    assert b"".join(buffers) == content


def test_what_is_written_is_there_afterwards_and_nothing_else_changed(tmp_path: Path, connect: Open) -> None:
    path = file_of(tmp_path / "disk", b"\xff" * (2 * MIB))
    destination = connect(path, "destination")
    data = random.Random(2).randbytes(MIB - 999)
    assert destination.write(777, data).error is None
    assert destination.flush().error is None
    assert path.read_bytes() == b"\xff" * 777 + data + b"\xff" * (2 * MIB - 777 - len(data))


def test_a_write_behind_the_end_extends_the_file(tmp_path: Path, connect: Open) -> None:
    path = file_of(tmp_path / "disk", b"")
    assert connect(path, "destination").write(10, b"end").error is None
    assert path.read_bytes() == bytes(10) + b"end"


def test_a_source_that_became_shorter_fails_the_read_that_misses_it(tmp_path: Path, connect: Open) -> None:
    path = file_of(tmp_path / "disk", b"x" * 10000)
    source = connect(path, "source")
    os.truncate(path, 5000)
    answer = source.ask("read", Range(4000, 8000), memoryview(bytearray(4000)))
    source.answered(answer)
    assert str(answer.error) == "ENXIO (the file became shorter)"
    assert source.read(0, 5000) == b"x" * 5000


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file may grow past this many bytes while the test runs (the interpreter ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    yield MIB
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_is_refused_fails_alone(tmp_path: Path, connect: Open, small_files: int) -> None:
    path = file_of(tmp_path / "disk", b"")
    destination = connect(path, "destination")
    assert str(destination.write(small_files, b"x").error) == "EFBIG (File too large)"
    assert destination.write(small_files - 1, b"x").error is None
    # One that fits in part is short first, then refused: nothing says that it was done.
    assert str(destination.write(small_files - 4, b"xxxxxxxx").error) == "EFBIG (File too large)"
    assert destination.lost == []


class ShortRing:
    """A ring that moves at most 1000 bytes at a time, as a kernel may."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.transfers = 0
        self.submit = self.submit_short

    def __getattr__(self, name: str) -> object:
        return getattr(self.ring, name)

    def submit_short(self, operation: Operation) -> None:
        if operation.kind in (Kind.READ, Kind.WRITE):
            self.transfers += 1
            operation.buffers = [memoryview(operation.buffers[0])[:1000]]
        self.ring.submit(operation)


def test_short_transfers_are_repeated_until_the_request_is_whole(tmp_path: Path, connect: Open) -> None:
    content = random.Random(3).randbytes(4321)
    source = connect(file_of(tmp_path / "from", content), "source")
    destination = connect(file_of(tmp_path / "to", b""), "destination")
    for one in (source, destination):
        one.connection._ring = ShortRing(one.ring)  # type: ignore[attr-defined]
    assert source.read(0, 4321) == content
    assert destination.write(0, content).error is None
    assert (tmp_path / "to").read_bytes() == content
    assert source.connection._ring.transfers == destination.connection._ring.transfers == 5  # type: ignore[attr-defined]


# -- extents ----------------------------------------------------------------------------------------------------------


def test_holes_are_told_from_data(tmp_path: Path, connect: Open) -> None:
    path = sparse_file(tmp_path / "disk", 4 * MIB, {MIB: b"x" * 65536, 3 * MIB: b"y" * 65536})
    source = connect(path, "source")
    assert source.extents(0, 4 * MIB) == [
        (Range(0, MIB), HOLE),
        (Range(MIB, MIB + 65536), DATA),
        (Range(MIB + 65536, 3 * MIB), HOLE),
        (Range(3 * MIB, 3 * MIB + 65536), DATA),
        (Range(3 * MIB + 65536, 4 * MIB), HOLE),
    ]


def test_extents_are_cut_to_what_was_asked(tmp_path: Path, connect: Open) -> None:
    path = sparse_file(tmp_path / "disk", MIB, {65536: b"x" * 65536})
    source = connect(path, "source")
    assert source.extents(70000, 100) == [(Range(70000, 70100), DATA)]
    assert source.extents(100, 1000) == [(Range(100, 1100), HOLE)]
    assert source.extents(130000, 2000) == [(Range(130000, 131072), DATA), (Range(131072, 132000), HOLE)]


def test_an_answer_is_bounded_and_the_next_one_goes_on(
    tmp_path: Path, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sparse_file(tmp_path / "disk", 8 * MIB, {n * 65536: b"x" * 4096 for n in range(0, 128, 2)})
    whole = connect(path, "source").extents(0, 8 * MIB)
    assert len(whole) == 128
    monkeypatch.setattr(file_map, "FILE_EXTENTS_MAX", 10)
    source = connect(path, "source")
    pieces = []
    at = 0
    while at < 8 * MIB:
        answer = source.extents(at, 8 * MIB - at)
        assert len(answer) <= 11
        pieces += answer
        at = answer[-1][0].end
    assert pieces == whole


def test_past_the_end_of_a_source_that_became_shorter_nothing_passes_for_a_hole(tmp_path: Path, connect: Open) -> None:
    path = sparse_file(tmp_path / "disk", MIB, {0: b"x" * 65536})
    source = connect(path, "source")
    os.truncate(path, 131072)
    assert source.extents(0, MIB) == [
        (Range(0, 65536), DATA),
        (Range(65536, 131072), HOLE),
        (Range(131072, MIB), DATA),
    ]
    assert source.extents(MIB // 2, MIB // 2) == [(Range(MIB // 2, MIB), DATA)]


def test_a_file_system_that_knows_no_holes_has_one_extent_of_data(
    tmp_path: Path, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(file_map.FileMap, "_next_data", refuse)
    source = connect(sparse_file(tmp_path / "disk", MIB, {}), "source")
    assert source.extents(0, MIB) == [(Range(0, MIB), DATA)]
    assert source.extents(5, 10) == [(Range(5, 15), DATA)]


# -- zeroes -----------------------------------------------------------------------------------------------------------


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("allocated", [False, True], ids=["hole", "allocated"])
def test_zeroes_are_made_with_odd_ends_and_nothing_else_changes(
    tmp_path: Path, connect: Open, *, allocated: bool
) -> None:
    path = file_of(tmp_path / "disk", b"\xff" * MIB)
    destination = connect(path, "destination")
    assert destination.zero(1001, 500_000, allocated=allocated).error is None
    assert path.read_bytes() == b"\xff" * 1001 + bytes(500_000) + b"\xff" * (MIB - 501_001)
    assert (allocated_bytes(path) < MIB) is not allocated


@pytest.mark.parametrize("allocated", [False, True], ids=["hole", "allocated"])
def test_zeroes_behind_the_end_extend_the_file(tmp_path: Path, connect: Open, *, allocated: bool) -> None:
    path = file_of(tmp_path / "disk", b"x" * 100)
    assert connect(path, "destination").zero(50, 100_000, allocated=allocated).error is None
    assert path.read_bytes() == b"x" * 50 + bytes(100_000)


def test_zeroes_behind_the_end_leave_what_another_wrote_behind_them(tmp_path: Path, connect: Open) -> None:
    path = file_of(tmp_path / "disk", b"")
    first, second = connect(path, "destination"), connect(path, "destination")
    second.write(200_000, b"other")
    assert first.zero(0, 100_000, allocated=False).error is None
    assert path.read_bytes() == bytes(200_000) + b"other"


def test_a_refusal_to_zero_is_remembered(tmp_path: Path, connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*arguments: object) -> None:
        calls.append(arguments)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files, "zero_file", refuse)
    destination = connect(file_of(tmp_path / "disk", b""), "destination")
    for _ in range(3):
        error = destination.zero(0, 4096, allocated=True).error
        assert str(error) == "ENOTSUP (the file system or device cannot make zeroes)"
    assert len(calls) == 1
    destination.zero(0, 4096, allocated=False)  # another way to zero: asked once too
    assert len(calls) == 2


def test_a_failure_to_zero_is_no_refusal(tmp_path: Path, connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.ENOSPC, "No space left on device")]
    real = file_calls.zero_file

    def fail_once(number: int, where: Range, allocated: bool) -> None:
        if failures:
            raise failures.pop()
        real(number, where, allocated)

    monkeypatch.setattr(files, "zero_file", fail_once)
    destination = connect(file_of(tmp_path / "disk", b"x" * 4096), "destination")
    assert str(destination.zero(0, 4096, allocated=False).error) == "ENOSPC (No space left on device)"
    assert destination.zero(0, 4096, allocated=False).error is None


def test_a_file_system_without_zero_range_says_so() -> None:
    """tmpfs punches holes, but has no FALLOC_FL_ZERO_RANGE."""
    path = Path("/dev/shm") / f"nbdshard-{os.getpid()}"
    path.write_bytes(b"x" * 8192)
    try:
        with driver("epoll", file_address(path), "destination") as destination:
            destination.open()
            error = destination.zero(0, 4096, allocated=True).error
            assert error is None or error.errno_name == "ENOTSUP"
            assert destination.zero(0, 4096, allocated=False).error is None
            assert path.read_bytes() == bytes(4096) + b"x" * 4096
    finally:
        path.unlink()


# -- failures and ends ------------------------------------------------------------------------------------------------


def test_a_flush_that_fails_is_reported(tmp_path: Path, connect: Open) -> None:
    destination = connect(file_of(tmp_path / "disk", b""), "destination")
    reader, writer = os.pipe()
    try:
        number = destination.connection._descriptor.number  # type: ignore[attr-defined]
        os.dup2(writer, number)  # fdatasync of a pipe is refused
        assert str(destination.flush().error) == "EINVAL (Invalid argument)"
    finally:
        os.close(reader)
        os.close(writer)


class Stuck:
    """Files whose zeroing hangs until `released` is set."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.released = threading.Event()

    def zero(self, number: int, *_: object) -> None:
        self.begun.set()
        self.released.wait(60)
        os.fstat(number)  # it is still ours


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    disk = Stuck()
    monkeypatch.setattr(files, "zero_file", disk.zero)
    yield disk
    disk.released.set()


def test_a_disk_that_does_not_answer_is_lost(tmp_path: Path, connect: Open, stuck: Stuck) -> None:
    destination = connect(file_of(tmp_path / "disk", b""), "destination")
    answer = destination.ask("zero", Range(0, 2 * MIB), allocated=True)
    begun = destination.now()
    destination.connection.pump(begun)
    destination.until("the call to hang", stuck.begun.is_set)
    destination.connection.tick(begun + 31.9)
    assert destination.lost == []
    destination.connection.tick(begun + 32.1)
    destination.connection.tick(begun + 33)
    assert [str(error) for error in destination.lost] == [
        f"{tmp_path}/disk: timed out while zeroing: no answer within 32 s"
    ]
    assert isinstance(destination.lost[0], TimedOut)
    assert not destination.connection.closed
    stuck.released.set()
    destination.until("the close", lambda: destination.connection.closed)
    assert answer.done == 0


def test_closing_drops_what_is_under_way_without_a_word(tmp_path: Path, connect: Open, stuck: Stuck) -> None:
    destination = connect(file_of(tmp_path / "disk", b""), "destination")
    under_way = destination.ask("zero", Range(0, MIB), allocated=True)
    destination.until("the call to hang", stuck.begun.is_set)
    writes = [destination.ask("write", Range.of(n * MIB, MIB), memoryview(bytes(MIB))) for n in range(8)]
    destination.connection.pump(destination.now())
    queued = destination.ask("flush")
    destination.connection.close()
    destination.turn()
    assert not destination.connection.closed
    stuck.released.set()
    destination.until("the close", lambda: destination.connection.closed)
    assert [answer.done for answer in (under_way, *writes, queued)] == [0] * 10
    assert queued.sent == 0
    assert destination.lost == []


def test_a_soft_end_waits_for_what_was_asked(tmp_path: Path, connect: Open, stuck: Stuck) -> None:
    path = file_of(tmp_path / "disk", b"")
    destination = connect(path, "destination")
    zero = destination.ask("zero", Range(0, MIB), allocated=True)
    destination.until("the call to hang", stuck.begun.is_set)
    write = destination.ask("write", Range(0, 5), memoryview(b"bytes"))
    destination.connection.disconnect()
    late = destination.ask("write", Range(5, 10), memoryview(b"never"))
    destination.until("the write", lambda: write.done)
    assert not destination.connection.closed
    stuck.released.set()
    destination.leave()
    assert (zero.done, write.done, late.done) == (1, 1, 0)
    assert path.read_bytes() == b"bytes"
    assert destination.lost == []


def test_the_limit_of_a_flush_grows_with_what_is_unflushed(tmp_path: Path, connect: Open) -> None:
    destination = connect(file_of(tmp_path / "disk", b""), "destination")
    destination.write(0, bytes(20 * MIB))
    destination.ask("flush")
    begun = destination.now()
    destination.connection.pump(begun)
    destination.connection.tick(begun + 31.9)
    assert destination.lost == []
    destination.connection.tick(begun + 32.1)
    assert str(destination.lost[0]) == f"{tmp_path}/disk: timed out while flushing: no answer within 32 s"


def test_descriptors_are_not_inherited_by_programs(tmp_path: Path, connect: Open) -> None:
    number = connect(file_of(tmp_path / "disk", b""), "source").connection._descriptor.number  # type: ignore[attr-defined]
    assert fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
