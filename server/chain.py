"""From -e NAME DRIVER CONN to a backend: tables of drivers, stores and layers, to which anybody may add.

A driver says how an image lies in a store; a store keeps objects; a layer stands in front and looks like a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import EXPORT_NAME_BYTES_MAX
from nbdshard.common.nbd.constants import EXPORT_BYTES_MAX
from nbdshard.common.units import parse_size
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.file import FileBackend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.conn import Conn, parse_conn
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import open_volume


class Wanted(msgspec.Struct, frozen=True):
    """One export as it was asked for."""

    name: str
    driver: str
    conn: str


Open = Callable[[str, Conn, bool], Backend]  # the export's name, the place, whether it is read-only; raises UserError


def _raw_file(_name: str, conn: Conn, read_only: bool) -> Backend:
    return FileBackend(Path(conn.place), read_only=read_only)


def _raw_memory(_name: str, conn: Conn, read_only: bool) -> Backend:
    size = parse_size(conn.place)
    if not 0 < size <= EXPORT_BYTES_MAX:
        raise UserError(f"a size of {size} bytes", f"memory:{conn.place}")
    return MemoryBackend(size, read_only=read_only)


def _sharded_file(name: str, conn: Conn, read_only: bool) -> Backend:
    store = FileStore(Path(conn.place), read_only=read_only)
    try:
        volume = open_volume(
            store,
            name,
            size=_size(conn, "size"),
            chunk_bytes=_size(conn, "chunk"),
            read_only=read_only,
        )
    except (UserError, OSError) as error:
        store.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot be opened: {error.strerror}", conn.place) from None
    return ShardedBackend(store, volume.key_of, volume.size, volume.chunk_bytes, read_only=read_only)


def _size(conn: Conn, parameter: str) -> int | None:
    text = conn.parameters.get(parameter)
    return None if text is None else parse_size(text)


# driver -> store -> what opens it
DRIVERS: Final[Mapping[str, Mapping[str, Open]]] = MappingProxyType(
    {
        "raw": MappingProxyType({"file": _raw_file, "memory": _raw_memory}),
        "sharded": MappingProxyType({"file": _sharded_file}),
    }
)
PARAMETERS: Final = frozenset({"read-only", "size", "chunk"})


def open_backend(wanted: Wanted, drivers: Mapping[str, Mapping[str, Open]] = DRIVERS) -> Backend:
    """The backend of `wanted`, open. Raises UserError, which names the export."""
    where = f"export {wanted.name!r}"
    if len(wanted.name.encode()) > EXPORT_NAME_BYTES_MAX or "\0" in wanted.name:
        raise UserError(f"a name of at most {EXPORT_NAME_BYTES_MAX} bytes without a NUL is needed", where)
    stores = drivers.get(wanted.driver)
    if stores is None:
        raise UserError(f"no driver is called {wanted.driver!r}", where, f"known are {', '.join(drivers)}")
    try:
        conn = parse_conn(wanted.conn, (), stores)
        return stores[conn.store](wanted.name, conn, _is_read_only(conn))
    except UserError as error:
        raise UserError(str(error), where) from None


def _is_read_only(conn: Conn) -> bool:
    unknown = conn.parameters.keys() - PARAMETERS
    if unknown:
        raise UserError(f"no parameter is called {min(unknown)!r}", f"{conn.store}:{conn.place}")
    value = conn.parameters.get("read-only", "no")
    if value not in ("yes", "no"):
        raise UserError(f"read-only={value}: yes or no is expected", f"{conn.store}:{conn.place}")
    return value == "yes"
