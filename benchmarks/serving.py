"""`nbdshard serve` beside nbdkit's file plugin: the same clients, files in shared memory, unix sockets."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ends import fill
from benchmarks.measure import output
from benchmarks.results import ServedWork
from benchmarks.rows import (
    NBDKIT,
    RANDOM_DEPTH,
    RANDOM_JOBS,
    RANDOM_PROCESSES,
    RANDOM_READ_BYTES,
    SERVED_WORKS,
    SERVER_PROCESSES,
    SERVER_SHARDED,
    Content,
)
from benchmarks.series import Runner, alternate
from support import processes
from support.served import serving
from support.servers import nbdkit


@dataclass(frozen=True, slots=True)
class Places:
    """What is served, and `source`, which is written; all in shared memory."""

    source: Path
    image: Path
    chunks: Path


def measure_serving(size: int, rounds: int, folder: Path, deadline: float) -> list[ServedWork]:
    """Every kind of work with `size` bytes, the servers taking turns in each round."""
    found = []
    places = Places(folder / "source", folder / "image", folder / "chunks")
    try:
        for path in (places.source, places.image):
            fill(path, size, Content.RANDOM)
        places.chunks.mkdir()
        with _opened(SERVER_SHARDED, places, size) as (uri, _):
            output(command("write", uri, places.source, size))
        for left, work in zip(range(len(SERVED_WORKS), 0, -1), SERVED_WORKS, strict=True):
            began = time.monotonic()
            with contextlib.ExitStack() as stack:
                runners = []
                for server in (NBDKIT, *work.servers):
                    uri, pid = stack.enter_context(_opened(server, places, size))
                    words = command(work.name, uri, places.source, size)
                    runners.append(Runner(server, words, 0, (pid, *processes.descendants(pid))))
                series = alternate(runners, rounds, began + max(deadline - began, 0.0) / left, _nothing)
            found.append(ServedWork(work.name, size, series))
    finally:
        for path in (places.source, places.image):
            path.unlink(missing_ok=True)
        shutil.rmtree(places.chunks, ignore_errors=True)
    return found


def command(work: str, uri: str, source: Path, size: int) -> Sequence[str]:
    """The client's command line."""
    match work:
        case "read":
            return ["nbdcopy", uri, "null:"]
        case "write":
            return ["nbdcopy", "--flush", "-S", "0", str(source), uri]
        case "random":
            count = min(size, RANDOM_READ_BYTES)
            options = {"ioengine": "nbd", "uri": uri, "rw": "randread", "bs": "4k", "size": size, "io_size": count}
            many = {"iodepth": RANDOM_DEPTH, "numjobs": RANDOM_JOBS}
            words = [f"--{name}={value}" for name, value in {**options, **many}.items()]
            return ["fio", "--name=random", "--group_reporting", *words]
        case _:
            raise ValueError(f"{work} is no kind of work")


@contextlib.contextmanager
def _opened(server: str, places: Places, size: int) -> Iterator[tuple[str, int]]:
    """One server: its URI, its process."""
    if server == NBDKIT:
        with nbdkit("file", str(places.image)) as peer:
            yield peer.uri, peer.pid
        return
    driver, conn = ("raw", f"file:{places.image}")
    if server == SERVER_SHARDED:
        driver, conn = ("sharded", f"file:{places.chunks}/?size={size}")
    more = ("--processes", str(RANDOM_PROCESSES)) if server == SERVER_PROCESSES else ()
    with serving(conn, *more, driver=driver) as own:
        yield own.uri(), own.run.pid


def _nothing() -> None:
    pass
