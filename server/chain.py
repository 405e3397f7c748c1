"""From -e NAME DRIVER CONN to a backend: tables of drivers, stores and layers, to which anybody may add.

A driver says how an image lies in a store; a store keeps bytes or objects; a layer stands in front and looks like a
backend. Each entry names its parameters; a parameter is for every part of the chain that knows it, and a name that none
knows is refused. What needs a large library imports it in its function here, so that others do not wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import EXPORT_NAME_BYTES_MAX, LAYERS_MAX
from nbdshard.common.nbd.constants import EXPORT_BYTES_MAX
from nbdshard.common.units import parse_size
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.file import FileBackend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.conn import parse_conn
from nbdshard.server.layers.delay import LAYER as DELAY
from nbdshard.server.layers.error import LAYER as ERROR
from nbdshard.server.opening import Layer, Opener, Opening
from nbdshard.server.parameters import Parameters
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import open_volume

ANY_EXPORT: Final = frozenset({"read-only"})  # parameters that every chain knows


class Wanted(msgspec.Struct, frozen=True):
    """One export as it was asked for."""

    name: str
    driver: str
    conn: str


Drivers = Mapping[str, Mapping[str, Opener]]  # driver -> store
Layers = Mapping[str, Layer]


def _raw_file(opening: Opening) -> Backend:
    return FileBackend(Path(opening.place), read_only=opening.read_only)


def _raw_memory(opening: Opening) -> Backend:
    size = parse_size(opening.place)
    if not 0 < size <= EXPORT_BYTES_MAX:
        raise UserError(f"a size of {size} bytes", f"memory:{opening.place}")
    return MemoryBackend(size, read_only=opening.read_only)


def _sharded_file(opening: Opening) -> Backend:
    store = FileStore(Path(opening.place), read_only=opening.read_only)
    try:
        volume = open_volume(
            store,
            opening.name,
            size=opening.parameters.size("size"),
            chunk_bytes=opening.parameters.size("chunk"),
            read_only=opening.read_only,
        )
    except (UserError, OSError) as error:
        store.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot be opened: {error.strerror}", opening.place) from None
    return ShardedBackend(store, volume.key_of, volume.size, volume.chunk_bytes, read_only=opening.read_only)


_VOLUME: Final = frozenset({"size", "chunk"})
DRIVERS: Final[Drivers] = MappingProxyType(
    {
        "raw": MappingProxyType({"file": Opener(_raw_file), "memory": Opener(_raw_memory)}),
        "sharded": MappingProxyType({"file": Opener(_sharded_file, _VOLUME)}),
    }
)
LAYERS: Final[Layers] = MappingProxyType({"delay": DELAY, "error": ERROR})


def open_backend(
    wanted: Wanted, drivers: Drivers = DRIVERS, layers: Layers = LAYERS, ending: threading.Event | None = None
) -> Backend:
    """The backend of `wanted`, open. `ending`: as in Opening. Raises UserError, which names the export."""
    where = f"export {wanted.name!r}"
    if len(wanted.name.encode()) > EXPORT_NAME_BYTES_MAX or "\0" in wanted.name:
        raise UserError(f"a name of at most {EXPORT_NAME_BYTES_MAX} bytes without a NUL is needed", where)
    stores = drivers.get(wanted.driver)
    if stores is None:
        raise UserError(f"no driver is called {wanted.driver!r}", where, f"known are {', '.join(drivers)}")
    try:
        return _opened(wanted, stores, layers, ending or threading.Event())
    except UserError as error:
        raise UserError(str(error), where) from None


def _opened(wanted: Wanted, stores: Mapping[str, Opener], layers: Layers, ending: threading.Event) -> Backend:
    conn = parse_conn(wanted.conn, layers, stores)
    if len(conn.layers) > LAYERS_MAX:
        raise UserError(f"{len(conn.layers)} layers; at most {LAYERS_MAX} are stacked", wanted.conn)
    store, chain = stores[conn.store], [layers[name] for name in conn.layers]
    parameters = Parameters(conn.parameters, f"{conn.store}:{conn.place}")
    known = ANY_EXPORT.union(store.parameters, *(layer.parameters for layer in chain))
    if unknown := parameters.names() - known:
        raise UserError(f"no parameter is called {min(unknown)!r}", parameters.where, f"known are {_listed(known)}")
    read_only = parameters.flag("read-only")
    only_reads = any(layer.only_reads for layer in chain)
    backend = store.open(Opening(wanted.name, conn.place, parameters, read_only or only_reads, ending))
    try:
        for index in reversed(range(len(chain))):
            below_read_only = read_only or any(layer.only_reads for layer in chain[:index])
            opening = Opening(wanted.name, conn.place, parameters, below_read_only, ending)
            backend = chain[index].wrap(backend, opening)
    except BaseException:
        backend.close()
        raise
    return backend


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
