"""SPLICE: between a file or a block device and a pipe of the caller's."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.limits import RING_THREADS_MAX
from nbdshard.common.ring import Kind, Operation
from support.devices import loop_device
from support.loops import Loop, close, receive, send, splice_in, splice_out, sync
from support.pipe_states import PAGE, Pipe, tasks_in_the_kernel

DATA = bytes(range(1, 251)) * 1000


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    one = Pipe()
    yield one
    one.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(DATA)
    return tmp_path / "disk"


# -- what moves


def test_a_splice_into_a_pipe_takes_the_bytes_at_the_files_offset(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDONLY)
    assert loop.run(splice_in(pipe.writing, disk, 1234, 5000)) == [5000]
    assert pipe.drain() == DATA[1234:6234]


def test_a_splice_out_of_a_pipe_puts_its_bytes_at_the_files_offset(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDWR)
    os.write(pipe.writing, b"fresh " * 1000)
    assert loop.run(splice_out(pipe.reading, disk, 1234, 6000)) == [6000]
    assert pipe.content == 0
    assert path.read_bytes() == DATA[:1234] + b"fresh " * 1000 + DATA[7234:]


def test_a_splice_leaves_the_files_own_position_alone(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDWR)
    os.lseek(disk.number, 77, os.SEEK_SET)
    assert loop.run(splice_in(pipe.writing, disk, 1000, 100)) == [100]
    assert loop.run(splice_out(pipe.reading, disk, 2000, 100)) == [100]
    assert os.lseek(disk.number, 0, os.SEEK_CUR) == 77


def test_a_splice_out_of_a_pipe_leaves_what_is_beyond_its_length(loop: Loop, pipe: Pipe, path: Path) -> None:
    os.write(pipe.writing, b"taken, left")
    assert loop.run(splice_out(pipe.reading, loop.file(path, os.O_RDWR), 0, 5)) == [5]
    assert pipe.drain() == b", left"


def test_offsets_may_be_beyond_what_32_bits_hold(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk, far = loop.file(path, os.O_RDWR), (5 << 30) + 3
    os.write(pipe.writing, b"far away")
    assert loop.run(splice_out(pipe.reading, disk, far, 8)) == [8]
    assert loop.run(splice_in(pipe.writing, disk, far - 2, 100)) == [10]
    assert pipe.drain() == b"\0\0far away"


def test_a_file_goes_through_a_pipe_into_another_whatever_the_counts(
    loop: Loop, pipe: Pipe, path: Path, tmp_path: Path
) -> None:
    path.write_bytes(DATA * 20)
    source, target = loop.file(path, os.O_RDONLY), loop.file(tmp_path / "copy", os.O_WRONLY | os.O_CREAT)
    position = 0
    while moved := loop.run(splice_in(pipe.writing, source, position, 1 << 20))[0]:
        while moved:
            (out,) = loop.run(splice_out(pipe.reading, target, position, moved))
            position, moved = position + out, moved - out
    assert (tmp_path / "copy").read_bytes() == DATA * 20


def test_many_splices_at_once_each_serve_their_own_pipe(loop: Loop, path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"".join(index.to_bytes(4, "big") * 1024 for index in range(100)))
    disk, copy = loop.file(path, os.O_RDONLY), loop.file(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    pipes = [Pipe() for _ in range(100)]
    into = [splice_in(pipe.writing, disk, index * 4096, 4096) for index, pipe in enumerate(pipes)]
    assert loop.run(*into) == [4096] * 100
    out = [splice_out(pipe.reading, copy, index * 4096, 4096) for index, pipe in enumerate(pipes)]
    assert loop.run(*out) == [4096] * 100
    assert loop.run(sync(copy)) == [0]
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    for pipe in pipes:
        pipe.close()


def test_a_block_device_is_spliced_from_and_to_up_to_its_end(loop: Loop, pipe: Pipe, tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    with loop_device(tmp_path / "backing") as device:
        disk = loop.file(device, os.O_RDWR)
        os.write(pipe.writing, DATA[:10_000])
        assert loop.run(splice_out(pipe.reading, disk, 12_345, 10_000)) == [10_000]
        assert loop.run(splice_in(pipe.writing, disk, 12_340, 20)) == [20]
        assert pipe.drain() == bytes(5) + DATA[:15]
        assert loop.run(splice_in(pipe.writing, disk, (1 << 20) - 7, 20)) == [7]
        assert loop.run(splice_in(pipe.writing, disk, 1 << 20, 20)) == [0]
        assert pipe.drain() == bytes(7)
        os.write(pipe.writing, b"x" * 20)
        assert loop.run(splice_out(pipe.reading, disk, (1 << 20) - 7, 20)) == [7]
        assert loop.run(splice_out(pipe.reading, disk, 1 << 20, 13)) == [-errno.ENOSPC]
        assert loop.run(sync(disk)) == [0]
        assert loop.run(close(disk)) == [0]


# -- short counts, and the end


def test_a_splice_across_the_end_of_a_file_is_short_and_past_it_zero(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDONLY)
    assert loop.run(splice_in(pipe.writing, disk, len(DATA) - 100, 5000)) == [100]
    assert loop.run(splice_in(pipe.writing, disk, len(DATA), 5000)) == [0]
    assert loop.run(splice_in(pipe.writing, disk, 1 << 40, 5000)) == [0]
    assert pipe.drain() == DATA[-100:]


def test_a_splice_into_a_pipe_with_less_room_is_short(loop: Loop, pipe: Pipe, path: Path) -> None:
    os.write(pipe.writing, bytes(PAGE))
    room = pipe.capacity - PAGE
    assert loop.run(splice_in(pipe.writing, loop.file(path, os.O_RDONLY), 0, room + PAGE)) == [room]
    assert pipe.drain() == bytes(PAGE) + DATA[:room]


def test_a_splice_out_of_a_pipe_with_fewer_bytes_is_short(loop: Loop, pipe: Pipe, path: Path) -> None:
    os.write(pipe.writing, b"few")
    assert loop.run(splice_out(pipe.reading, loop.file(path, os.O_RDWR), 0, 1 << 20)) == [3]


def test_splicing_out_of_an_empty_pipe_whose_writers_have_gone_gives_its_end(
    loop: Loop, pipe: Pipe, path: Path
) -> None:
    pipe.close_writing()
    assert loop.run(splice_out(pipe.reading, loop.file(path, os.O_RDWR), 0, 10)) == [0]


def test_a_file_without_a_name_is_spliced_like_any_other(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDWR)
    path.unlink()
    assert loop.run(splice_in(pipe.writing, disk, 0, 1000)) == [1000]
    assert loop.run(splice_out(pipe.reading, disk, 5000, 1000)) == [1000]
    assert os.pread(disk.number, 1000, 5000) == DATA[:1000]


def test_splicing_from_where_a_file_was_cut_off_gives_its_end(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDONLY)
    os.truncate(path, 1000)
    assert loop.run(splice_in(pipe.writing, disk, 900, 1000), splice_in(pipe.writing, disk, 1000, 1000)) == [100, 0]


def test_what_is_in_a_pipe_stays_as_many_bytes_although_its_file_is_cut_off(loop: Loop, pipe: Pipe, path: Path) -> None:
    """They have been promised to the pipe's reader: the header that names their number may have been sent."""
    disk = loop.file(path, os.O_RDONLY)
    assert loop.run(splice_in(pipe.writing, disk, 100, 20_000)) == [20_000]
    os.truncate(path, 5000)
    content = pipe.drain()
    assert len(content) == 20_000
    assert content[:4900] == DATA[100:5000]


