"""Both ends of a row: real servers and files, made, filled and taken away again.

Files are in one folder in shared memory (a tmpfs), so that no disk is measured.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import output
from benchmarks.rows import FRAGMENT_BYTES, Content, End, LocalFile, Nbdkit, QemuNbd
from nbdshard.common.limits import MIB
from support.servers import nbdkit, qemu_nbd

SHARED_MEMORY = Path("/dev/shm")
SEED_BYTES = 64 * MIB  # random bytes are repeated after so many, stamped with their offset
STAMP_BYTES = 8


@dataclass(frozen=True, slots=True)
class Place:
    """One end, ready: `address` as every tool takes it. `reset` is to be called before each run.

    `servers`: the processes behind the address.
    """

    address: str
    reset: Callable[[], None]
    servers: tuple[int, ...] = ()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in shared memory, gone with all that is in it at the end."""
    with tempfile.TemporaryDirectory(prefix=f"nbdshard-bench-{os.getpid()}-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)


@contextlib.contextmanager
def opened(end: End, size: int, folder: Path, name: str) -> Iterator[Place]:
    """`end` with `size` bytes and its content; `name` tells its files from the other end's."""
    path = folder / name
    try:
        match end:
            case Nbdkit(plugin="file"):
                fill(path, size, end.content)
                with nbdkit("file", str(path), tcp=end.tcp) as server:
                    yield Place(server.uri, _nothing, (server.pid,))
            case Nbdkit():
                with nbdkit(end.plugin, *end.params, size=size, tcp=end.tcp) as server:
                    if end.content is not Content.EMPTY:
                        fill(path, size, end.content)
                        output(["nbdcopy", "--flush", str(path), server.uri])
                        path.unlink()  # it is memory, and so is the server's copy
                    yield Place(server.uri, _nothing, (server.pid,))
            case QemuNbd():
                fill(path, size, end.content)
                with qemu_nbd(path) as server:
                    yield Place(server.uri, _nothing, (server.pid,))
            case LocalFile():
                fill(path, size, end.content)
                is_empty = end.content is Content.EMPTY
                yield Place(str(path), (lambda: fill(path, size, Content.EMPTY)) if is_empty else _nothing)
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def without_extents(place: Place) -> Iterator[Place]:
    """`place`, an NBD server, through another one that tells no extents: who compares has to read all of it."""
    with nbdkit("nbd", f"uri={place.address}", filters=["noextents"]) as server:
        yield Place(server.uri, place.reset)


def fill(path: Path, size: int, content: Content) -> None:
    """Make `path` a new file of `size` bytes that holds `content`."""
    with path.open("wb") as file:
        file.truncate(size)
        if content is Content.EMPTY:
            return
        seed = bytearray(os.urandom(min(size, SEED_BYTES)))
        for start in range(0, size, len(seed)):
            _stamp(seed, start)
            if content is Content.RANDOM:
                file.seek(start)
                file.write(memoryview(seed)[: size - start])
                continue
            for offset in range(start, min(size, start + len(seed)), 2 * FRAGMENT_BYTES):
                file.seek(offset)
                file.write(memoryview(seed)[offset - start :][: min(FRAGMENT_BYTES, size - offset)])


def _stamp(block: bytearray, start: int) -> None:
    """Put its offset in the file at the head of every fragment of `block`: one that went astray shows."""
    for offset in range(0, len(block) - STAMP_BYTES + 1, FRAGMENT_BYTES):
        block[offset : offset + STAMP_BYTES] = (start + offset).to_bytes(STAMP_BYTES, "big")


def _nothing() -> None:
    pass
