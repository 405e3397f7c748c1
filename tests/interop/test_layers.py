"""Layers in front of a store, as clients that nobody here wrote see them; and a server that ends while they wait."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from nbdshard.common.errors import RequestError
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.ranges import Range
from support import images
from support.nbd_blocking import Connection
from support.served import NAME, serving
from support.servers import qemu_nbd

SIZE = 4 << 20


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_client_that_gives_up_at_the_first_error_sees_none_behind_retry(tmp_path: Path) -> None:
    source = images.random_image(tmp_path / "source", SIZE)
    failing = f"error:memory:{SIZE}?error-rate=10%&error-seed=7"
    for conn, works in ((failing, False), (f"retry:{failing}&retries=50&retry-delay=1ms", True)):
        with serving(conn) as served:
            copied = tool("nbdcopy", "--flush", str(source), served.uri())
            assert (copied.returncode == 0) is works, copied.stderr
            if works:
                tool("nbdcopy", served.uri(), str(tmp_path / "back")).check_returncode()
                assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_disk_in_use_elsewhere_is_written_over_and_then_is_as_it_was(tmp_path: Path) -> None:
    """A base that qemu-nbd serves; the overlay is kept, and the base is served again with and without it."""
    base = images.random_image(tmp_path / "base", SIZE)
    before = base.read_bytes()
    with qemu_nbd(base, "-r", "--shared=8") as other:
        conn = f"cow:nbd:{other.uri}&overlay={tmp_path}/overlay"
        with serving(conn) as served:
            tool("qemu-io", "-f", "raw", "-c", "write -P 7 1000 70000", "-c", "flush", served.uri()).check_returncode()
        with serving(conn) as served:
            assert "failed" not in tool("qemu-io", "-f", "raw", "-c", "read -P 7 1000 70000", served.uri()).stdout
        with serving(f"nbd:{other.uri}") as served:
            tool("nbdcopy", served.uri(), str(tmp_path / "back")).check_returncode()
    assert base.read_bytes() == before == (tmp_path / "back").read_bytes()


def test_what_was_asked_of_another_server_is_counted_and_logged(tmp_path: Path) -> None:
    conn = f"log:stats:memory:{SIZE}?log={tmp_path}/log&stats={tmp_path}/stats"
    with serving(conn) as served:
        tool("qemu-io", "-f", "raw", "-c", "write 0 64k", "-c", "flush", served.uri()).check_returncode()
        served.run.process.send_signal(signal.SIGTERM)
        assert served.run.wait().code == 0
    operations = json.loads((tmp_path / "stats").read_text())["operations"]
    assert (operations["write"]["count"], operations["write"]["bytes"]) == (1, 65_536)
    ends = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [each["length"] for each in ends if each["operation"] == "write" and each["event"] == "end"] == [65_536]


@pytest.mark.parametrize(
    ("conn", "errno_name"),
    [
        (f"retry:error:memory:{SIZE}?error-read=EIO&retries=1000&retry-delay=5s&retry-max=1h", "ESHUTDOWN"),
        (f"delay:memory:{SIZE}?delay-read=10m", None),
        (f"rate:memory:{SIZE}?rate-read=64k", None),
    ],
)
def test_a_server_that_ends_waits_for_nothing_but_work(conn: str, errno_name: str | None) -> None:
    """Each of these would take minutes."""
    with serving(conn) as served, Connection(served.socket, Wishes(NAME)) as connection:
        connection.client.read(0, Range(0, SIZE), memoryview(bytearray(SIZE)))
        connection.push([])
        connection.client.flush(1)
        connection.push([])  # its answer comes first, when the read is under way
        while connection.client.pending_handles() == [0, 1]:
            connection.client.received(connection.socket.recvmsg_into(connection.client.receive_target())[0])
        served.run.process.send_signal(signal.SIGTERM)
        (done,) = connection.run()
        assert (done.error and done.error.errno_name) == errno_name
        assert done.error is None or isinstance(done.error, RequestError)
        assert served.run.wait().code == 0
