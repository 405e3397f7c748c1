"""docs/extending.md: every example runs, and does what is said of it; what the text shows is what the files hold."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdshard.common.errors import RequestError
from nbdshard.common.nbd.commands import COMMANDS
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import Command
from nbdshard.common.nbd.wire import Request, pack_request
from nbdshard.common.ranges import Range
from support import images, processes
from support.command import Run, started
from support.images import MIB
from support.nbd_blocking import Connection, connect, negotiate, received
from support.served import NBDSH, tool
from support.servers import private_folder

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"
SIZE = 64 * MIB


@contextmanager
def running(name: str, *words: str) -> Iterator[tuple[Run, Path]]:
    """The example `name` with the path of its socket behind `words`, once it listens."""
    with private_folder() as folder:
        path = folder / "s"
        command = (sys.executable, str(EXAMPLES / name), *words, str(path))
        with started(executable=command) as run:
            run.until("the example to listen", lambda: processes.listens_on_unix(path))
            yield run, path


def uri(path: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={path}"


# -- the text and the files


def test_what_is_shown_is_what_runs() -> None:
    text = (DOCS / "extending.md").read_text()
    shown = re.findall(r"From `examples/(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(shown) >= 8
    for name, excerpt in shown:
        assert excerpt in (EXAMPLES / name).read_text(), (name, excerpt)


def test_every_example_is_told_of_and_run() -> None:
    text, tests = (DOCS / "extending.md").read_text(), Path(__file__).read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names
    for name in names:
        assert f"](examples/{name})" in text
        assert f'"{name}"' in tests


# -- each of them


@pytest.mark.parametrize("name", ["ram_disk.py", "select_loop.py", "asyncio_server.py"])
def test_a_disk_that_is_a_function_is_one_to_others(name: str, tmp_path: Path) -> None:
    source = images.sparse_image(tmp_path / "source", 8 * MIB)
    with running(name) as (_, path):
        assert tool("nbdinfo", "--size", uri(path)).strip() == str(SIZE)
        tool("nbdcopy", "--flush", source, uri(path))
        tool("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(path), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes().ljust(SIZE, b"\0")
        script = "import nbd\ntry:\n    h.trim(512, 0)\nexcept nbd.Error:\n    pass\nelse:\n    raise SystemExit(1)"
        tool(*NBDSH, "-u", uri(path), "-c", script)


@pytest.mark.parametrize("name", ["ram_disk.py", "select_loop.py", "asyncio_server.py"])
def test_clients_that_break_off_or_babble_or_hang_harm_no_other(name: str) -> None:
    with running(name) as (run, path):
        read = pack_request(Request(0, Command.READ, 1, 0, 8 * MIB), extended=False)
        with connect(path) as hanging:
            negotiate(hanging, Wishes("disk", extended=False))
            hanging.sendall(read * 20)
            for babble in (b"", b"\0\0\0\3half", b"\0\0\0\3" + bytes(100)):
                with connect(path) as peer:
                    peer.sendall(babble)
            with connect(path) as peer:
                negotiate(peer, Wishes("disk", extended=False))
                peer.sendall(read)
            with Connection(path, Wishes("disk")) as connection:
                assert connection.read(Range(0, 512)) == bytes(512)
                connection.close()
        assert "Traceback" not in run.err()


def test_asyncio_carries_requests_out_side_by_side_and_does_other_things_meanwhile() -> None:
    with running("asyncio_server.py") as (_, path), connect(path) as peer:
        negotiate(peer, Wishes("disk", structured=False))
        peer.sendall(b"".join(pack_request(Request(0, Command.READ, n, 0, 512), extended=False) for n in range(32)))
        for _ in range(32):
            assert received(peer, 16 + 512)[:8] == b"\x67\x44\x66\x98\0\0\0\0"
        with connect(Path(f"{path}.status")) as other:
            assert other.recv(200) == b"0 requests are under way; there have been 32 at once\n"


def test_standard_streams_are_a_connection() -> None:
    command = [sys.executable, str(EXAMPLES / "standard_streams.py")]
    script = f"""
h.connect_command({command!r})
assert h.get_size() == {SIZE}
h.pwrite(b'x' * 100_000, 5)
assert h.pread(100_002, 4) == bytes(1) + b'x' * 100_000 + bytes(1)
h.shutdown()
"""
    tool(*NBDSH, "-c", script)


def test_a_pair_of_pipes_is_a_connection_too() -> None:
    command = [sys.executable, str(EXAMPLES / "standard_streams.py")]
    asked = b"\0\0\0\1IHAVEOPT\0\0\0\1\0\0\0\4disk" + pack_request(Request(0, Command.DISC, 0, 0, 0), extended=False)
    said = subprocess.run(command, input=asked, capture_output=True, timeout=60, check=True).stdout
    assert said[18:26] == SIZE.to_bytes(8, "big")


def test_a_backend_of_ones_own_is_served_like_others(tmp_path: Path) -> None:
    with running("own_backend.py", "-e", "numbers", "raw", "log:pattern:1M", "--unix") as (run, path):
        tool("nbdcopy", uri(path, "numbers"), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == images.pattern(0, MIB)
        assert tool(*NBDSH, "-u", uri(path, "numbers"), "-c", "print(h.pread(3, 13).hex())").strip() == "000008"
        assert "read" in tool("nbdinfo", uri(path, "numbers"))
        run.process.terminate()
        assert run.wait().code == 0


def test_a_layer_of_ones_own_copies_on_write(tmp_path: Path) -> None:
    size = 3 * MIB + 512
    image = images.random_image(tmp_path / "image", size)
    expected = bytearray(image.read_bytes())
    with running("cow_layer.py", "-e", "disk", "raw", f"scratch:file:{image}", "--unix") as (_, path):
        with Connection(path, Wishes("disk")) as connection:
            for start, length in ((0, 512), (65_530, 12), (MIB, 300_000), (size - 1, 1)):
                connection.client.write(0, Range.of(start, length), [b"w" * length])
                assert [done.error for done in connection.run()] == [None]
                expected[start : start + length] = b"w" * length
            assert connection.read(Range(0, size)) == expected
            connection.close()
        tool("nbdcopy", uri(path), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == expected
    assert image.read_bytes() == images.random_bytes(size)


def test_an_option_and_a_command_of_ones_own_are_known_to_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import private_protocol as private

    with running("private_protocol.py", "-e", "disk", "raw", "memory:1M", "--unix") as (_, path):
        commands = {**COMMANDS, private.COMPARE.command: private.COMPARE}
        for number in (1, 2):
            with Connection(path, Wishes("disk"), options=private.introducing("Ada"), commands=commands) as connection:
                greeting = connection.connecter.negotiation.extra["greeting"]
                assert greeting == f"Ada, you are number {number}"
                private.ask_to_compare(connection.client, 0, Range(0, 512), bytes(512))
                private.ask_to_compare(connection.client, 1, Range(512, 1024), b"x" * 512)
                errors = {done.handle: done.error for done in connection.run()}
                assert errors[0] is None
                assert isinstance(errors[1], RequestError)
                assert errors[1].message == "it differs"
        tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", uri(path))


@pytest.mark.parametrize("name", ["asyncio_server.py", "ram_disk.py", "select_loop.py"])
def test_an_example_without_its_socket_says_how_it_is_used(name: str) -> None:
    done = subprocess.run((sys.executable, str(EXAMPLES / name)), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"usage: {EXAMPLES / name} SOCKET\n")
