"""The two sides of a copy in interop tests: every kind of real server (or a local file), over one image file.

`serve` puts `image` behind a server of the named kind. What the server holds at the end is in `image` again once the
block has ended, so a test compares files and needs no client but ours.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.servers import nbd_server, nbdkit, qemu_nbd

KINDS = ("nbdkit-file", "nbdkit-memory", "nbdkit-eval", "qemu-nbd", "nbd-server", "file")
TRANSPORTS = ("unix", "tcp")
RINGS = ("io_uring", "epoll")
LOAD_SECONDS = 60.0

EVAL = {
    "get_size": "stat -Lc %s {image}",
    "pread": "dd bs=256k if={image} skip=$4 count=$3 iflag=skip_bytes,count_bytes,fullblock status=none",
    "pwrite": "dd bs=256k of={image} seek=$4 oflag=seek_bytes conv=notrunc status=none",
    "flush": "exit 0",
    "can_write": "exit 0",
    "can_flush": "exit 0",
}


def granularity(kind: str) -> int:
    """qemu rounds a raw image up to whole sectors: what it exports is a multiple of 512."""
    return 512 if kind == "qemu-nbd" else 1


def round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def eval_methods(image: Path, **replaced: str) -> list[str]:
    """Parameters of nbdkit's eval plugin for a server of `image` in shell; `replaced` methods are other scripts."""
    return [f"{name}={script.format(image=image)}" for name, script in {**EVAL, **replaced}.items()]


@contextlib.contextmanager
def serve(
    kind: str,
    image: Path,
    *,
    transport: str = "unix",
    filters: Sequence[str] = (),
    args: Sequence[str] = (),
    flags: Sequence[str] = (),
    clients: int = 0,
) -> Iterator[str]:
    """The URI (or path) of `image` behind a server of `kind`. `filters`, `args` and `flags` are for nbdkit."""
    tcp = transport == "tcp"
    assert kind.startswith("nbdkit") or not (filters or args or flags)
    if kind == "file":
        yield str(image)
    elif kind == "nbdkit-file":
        with nbdkit("file", str(image), *args, filters=filters, flags=flags, tcp=tcp) as server:
            yield server.uri
    elif kind == "nbdkit-memory":
        size = image.stat().st_size
        with nbdkit("memory", str(size), *args, filters=filters, flags=flags, tcp=tcp) as server:
            _nbdcopy(str(image), server.uri)
            yield server.uri
            _nbdcopy(server.uri, str(image))
    elif kind == "nbdkit-eval":
        with nbdkit("eval", *eval_methods(image), *args, filters=filters, flags=flags, tcp=tcp) as server:
            yield server.uri
    elif kind == "qemu-nbd":
        with qemu_nbd(image, clients=clients, tcp=tcp) as server:
            yield server.uri
    elif kind == "nbd-server":
        with nbd_server(image, "flush = true", tcp=tcp) as server:
            yield server.uri
    else:
        raise ValueError(kind)


def _nbdcopy(source: str, destination: str) -> None:
    subprocess.run(["nbdcopy", "--flush", source, destination], timeout=LOAD_SECONDS, check=True)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Block sizes that nbdkit's blocksize-policy filter names, and enforces with EINVAL."""

    minimum: int = 1
    maximum: int = 32 << 20

    def __str__(self) -> str:
        return f"min{self.minimum}max{self.maximum >> 10}k"

    @property
    def filters(self) -> tuple[str, ...]:
        return ("blocksize-policy",)

    @property
    def args(self) -> tuple[str, ...]:
        return (
            "blocksize-error-policy=error",
            f"blocksize-minimum={self.minimum}",
            f"blocksize-preferred={max(self.minimum, 4096)}",
            f"blocksize-maximum={self.maximum}",
        )


BLOCKS = tuple(Blocks(minimum, maximum) for minimum in (1, 512, 4096) for maximum in (64 << 10, 1 << 20, 32 << 20))