# -- broken promises about the pipe


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_a_full_pipe_answers_eagain_and_an_empty_one_too_holding_up_nobody(
    loop: Loop, pipe: Pipe, path: Path, blocking: bool
) -> None:
    disk = loop.file(path, os.O_RDWR)
    os.set_blocking(pipe.reading, blocking)
    os.set_blocking(pipe.writing, blocking)
    into, out = splice_in(pipe.writing, disk, 0, 10), splice_out(pipe.reading, disk, 0, 10)
    for _ in range(RING_THREADS_MAX + 1):
        assert loop.run(out) == [-errno.EAGAIN]
    pipe.fill()
    for _ in range(RING_THREADS_MAX + 1):
        assert loop.run(into) == [-errno.EAGAIN]
    pipe.drain()
    assert loop.run(into) == [10]
    assert path.read_bytes() == DATA


def test_splicing_into_a_pipe_whose_readers_have_gone_gives_epipe(loop: Loop, pipe: Pipe, path: Path) -> None:
    pipe.close_reading()
    assert loop.run(splice_in(pipe.writing, loop.file(path, os.O_RDONLY), 0, 10)) == [-errno.EPIPE]


# -- errors


def test_a_file_that_is_not_open_for_it_gives_ebadf(loop: Loop, pipe: Pipe, path: Path) -> None:
    os.write(pipe.writing, b"x")
    assert loop.run(splice_in(pipe.writing, loop.file(path, os.O_WRONLY), 0, 1)) == [-errno.EBADF]
    assert loop.run(splice_out(pipe.reading, loop.file(path, os.O_RDONLY), 0, 1)) == [-errno.EBADF]


