"""`nbdshard serve` with the layer `cache`, and clients that nobody here wrote."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from nbdshard.common.limits import CREW_CALLS_MAX
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.ranges import Range
from support import images, processes
from support.command import nbdshard
from support.images import MIB
from support.nbd_blocking import Connection
from support.served import NAME, Served, serving, tool
from support.waiting import wait_for

DISK = Wishes(NAME)


def write(connection: Connection, start: int, data: bytes, *, fua: bool = False) -> str:
    """The error, "" if there is none."""
    connection.client.write(0, Range.of(start, len(data)), [data], fua=fua)
    (done,) = connection.run()
    return done.error.errno_name if done.error else ""


def flush(connection: Connection) -> str:
    connection.client.flush(0)
    (done,) = connection.run()
    return done.error.errno_name if done.error else ""


def test_nbd_rs_2_write_backs_go_on_when_clients_have_gone(tmp_path: Path) -> None:
    """There, it never persisted anything any more once the first client had left. None of these flushes."""
    image = images.empty_image(tmp_path / "image", MIB)
    with serving(f"cache:file:{image}") as served:
        for number in range(2):
            connection = Connection(served.socket, DISK)
            assert not write(connection, number * 4096, bytes([number + 1]) * 4096)
            connection.close()

            def is_there(number: int = number) -> bool:
                with image.open("rb") as file:
                    file.seek(number * 4096)
                    return file.read(4096) == bytes([number + 1]) * 4096

            wait_for(f"what client {number} wrote to be in the file", is_there)


def test_nbd_rs_3_what_is_dirty_stays_within_the_limit(tmp_path: Path) -> None:
    """There, writers were let in for ever. Here they wait for a disk that takes its time for each megabyte."""
    size, limit = 160 * MIB, 16 * MIB
    source = images.filled_image(tmp_path / "source", size, 0x5A)
    image = images.empty_image(tmp_path / "image", size)
    with serving(f"cache:delay:file:{image}?limit={limit}&delay-write=30ms") as served:
        tool("nbdcopy", "--flush", source, served.uri())
        assert processes.resident_peak_bytes(served.run.pid) < limit + 64 * MIB  # all that it takes, not only the cache
    assert image.read_bytes() == source.read_bytes()


def test_nbd_rs_7_a_file_behind_a_cache_takes_more_than_the_cache_holds_and_is_read_meanwhile(tmp_path: Path) -> None:
    """There, `raw cache:file:` stood still. Reads that miss come while all that may be dirty is."""
    size = 24 * MIB
    image = images.filled_image(tmp_path / "image", size, 0x11)
    with serving(f"cache:file:{image}?limit=1M") as served:
        words = []
        for start in range(12):
            words += ["-c", f"aio_write -P {start + 1} {start}M 1M", "-c", f"aio_read -P 17 {start + 12}M 1M"]
        found = tool("qemu-io", "-f", "raw", *words, "-c", "aio_flush", "-c", "flush", served.uri())
        assert "failed" not in found
        assert "Pattern verification" not in found
    content = image.read_bytes()
    assert content == b"".join(bytes([start + 1]) * MIB for start in range(12)) + b"\x11" * 12 * MIB


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
@pytest.mark.parametrize("driver", ["raw", "sharded"])
def test_what_nbdcopy_writes_is_there_when_the_server_has_ended(driver: str, mode: str, tmp_path: Path) -> None:
    size = 24 * MIB
    source = images.sparse_image(tmp_path / "source", size)
    (tmp_path / "disk").mkdir()
    image = images.empty_image(tmp_path / "image", size)
    conn = f"file:{image}?read-only=no" if driver == "raw" else f"file:{tmp_path}/disk/?size={size}&chunk=1M"
    with serving(f"cache:{conn}&limit=4M&mode={mode}", driver=driver) as served:
        tool("nbdcopy", source, served.uri())
        tool("nbdcopy", served.uri(), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes()
        served.run.process.send_signal(signal.SIGTERM)
        assert served.run.wait().code == 0
    with serving(conn, driver=driver) as served:
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", source, served.uri())


def test_writers_that_wait_for_room_do_not_hold_up_who_reads(tmp_path: Path) -> None:
    """Far more of them than threads, until a write below is let through, which it is when the reader is done."""
    image = images.filled_image(tmp_path / "image", 64 * MIB, 0x11)
    with serving(f"cache:delay:file:{image}?limit=1M&delay-write=600s") as served:
        writers = [Connection(served.socket, DISK, handles=32) for _ in range(4)]
        for number, writer in enumerate(writers):
            for handle in range(32):
                writer.client.write(handle, Range.of((number * 32 + handle) * 65_536, 512), [b"x" * 512])
            writer.push([])
        tasks = Path(f"/proc/{served.run.pid}/task")
        wait_for("threads to wait for room", lambda: len(list(tasks.iterdir())) > CREW_CALLS_MAX)
        reader = Connection(served.socket, DISK)
        for start in range(32, 64, 4):
            assert reader.read(Range.of(start * MIB, MIB)) == b"\x11" * MIB
        reader.close()
        for writer in writers:
            writer.socket.close()
        served.run.process.send_signal(signal.SIGTERM)  # which ends the delay
        assert served.run.wait().code == 0
    assert image.read_bytes().count(b"x") >= 11 * 512  # what was acknowledged


def kept_failing(served: Served, switch: Path) -> None:
    """Writes are acknowledged, and no flush succeeds, over this connection or another one, while writes below fail."""
    first, second = Connection(served.socket, DISK), Connection(served.socket, DISK)
    switch.touch()
    assert not write(first, 0, b"x" * 4096)
    assert [flush(first), flush(second), flush(first)] == ["ENOSPC"] * 3
    assert write(second, 65_536, b"y" * 4096, fua=True) == "ENOSPC"
    first.close()
    second.close()


def test_a_disk_that_is_full_for_a_while_fails_every_flush_and_loses_nothing(tmp_path: Path) -> None:
    image, switch = images.empty_image(tmp_path / "image", MIB), tmp_path / "switch"
    with serving(f"cache:error:file:{image}?error-write=ENOSPC&error-file={switch}") as served:
        kept_failing(served, switch)
        switch.unlink()
        connection = Connection(served.socket, DISK)
        assert not flush(connection)
        connection.close()
        content = image.read_bytes()
        assert content[:4096] == b"x" * 4096
        assert content[65_536 : 65_536 + 4096] == b"y" * 4096


def test_what_cannot_be_written_back_is_an_exit_code_at_the_end(tmp_path: Path) -> None:
    image, switch = images.empty_image(tmp_path / "image", MIB), tmp_path / "switch"
    with serving(f"cache:error:file:{image}?error-write=ENOSPC&error-file={switch}") as served:
        kept_failing(served, switch)
        served.run.process.send_signal(signal.SIGTERM)
        assert served.run.wait().code == 1
        assert "what was written may be lost: 8 KiB cannot be written back" in served.run.err()


# -- on disk


def on_disk(tmp_path: Path) -> tuple[Path, str]:
    """An image, and a cache on disk in front of it that cannot write to it while there is a file "switch"."""
    image = images.empty_image(tmp_path / "image", MIB)
    faults = f"error-write=ENOSPC&error-file={tmp_path / 'switch'}"
    return image, f"cache:error:file:{image}?dir={tmp_path / 'cache'}&dir-limit=2M&block=64K&{faults}"


def test_what_was_acknowledged_survives_kill_9_without_a_flush(tmp_path: Path) -> None:
    image, conn = on_disk(tmp_path)
    (tmp_path / "switch").touch()
    with serving(conn) as served:
        connection = Connection(served.socket, DISK)
        for number in range(8):
            assert not write(connection, number * 100_000, bytes([number + 1]) * 50_000)
        processes.kill_group(served.run.pid)
        served.run.process.wait()
        connection.socket.close()
    assert image.read_bytes() == bytes(MIB)
    (tmp_path / "switch").unlink()
    with serving(conn) as served:
        connection = Connection(served.socket, DISK)
        for number in range(8):
            assert connection.read(Range.of(number * 100_000, 50_000)) == bytes([number + 1]) * 50_000
        assert not flush(connection)
        connection.close()
        assert "of an earlier run are written back" in served.run.err()
    content = image.read_bytes()
    assert all(content[each * 100_000 : each * 100_000 + 50_000] == bytes([each + 1]) * 50_000 for each in range(8))


def test_what_cannot_be_written_back_at_the_end_is_kept_on_disk_and_no_loss(tmp_path: Path) -> None:
    image, conn = on_disk(tmp_path)
    with serving(conn) as served:
        kept_failing(served, tmp_path / "switch")
        served.run.process.send_signal(signal.SIGTERM)
        assert served.run.wait().code == 0
        assert f"kept in {tmp_path / 'cache'} for the next start" in served.run.err()
    (tmp_path / "switch").unlink()
    with serving(conn) as served:
        served.run.process.send_signal(signal.SIGTERM)
        assert served.run.wait().code == 0
    content = image.read_bytes()
    assert content[:4096] == b"x" * 4096
    assert content[65_536 : 65_536 + 4096] == b"y" * 4096


def test_a_cache_on_disk_is_of_one_export_and_has_one_server(tmp_path: Path) -> None:
    image, conn = on_disk(tmp_path)
    with serving(conn):
        images.empty_image(tmp_path / "image2", MIB)
        other = conn.replace(f"file:{image}", f"file:{image}2")
        nbdshard("serve", "-e", NAME, "raw", other, "--unix", tmp_path / "s").failed(1, saying=["is in use"])
    line = f"is the cache of export '{NAME}' (raw file:{image}); each export needs a directory of its own"
    nbdshard("serve", "-e", NAME, "raw", other, "--unix", tmp_path / "s").failed(1, saying=[line])
