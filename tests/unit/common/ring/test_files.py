"""READ, WRITE and SYNC on files and devices."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from support.loops import Loop, close, read, receive, send, sync, write


def test_write_then_read_at_an_offset_gives_the_same_bytes(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    payload = os.urandom(300_000)
    assert loop.run(write(disk, 4096, memoryview(payload)[:100_000], memoryview(payload)[100_000:])) == [300_000]
    first, second = bytearray(1), bytearray(299_999)
    assert loop.run(read(disk, 4096, first, second)) == [300_000]
    assert first + second == payload
    assert loop.run(sync(disk)) == [0]
    assert (tmp_path / "disk").read_bytes() == bytes(4096) + payload


def test_read_across_the_end_is_short_and_past_it_zero(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 1000)
    disk = loop.file(tmp_path / "disk", os.O_RDONLY)
    assert loop.run(read(disk, 900, bytearray(500))) == [100]
    assert loop.run(read(disk, 1000, bytearray(500))) == [0]
    assert loop.run(read(disk, 1 << 40, bytearray(500))) == [0]


def test_many_reads_of_one_file_in_flight_each_fill_their_own_buffer(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"".join(index.to_bytes(4, "big") * 1024 for index in range(300)))
    disk = loop.file(tmp_path / "disk", os.O_RDONLY)
    buffers = [bytearray(4096) for _ in range(300)]
    results = loop.run(*(read(disk, index * 4096, buffer) for index, buffer in enumerate(buffers)))
    assert results == [4096] * 300
    assert buffers == [index.to_bytes(4, "big") * 1024 for index in range(300)]


def test_reading_what_is_open_for_writing_gives_ebadf(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_WRONLY | os.O_CREAT)
    assert loop.run(read(disk, 0, bytearray(10))) == [-errno.EBADF]


def test_writing_to_a_full_device_gives_enospc(loop: Loop) -> None:
    full = loop.file("/dev/full", os.O_RDWR)
    assert loop.run(write(full, 0, b"no room")) == [-errno.ENOSPC]


def test_writing_beyond_the_largest_file_gives_efbig(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    assert loop.run(write(disk, (1 << 63) - 5, b"1"))[0] in (-errno.EFBIG, -errno.EINVAL)


def test_syncing_what_cannot_be_synced_gives_einval(loop: Loop) -> None:
    ours, theirs = loop.connection()
    assert loop.run(sync(ours)) == [-errno.EINVAL]
    theirs.close()


def test_close_lets_file_operations_under_way_end_first(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    writes = [write(disk, index << 20, bytes([index]) * (1 << 20)) for index in range(8)]
    ending = close(disk)
    loop.submit(*writes)
    loop.submit(sync(disk), ending)
    loop.finish(ending)
    assert not loop.pending
    content = (tmp_path / "disk").read_bytes()
    for index, operation in enumerate(writes):
        assert operation.result in (1 << 20, -errno.ECANCELED)
        if operation.result > 0:
            assert content[index << 20 : (index + 1) << 20] == bytes([index]) * (1 << 20)


def test_a_regular_file_is_received_from_as_a_stream_up_to_its_end(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(range(256)) * 40)
    image = loop.file(tmp_path / "image", os.O_RDONLY)
    received, buffer = bytearray(), bytearray(3000)
    while count := loop.run(receive(image, buffer))[0]:
        received += buffer[:count]
    assert received == bytes(range(256)) * 40


def test_sends_to_a_regular_file_are_appended_at_its_position(loop: Loop, tmp_path: Path) -> None:
    image = loop.file(tmp_path / "image", os.O_WRONLY | os.O_CREAT)
    assert loop.run(send(image, b"first ")) == [6]
    assert loop.run(send(image, b"second", b" third")) == [12]
    assert (tmp_path / "image").read_bytes() == b"first second third"


def test_dev_null_and_dev_zero_are_streams_that_never_wait(loop: Loop) -> None:
    null, zero = loop.file("/dev/null", os.O_RDWR), loop.file("/dev/zero", os.O_RDONLY)
    buffer = bytearray(b"x" * 5000)
    assert loop.run(send(null, b"gone"), receive(zero, buffer), receive(null, bytearray(1))) == [4, 5000, 0]
    assert buffer == bytes(5000)