def test_the_wrong_end_of_a_pipe_and_a_closed_one_give_ebadf(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDWR)
    os.write(pipe.writing, b"x")
    assert loop.run(splice_in(pipe.reading, disk, 0, 1), splice_out(pipe.writing, disk, 0, 1)) == [-errno.EBADF] * 2
    assert loop.run(splice_in(10_000, disk, 0, 1), splice_out(10_000, disk, 0, 1)) == [-errno.EBADF] * 2


def test_splicing_to_a_file_that_is_only_appended_to_gives_einval(loop: Loop, pipe: Pipe, path: Path) -> None:
    os.write(pipe.writing, b"x")
    assert loop.run(splice_out(pipe.reading, loop.file(path, os.O_WRONLY | os.O_APPEND), 0, 1)) == [-errno.EINVAL]


def test_a_splice_without_any_pipe_gives_einval_and_one_without_any_file_espipe(
    loop: Loop, pipe: Pipe, path: Path
) -> None:
    disk, other = loop.file(path, os.O_RDWR), os.open(path, os.O_RDWR)
    assert loop.run(splice_in(other, disk, 0, 1), splice_out(other, disk, 0, 1)) == [-errno.EINVAL] * 2
    os.close(other)
    stream = loop.ring.attach(os.dup(pipe.writing), is_socket=False)
    assert loop.run(splice_out(pipe.reading, stream, 0, 1)) == [-errno.ESPIPE]


def test_splicing_to_beyond_the_largest_file_gives_efbig(loop: Loop, pipe: Pipe, path: Path) -> None:
    os.write(pipe.writing, b"x")
    result = loop.run(splice_out(pipe.reading, loop.file(path, os.O_RDWR), (1 << 63) - 5, 1))[0]
    assert result in (-errno.EFBIG, -errno.EINVAL)


def test_splices_that_make_no_sense_are_refused(loop: Loop, pipe: Pipe, path: Path) -> None:
    disk = loop.file(path, os.O_RDWR)
    ours, theirs = loop.connection()
    for operation, objection in (
        (Operation(Kind.SPLICE), "SPLICE without a descriptor"),
        (Operation(Kind.SPLICE, disk), "SPLICE without a pipe"),
        (splice_in(-1, disk, 0, 1), "SPLICE without a pipe"),
        (splice_in(pipe.writing, disk, 0, 0), "SPLICE of 0 bytes"),
        (splice_out(pipe.reading, disk, 0, -1), "SPLICE of -1 bytes"),
        (splice_in(pipe.writing, disk, 0, (1 << 32) + 1), "SPLICE of 4294967297 bytes"),
        (splice_in(pipe.writing, disk, -1, 1), "SPLICE at offset -1"),
        (splice_out(pipe.reading, disk, 1 << 63, 1), "SPLICE at offset 9223372036854775808"),
        (splice_in(pipe.writing, ours, 0, 1), f"SPLICE for descriptor {ours.number}, which is a socket"),
    ):
        with pytest.raises(BugError) as caught:
            loop.ring.submit(operation)
        assert str(caught.value) == objection
        assert not operation.pending
    loop.idle()
    theirs.close()


# -- under way: the kernel waits for a disk, with the pipe's lock held

INTO, OUT = "into the pipe", "out of the pipe"
DIRECTIONS = pytest.mark.parametrize("direction", [INTO, OUT])


def page_splice(loop: Loop, pipe: Pipe, path: Path, direction: str) -> Operation:
    """A SPLICE of one page, which both a pipe that `Pipe.locked` leaves and the file have, or have room for."""
    disk = loop.file(path, os.O_RDWR)
    if direction == INTO:
        return splice_in(pipe.writing, disk, 0, PAGE)
    return splice_out(pipe.reading, disk, 0, PAGE)


def begin(loop: Loop, operation: Operation) -> None:
    """Submit it, and see it wait in the kernel."""
    loop.submit(operation)
    loop.until(lambda: tasks_in_the_kernel() == 1)


@DIRECTIONS
def test_the_loop_goes_on_while_a_splice_waits(loop: Loop, pipe: Pipe, path: Path, direction: str) -> None:
    ours, theirs = loop.connection()
    echo, buffer = loop.attach(theirs), bytearray(4)
    operation = page_splice(loop, pipe, path, direction)
    with pipe.locked() as release:
        begin(loop, operation)
        for number in range(100):
            ball = number.to_bytes(4, "big")
            assert loop.run(send(ours, ball), receive(echo, buffer)) == [4, 4]
            assert buffer == ball
        assert loop.pending == {operation}
        release()
    assert loop.finish(operation) == [PAGE]


