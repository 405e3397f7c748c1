"""Every driver, store and chain of layers there is, as `nbdshard serve -e` takes it: add a line for a new one.

What goes through all of them: `tests/unit/server/test_chains.py` (the backend itself) and
`tests/interop/test_random_requests.py` (the server, and a client that nobody here wrote).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from support import images
from support.served import serving
from support.servers import nbd_server, nbdkit, qemu_nbd

SIZE = 20 * 65_536 + 4096  # the last chunk is short


@contextlib.contextmanager
def _image(folder: Path) -> Iterator[Mapping[str, str]]:
    """An empty file."""
    yield {"image": str(images.empty_image(folder / "image", SIZE))}


@contextlib.contextmanager
def _nothing(_: Path) -> Iterator[Mapping[str, str]]:
    yield {}


@contextlib.contextmanager
def _nbdshard(_: Path) -> Iterator[Mapping[str, str]]:
    """Another server, of this make."""
    with serving(f"memory:{SIZE}") as served:
        yield {"uri": served.uri()}


@contextlib.contextmanager
def _nbdkit(_: Path) -> Iterator[Mapping[str, str]]:
    """Another server, of another make, that takes short requests only."""
    filters, options = ("blocksize-policy",), ("blocksize-maximum=32k", "blocksize-error-policy=error")
    with nbdkit("memory", str(SIZE), *options, filters=filters) as server:
        yield {"uri": server.uri}


@contextlib.contextmanager
def _nbdkit_in_blocks(_: Path) -> Iterator[Mapping[str, str]]:
    """It takes nothing but whole blocks."""
    options = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    with nbdkit("memory", str(SIZE), *options, filters=("blocksize-policy",)) as server:
        yield {"uri": server.uri}


@contextlib.contextmanager
def _qemu_nbd(folder: Path) -> Iterator[Mapping[str, str]]:
    with qemu_nbd(images.empty_image(folder / "image", SIZE), "--discard=unmap", clients=3) as server:
        yield {"uri": server.uri}


@contextlib.contextmanager
def _nbd_server(folder: Path) -> Iterator[Mapping[str, str]]:
    """It knows neither structured replies nor block status, and no zeroes; a process for each connection."""
    with nbd_server(images.empty_image(folder / "image", SIZE), "flush = true", "trim = true") as server:
        yield {"uri": server.uri}


@contextlib.contextmanager
def _object_store(_: Path) -> Iterator[Mapping[str, str]]:
    """An object store in memory."""
    from support.s3 import moto, new_prefix  # which few chains need

    with moto() as s3:
        yield {"s3": s3.conn(new_prefix())}


@dataclass(frozen=True)
class Chain:
    """A driver and a CONN, with places for {folder}, which is empty at first, {size}, and what `needs` provides.

    The export has SIZE bytes, all zeroes at first.
    """

    driver: str
    conn: str
    needs: Callable[[Path], AbstractContextManager[Mapping[str, str]]] = _nothing
    is_quick: bool = True  # to make: a hundred of them in one test are no matter
    requests: int = 1500  # of a random test: fewer where each takes its time

    def over(self, layers: str, parameters: str = "") -> Chain:
        """This with `layers` ("retry:error:") in front."""
        join = "&" if "?" in self.conn else "?"
        return replace(self, conn=layers + self.conn + (join + parameters if parameters else ""))

    @contextlib.contextmanager
    def ready(self, folder: Path) -> Iterator[str]:
        """Its CONN, with everything that it needs in `folder` or running until the block ends."""
        with self.needs(folder) as places:
            yield self.conn.format(folder=folder, size=SIZE, **places)


STORES: Mapping[str, Chain] = {
    "raw file": Chain("raw", "file:{image}", _image),
    "raw memory": Chain("raw", "memory:{size}"),
    "sharded file": Chain("sharded", "file:{folder}/?size={size}&chunk=64K"),
}

# Who was killed has not given its lock back, and is known to be gone.
OBJECTS: Mapping[str, Chain] = {
    "sharded s3": Chain("sharded", "{s3}?size={size}&chunk=64K&steal=yes", _object_store, is_quick=False, requests=400),
    "raw s3": Chain("raw", "{s3}/image?size={size}&steal=yes", _object_store, is_quick=False, requests=400),
}

# Layers over each of them: what stands before a CONN, and the parameters behind it.
LAYERS: Mapping[str, tuple[str, str]] = {
    "delay": ("delay:", "delay=1ms"),
    "cow": ("cow:", ""),
    "cow kept": ("cow:", "overlay={folder}/overlay"),
    "cow of cow": ("cow:cow:", ""),
    "rate": ("rate:", "rate=1G"),
    "log": ("log:", "log={folder}/log"),
    "stats": ("stats:", "stats={folder}/stats"),
    "cache": ("cache:", "limit=256K&block=4K"),  # so small that it is full all the time
    "cache through": ("cache:", "limit=256K&block=16K&mode=writethrough"),
    "cache on disk": ("cache:", "dir={folder}/cache&dir-limit=256K&block=8K"),
    "cache cache": ("cache:cache:", "limit=512K&block=8K"),
    "retry error": ("retry:error:", "error-rate=10%&error-seed=3&retries=100&retry-delay=1ms"),
}

CHAINS: Mapping[str, Chain] = {
    **STORES,
    "nbd nbdshard": Chain("raw", "nbd:{uri}", _nbdshard, is_quick=False),
    "nbd nbdkit": Chain("raw", "nbd:{uri}", _nbdkit, is_quick=False),
    "nbd nbdkit in blocks": Chain("raw", "nbd:{uri}", _nbdkit_in_blocks, is_quick=False),
    "nbd qemu-nbd": Chain("raw", "nbd:{uri}", _qemu_nbd, is_quick=False),
    "nbd nbd-server": Chain("raw", "nbd:{uri}", _nbd_server, is_quick=False),
    "cow nbd": Chain("raw", "cow:nbd:{uri}", _nbdshard, is_quick=False),
    "deep": STORES["sharded file"].over(
        "log:stats:rate:retry:error:cache:cow:delay:",
        "log={folder}/log&stats={folder}/stats&rate=1G&error-rate=5%&error-seed=5&retries=100&retry-delay=1ms"
        "&limit=256K&block=4K&overlay={folder}/overlay&delay-flush=1ms",
    ),
    **OBJECTS,
    "cache sharded s3": OBJECTS["sharded s3"].over("cache:", "limit=1M&block=64K"),
    **{f"{layer} {name}": store.over(*LAYERS[layer]) for layer in LAYERS for name, store in STORES.items()},
}
