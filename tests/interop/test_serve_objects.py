"""`nbdshard serve` with images in object stores: Swift, which is real, and stores that fail; copies there and back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.limits import OBJECT_TRANSFER_BYTES_MAX
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.ranges import Range
from support import images, processes
from support.command import copy, nbdshard
from support.images import MIB
from support.nbd_blocking import Connection
from support.s3 import S3, content, keys, new_prefix
from support.s3_proxy import Answer, Asked, Proxied, proxied
from support.served import NAME, Served, serving, tool
from support.servers import nbdkit
from support.waiting import wait_for

SIZE = 16 * MIB
VOLUME = f"?size={SIZE}&chunk=1M"
DISK = Wishes(NAME)
REQUESTS = (
    "write -P 7 -f 1000k 100k",
    "write -z -u 1M 2M",
    "discard 0 4k",
    "flush",
    "read -P 7 1000k 24k",
    "read -P 0 1M 2M",
    "read -P 0 0 4k",
)


@pytest.fixture
def store(s3: S3) -> Iterator[Proxied]:
    """A store in memory, with rules."""
    with proxied(s3) as found:
        yield found


@pytest.fixture(scope="session", params=["swift", "moto"])
def anywhere(request: pytest.FixtureRequest) -> S3:
    """The stores there are."""
    found = request.getfixturevalue("swift_s3" if request.param == "swift" else "s3")
    assert isinstance(found, S3)
    return found


def mapped(served: Served) -> list[tuple[int, int, int]]:
    """(offset, length, type) of the base:allocation map."""
    out = subprocess.run(
        ["nbdinfo", "--map", "--json", served.uri()], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    return [(each["offset"], each["length"], each["type"]) for each in json.loads(out)]


def end(served: Served) -> None:
    """As an operator does, so that the volume is free at once."""
    served.run.process.send_signal(signal.SIGTERM)
    served.run.wait().succeeded()


@pytest.mark.parametrize("layers", ["", "cache:"])
def test_a_copy_from_nbd_to_s3_and_back_is_the_same_and_as_sparse(anywhere: S3, layers: str, tmp_path: Path) -> None:
    source = images.sparse_image(tmp_path / "source", SIZE)
    prefix = new_prefix()
    with (
        nbdkit("file", f"file={source}") as origin,
        serving(layers + anywhere.conn(prefix, VOLUME), driver="sharded") as served,
    ):
        copy(origin.uri, served.uri()).succeeded()
        nbdshard("verify", origin.uri, served.uri()).succeeded()
        end(served)
    there = [key for key in keys(anywhere.bucket(prefix)) if key.endswith(".chunk")]
    full = [n for n in range(SIZE // MIB) if any(source.read_bytes()[n * MIB : (n + 1) * MIB])]
    assert there == sorted(f"{NAME}.{n}.chunk" for n in full)
    with serving(layers + anywhere.conn(prefix, "?read-only=yes"), driver="sharded") as served:
        assert {offset // MIB for offset, length, kind in mapped(served) if kind == 0 and length} <= set(full)
        copy(served.uri(), tmp_path / "back").succeeded()
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert os.stat(tmp_path / "back").st_blocks * 512 <= len(full) * MIB


def test_clients_that_nobody_here_wrote(anywhere: S3, tmp_path: Path) -> None:
    source = images.sparse_image(tmp_path / "source", SIZE)
    with serving(anywhere.conn(new_prefix(), VOLUME), driver="sharded") as served:
        for command in (
            ["nbdcopy", "--flush", str(source), served.uri()],
            ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), served.uri()],
            ["qemu-io", "-f", "raw", *(word for each in REQUESTS for word in ("-c", each)), served.uri()],
            ["nbdcopy", served.uri(), str(tmp_path / "back")],
        ):
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            assert "failed" not in done.stdout
    expected = bytearray(source.read_bytes())
    expected[: 4 << 10] = bytes(4 << 10)
    expected[1000 << 10 : 1100 << 10] = b"\x07" * (100 << 10)
    expected[MIB : 3 * MIB] = bytes(2 * MIB)
    assert (tmp_path / "back").read_bytes() == expected


def test_nbd_rs_10_raw_s3_is_served(anywhere: S3, tmp_path: Path) -> None:
    """nbd-rs panics there, though it is in its own examples."""
    source = images.sparse_image(tmp_path / "source", SIZE + 512)
    prefix = new_prefix()
    place = anywhere.conn(f"{prefix}/disk.img")
    with serving(f"{place}?size={SIZE + 512}") as served:
        copy(source, served.uri()).succeeded()  # which flushes
        assert content(anywhere.bucket(prefix), "disk.img") == source.read_bytes()
        connection = Connection(served.socket, DISK)
        connection.client.write(0, Range(100, 5000), [b"x" * 4900])
        connection.run()
        connection.close()
        end(served)  # which flushes, too
    expected = bytearray(source.read_bytes())
    expected[100:5000] = b"x" * 4900
    assert content(anywhere.bucket(prefix), "disk.img") == expected
    with serving(f"{place}?read-only=yes") as served:
        copy(served.uri(), tmp_path / "back").succeeded()
    assert (tmp_path / "back").read_bytes() == expected


def test_what_was_acknowledged_is_there_after_a_kill(anywhere: S3) -> None:
    """A write is acknowledged when the store has it, so even what no flush covered is there."""
    prefix = new_prefix()
    with serving(anywhere.conn(prefix, VOLUME), driver="sharded") as served:
        connection = Connection(served.socket, DISK)
        for handle in range(4):
            connection.client.write(handle, Range.of(handle * MIB + 5, 1000), [bytes([handle + 1]) * 1000])
        assert not any(done.error for done in connection.run())
        served.run.process.kill()
        served.run.process.wait()
        connection.socket.close()
    nbdshard("serve", "-e", NAME, "sharded", anywhere.conn(prefix)).failed(1, saying=["writes it, and was heard"])
    with serving(anywhere.conn(prefix, "?steal=yes"), driver="sharded") as served:
        connection = Connection(served.socket, DISK)
        for number in range(4):
            into = bytearray(1002)
            connection.client.read(0, Range.of(number * MIB + 4, 1002), memoryview(into))
            connection.run()
            assert into == b"\0" + bytes([number + 1]) * 1000 + b"\0"
        connection.close()


def test_a_cache_writes_whole_chunks_back(store: Proxied) -> None:
    """So none is read for it, and reads of others do not wait."""
    with serving(f"cache:{store.s3.conn(new_prefix(), VOLUME)}", driver="sharded") as served:
        with Connection(served.socket, DISK, handles=64) as connection:
            for start in range(0, 4 * MIB, 64 << 10):
                connection.client.write(0, Range.of(start, 64 << 10), [b"x" * (64 << 10)])
                assert not any(done.error for done in connection.run())
            connection.client.flush(0)
            assert not any(done.error for done in connection.run())
        assert store.count("GET", ".chunk") == 0
        assert store.count("PUT", ".chunk") == 4


def test_a_second_server_may_read_but_not_write(s3: S3) -> None:
    prefix = new_prefix()
    with serving(s3.conn(prefix, VOLUME), driver="sharded") as served:
        nbdshard("serve", "-e", NAME, "sharded", s3.conn(prefix)).failed(1, saying=["export 'disk'", "writes it"])
        with serving(s3.conn(prefix, "?read-only=yes"), driver="sharded"):
            pass
        end(served)
    with serving(s3.conn(prefix), driver="sharded") as served:  # it was given back at the end
        end(served)


def test_a_login_is_shown_nowhere(store: Proxied) -> None:
    store.rule = lambda _: Answer(403, "AccessDenied")
    told = nbdshard("serve", "-v", "-e", NAME, "sharded", store.s3.conn(new_prefix(), VOLUME)).failed(1)
    assert "403 AccessDenied" in told.err
    assert store.s3.password not in told.err + told.out


@pytest.mark.parametrize(
    ("answer", "errno_name"),
    [(Answer(503, "SlowDown"), "EIO"), (Answer(507), "ENOSPC"), (Answer(403, "AccessDenied"), "EPERM")],
)
def test_a_client_is_told_what_the_store_says(store: Proxied, answer: Answer, errno_name: str) -> None:
    with serving(store.s3.conn(new_prefix(), VOLUME), driver="sharded") as served:
        connection = Connection(served.socket, DISK)
        store.rule = lambda asked: answer if asked.is_of_chunk and asked.method == "PUT" else None
        connection.client.write(0, Range(0, 4096), [b"x" * 4096])
        (done,) = connection.run()
        assert done.error is not None and done.error.errno_name == errno_name
        store.rule = lambda _: None
        connection.client.write(0, Range(0, 4096), [b"x" * 4096])
        (done,) = connection.run()
        assert done.error is None
        connection.close()


def test_a_copy_survives_a_store_that_fails_now_and_then(store: Proxied, tmp_path: Path) -> None:
    """With `retry:` in front; every third request for a chunk fails."""
    source = images.sparse_image(tmp_path / "source", SIZE)
    count = iter(range(1 << 30))
    with serving(f"retry:{store.s3.conn(new_prefix(), VOLUME)}&retry-delay=10ms", driver="sharded") as served:
        store.rule = lambda asked: Answer(500) if asked.is_of_chunk and next(count) % 3 == 0 else None
        copy(source, served.uri()).succeeded()
        copy(served.uri(), tmp_path / "back").succeeded()
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_server_whose_volume_was_stolen_writes_nothing_any_more(s3: S3) -> None:
    prefix = new_prefix()
    bucket = s3.bucket(prefix)
    with serving(s3.conn(prefix, VOLUME), driver="sharded") as first:
        connection = Connection(first.socket, DISK)
        connection.client.write(0, Range(0, 4096), [b"1" * 4096])
        connection.run()
        with serving(s3.conn(prefix, "?steal=yes"), driver="sharded"):
            wait_for("the first to see it", lambda: "nothing is written any more" in first.run.err(), 60)
            connection.client.write(0, Range(0, 4096), [b"2" * 4096])
            (done,) = connection.run()
            assert done.error is not None
            assert done.error.errno_name == "EIO" and "has taken it over" in done.error.message
            connection.client.flush(0)
            (done,) = connection.run()
            assert done.error is not None
        connection.close()
        assert content(bucket, f"{NAME}.0.chunk") == b"1" * 4096
        first.run.process.send_signal(signal.SIGTERM)
        first.run.wait().failed(1)
    bucket.close()


def test_the_memory_of_a_busy_server_is_bounded(store: Proxied) -> None:
    """All places of a store are taken by parts of chunks of 4 MiB, each read and put whole, and twice as many wait."""
    size = 256 * MIB
    with serving(store.s3.conn(new_prefix(), f"?size={size}"), driver="sharded") as served:
        base = processes.resident_peak_bytes(served.run.pid)
        connection = Connection(served.socket, DISK, handles=64)
        for _ in range(2):
            for handle in range(64):
                connection.client.write(handle, Range.of(handle * 4 * MIB + 4 * MIB - 4096, 4096), [b"x" * 4096])
            assert not any(done.error for done in connection.run())
        assert processes.resident_peak_bytes(served.run.pid) - base < OBJECT_TRANSFER_BYTES_MAX + 64 * MIB
        connection.close()


def test_a_small_cache_in_front_of_a_slow_store_takes_its_limit_and_64_mib(store: Proxied, tmp_path: Path) -> None:
    """All that the process takes, before a request comes, too. What is written comes in parts of chunks."""
    size, limit, pause = 96 * MIB, 16 * MIB, threading.Event()
    source = images.filled_image(tmp_path / "source", size, 0x5A)
    target = f"cache:{store.s3.conn(new_prefix(), f'?size={size}&limit={limit}')}"

    def slow(asked: Asked) -> None:
        pause.wait(0.05 * asked.is_of_chunk)

    with serving(target, driver="sharded") as served:
        store.rule = slow
        tool("nbdcopy", "--flush", source, served.uri())
        assert processes.resident_peak_bytes(served.run.pid) < limit + 64 * MIB
        pause.set()
        tool("nbdcopy", served.uri(), tmp_path / "back")
        assert processes.resident_peak_bytes(served.run.pid) < limit + 64 * MIB
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
