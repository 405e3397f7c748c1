"""From -e NAME DRIVER CONN to a backend: tables of drivers, stores and layers, to which anybody may add.

A driver says how an image lies in a store; a store keeps bytes or objects; a layer stands in front and looks like a
backend. Each entry names its parameters; a parameter is for every part of the chain that knows it, and a name that none
knows is refused. What needs a large library imports it in its function here, so that others do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from nbdshard.server.parameters import Parameters
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import open_volume

ANY_EXPORT: Final = frozenset({"read-only"})  # parameters that every chain knows


class Wanted(msgspec.Struct, frozen=True):
    """One export as it was asked for."""

    name: str
    driver: str
    conn: str


class Opening(msgspec.Struct, frozen=True):
    """What a driver and the layers are given: the export's name, the place in the store, and all parameters."""

    name: str
    place: str
    parameters: Parameters
    read_only: bool


class Opener(msgspec.Struct, frozen=True):
    """A store under a driver: `open` raises UserError. `parameters`: the names it knows."""

    open: Callable[[Opening], Backend]
    parameters: frozenset[str] = frozenset()


class Layer(msgspec.Struct, frozen=True):
    """A layer: `wrap` gives the backend that stands in front of the one it is given, and owns it. Raises UserError."""

    wrap: Callable[[Backend, Opening], Backend]
    parameters: frozenset[str] = frozenset()
    only_reads: bool = False  # what is below is opened read-only, whatever the export is


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
LAYERS: Final[Layers] = MappingProxyType({})


def open_backend(wanted: Wanted, drivers: Drivers = DRIVERS, layers: Layers = LAYERS) -> Backend:
    """The backend of `wanted`, open. Raises UserError, which names the export."""
    where = f"export {wanted.name!r}"
    if len(wanted.name.encode()) > EXPORT_NAME_BYTES_MAX or "\0" in wanted.name:
        raise UserError(f"a name of at most {EXPORT_NAME_BYTES_MAX} bytes without a NUL is needed", where)
    stores = drivers.get(wanted.driver)
    if stores is None:
        raise UserError(f"no driver is called {wanted.driver!r}", where, f"known are {', '.join(drivers)}")
    try:
        return _opened(wanted, stores, layers)
    except UserError as error:
        raise UserError(str(error), where) from None


def _opened(wanted: Wanted, stores: Mapping[str, Opener], layers: Layers) -> Backend:
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
    backend = store.open(Opening(wanted.name, conn.place, parameters, read_only or only_reads))
    try:
        for index in reversed(range(len(chain))):
            below_read_only = read_only or any(layer.only_reads for layer in chain[:index])
            backend = chain[index].wrap(backend, Opening(wanted.name, conn.place, parameters, below_read_only))
    except BaseException:
        backend.close()
        raise
    return backend


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