@DIRECTIONS
def test_close_waits_for_a_splice_under_way(loop: Loop, pipe: Pipe, path: Path, direction: str) -> None:
    operation = page_splice(loop, pipe, path, direction)
    descriptor = operation.descriptor
    assert descriptor is not None
    ending = close(descriptor)
    with pipe.locked() as release:
        begin(loop, operation)
        loop.submit(ending)
        loop.idle()
        assert not descriptor.closed
        release()
    loop.finish(operation, ending)
    assert operation.result in (PAGE, -errno.ECANCELED)
    assert ending.result == 0
    assert descriptor.closed


@DIRECTIONS
def test_cancelling_a_splice_under_way_lets_it_end_or_prevents_it(
    loop: Loop, pipe: Pipe, path: Path, direction: str
) -> None:
    """io_uring interrupts its worker; about to drain a pipe, the kernel then answers with a number of its own."""
    operation = page_splice(loop, pipe, path, direction)
    with pipe.locked() as release:
        begin(loop, operation)
        loop.ring.cancel(operation)
        loop.idle()
        release()
    assert loop.finish(operation)[0] in (PAGE, -errno.ECANCELED)


@pytest.mark.parametrize("turns", [0, 1], ids=["before it was started", "while others hold every worker"])
def test_a_splice_that_is_cancelled_before_it_could_begin_moves_nothing(
    loop: Loop, pipe: Pipe, path: Path, turns: int
) -> None:
    disk, other = loop.file(path, os.O_RDONLY), Pipe()
    stuck = [splice_in(pipe.writing, disk, 0, 1) for _ in range(RING_THREADS_MAX)]
    waiting = splice_in(other.writing, disk, 0, 100)
    with pipe.locked() as release:
        loop.submit(*stuck)
        loop.until(lambda: tasks_in_the_kernel() == RING_THREADS_MAX)
        loop.submit(waiting)
        for _ in range(turns):
            loop.idle()
        loop.ring.cancel(waiting)
        assert loop.finish(waiting) == [-errno.ECANCELED]
        release()
    assert loop.finish(*stuck) == [1] * RING_THREADS_MAX
    assert other.content == 0
    other.close()


def test_splices_that_wait_hold_no_more_workers_than_there_are_threads(loop: Loop, pipe: Pipe, path: Path) -> None:
    """Unbounded, io_uring starts one for each that waits: 252 were seen reading a file that was not in memory."""
    disk = loop.file(path, os.O_RDONLY)
    operations = [splice_in(pipe.writing, disk, 0, 1) for _ in range(pipe.capacity // PAGE - 1)]
    with pipe.locked() as release:
        loop.submit(*operations)
        loop.until(lambda: tasks_in_the_kernel() == RING_THREADS_MAX)
        loop.idle()
        assert tasks_in_the_kernel() == RING_THREADS_MAX
        release()
    assert loop.finish(*operations) == [1] * len(operations)


def test_a_pipe_may_be_polled_while_a_splice_waits(loop: Loop, pipe: Pipe, path: Path) -> None:
    operation = page_splice(loop, pipe, path, OUT)
    with pipe.locked() as release:
        begin(loop, operation)
        assert select.select([pipe.reading], [], [], 0)[0] == [pipe.reading]
        release()
    assert loop.finish(operation) == [PAGE]


@DIRECTIONS
def test_closing_the_ring_ends_a_splice_that_was_prepared(loop: Loop, pipe: Pipe, path: Path, direction: str) -> None:
    os.write(pipe.writing, bytes(PAGE))
    operation = page_splice(loop, pipe, path, direction)
    loop.submit(operation)
    loop.ring.close()
    assert not operation.pending


def test_cancelling_at_any_moment_leaves_a_pipe_that_can_be_drained_and_used_again(
    loop: Loop, pipe: Pipe, path: Path
) -> None:
    disk = loop.file(path, os.O_RDWR)
    for turn in range(300):
        operation = splice_in(pipe.writing, disk, 0, 3 * PAGE)
        if turn % 2:
            pipe.fill()
            operation = splice_out(pipe.reading, disk, 0, 3 * PAGE)
        loop.submit(operation)
        for _ in range(turn % 5):
            loop.turn(0)
        loop.ring.cancel(operation)
        assert loop.finish(operation)[0] in (3 * PAGE, -errno.ECANCELED)
        pipe.drain()
        assert pipe.content == 0
