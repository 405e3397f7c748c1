"""From -e NAME DRIVER CONN to a backend: tables of drivers, stores and layers, to which anybody may add.

A driver says how an image lies in a store; a store keeps bytes or objects; a layer stands in front and looks like a
backend. Each entry names its parameters; a parameter is for every part of the chain that knows it, and a name that none
knows is refused. What needs a large library imports it in its function here, so that others do not wait for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import EXPORT_NAME_BYTES_MAX, LAYERS_MAX
from nbdshard.common.nbd.constants import EXPORT_BYTES_MAX
from nbdshard.common.units import parse_size
from nbdshard.server import advice
from nbdshard.server.backends import remote
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.file import FileBackend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.backends.sharded_files import ShardedFiles
from nbdshard.server.conn import Conn, parse_conn
from nbdshard.server.credentials import NOBODY, Credentials, take_login
from nbdshard.server.exports import Exported
from nbdshard.server.layers.cache_opening import LAYER as CACHE
from nbdshard.server.layers.cow import LAYER as COW
from nbdshard.server.layers.delay import LAYER as DELAY
from nbdshard.server.layers.error import LAYER as ERROR
from nbdshard.server.layers.log import LAYER as LOG
from nbdshard.server.layers.rate import LAYER as RATE
from nbdshard.server.layers.retry import LAYER as RETRY
from nbdshard.server.layers.stats import LAYER as STATS
from nbdshard.server.opening import Keeping, Layer, Opener, Opening
from nbdshard.server.parameters import Parameters
from nbdshard.server.stores.base import Store
from nbdshard.server.stores.file import FileStore
from nbdshard.server.volumes import Volume, open_volume

ANY_EXPORT: Final = frozenset({"read-only"}) | advice.PARAMETERS  # parameters that every chain knows


class Wanted(msgspec.Struct, frozen=True):
    """One export as it was asked for. `parameters`: more of them, by name, beside those after `?` in the CONN."""

    name: str
    driver: str
    conn: str
    parameters: Mapping[str, str] = msgspec.field(default_factory=dict)
    credentials: Credentials = NOBODY  # what a login in the CONN takes the place of


Drivers = Mapping[str, Mapping[str, Opener]]  # driver -> store
Layers = Mapping[str, Layer]


def _raw_file(opening: Opening) -> Backend:
    return FileBackend(Path(opening.place), read_only=opening.read_only)


def _raw_memory(opening: Opening) -> Backend:
    size = parse_size(opening.place)
    if not 0 < size <= EXPORT_BYTES_MAX:
        raise UserError(f"a size of {size} bytes", f"memory:{opening.place}")
    return MemoryBackend(size, read_only=opening.read_only)


def _file_store(opening: Opening) -> Store:
    return FileStore(Path(opening.place), read_only=opening.read_only)


def _drive_files(store: Store, volume: Volume, read_only: bool) -> Backend:
    assert isinstance(store, FileStore)
    return ShardedFiles(store, volume, read_only=read_only)


def sharded(keeping: Keeping) -> Opener:
    """The driver "sharded" over what `keeping` opens."""

    def open_sharded(opening: Opening) -> Backend:
        store = keeping.open(opening)
        try:
            volume = open_volume(
                store,
                opening.name,
                size=opening.parameters.size("size"),
                chunk_bytes=opening.parameters.size("chunk"),
                read_only=opening.read_only,
            )
        except BaseException as error:
            store.close()
            if isinstance(error, OSError):
                raise UserError(f"cannot be opened: {error.strerror}", opening.place) from None
            raise
        return keeping.drive(store, volume, opening.read_only)

    return Opener(open_sharded, keeping.parameters | {"size", "chunk"})


def _cloud(scheme: str) -> Keeping:
    def open_it(opening: Opening) -> Store:
        from nbdshard.server.stores.clouds import open_store

        return open_store(scheme, opening)

    def drive(store: Store, volume: Volume, read_only: bool) -> Backend:
        from nbdshard.server.stores.clouds import drive

        return drive(store, volume, read_only)

    return Keeping(open_it, _CLOUD, drive)


def _raw_cloud(scheme: str) -> Opener:
    def open_it(opening: Opening) -> Backend:
        from nbdshard.server.stores.clouds import open_raw

        return open_raw(scheme, opening)

    return Opener(open_it, frozenset({"size", "spool", "timeout", "steal"}))


_CLOUD: Final = frozenset({"timeout", "steal", "listing"})
STORES: Final[Mapping[str, Keeping]] = MappingProxyType(  # of objects, for volumes
    {"file": Keeping(_file_store, drive=_drive_files), "s3": _cloud("s3"), "gs": _cloud("gs"), "az": _cloud("az")}
)
DRIVERS: Final[Drivers] = MappingProxyType(
    {
        "raw": MappingProxyType(
            {
                "file": Opener(_raw_file, shared=True),
                "memory": Opener(_raw_memory),
                "nbd": remote.opener("nbd"),
                "nbd+unix": remote.opener("nbd+unix"),
            }
            | {scheme: _raw_cloud(scheme) for scheme in ("s3", "gs", "az")}
        ),
        "sharded": MappingProxyType({name: sharded(keeping) for name, keeping in STORES.items()}),
    }
)
LAYERS: Final[Layers] = MappingProxyType(
    {
        "cache": CACHE,
        "cow": COW,
        "delay": DELAY,
        "error": ERROR,
        "retry": RETRY,
        "log": LOG,
        "rate": RATE,
        "stats": STATS,
    }
)


class _Chain(msgspec.Struct, frozen=True):
    """What a CONN says, looked up. `layers`: the outermost first."""

    conn: Conn
    store: Opener
    layers: list[Layer]
    parameters: Parameters


def open_exports(
    wanted: Iterable[Wanted], ending: threading.Event, drivers: Drivers = DRIVERS, layers: Layers = LAYERS
) -> dict[str, Exported]:
    """All of them, by name; none is left open where one cannot be opened. Raises UserError."""
    found: dict[str, Exported] = {}
    try:
        for each in wanted:
            found[each.name] = open_export(each, ending, drivers, layers)
    except BaseException:
        for exported in found.values():
            exported.backend.close()
        raise
    return found


def open_export(
    wanted: Wanted, ending: threading.Event, drivers: Drivers = DRIVERS, layers: Layers = LAYERS
) -> Exported:
    """The export that is `wanted`, open. `ending`: as in Opening. Raises UserError, which names it."""
    with _naming(wanted):
        wanted = _without_login(wanted)
        chain = _looked_up(wanted, drivers, layers)
        hints, description = advice.hints_of(chain.parameters), advice.description_of(chain.parameters)
        return Exported(_opened(wanted, chain, ending), hints, description)


def open_backend(
    wanted: Wanted, drivers: Drivers = DRIVERS, layers: Layers = LAYERS, ending: threading.Event | None = None
) -> Backend:
    """The backend of `wanted`, open. `ending`: as in Opening. Raises UserError, which names the export."""
    with _naming(wanted):
        wanted = _without_login(wanted)
        return _opened(wanted, _looked_up(wanted, drivers, layers), ending or threading.Event())


def open_store(text: str, credentials: Credentials, *, read_only: bool = False) -> Store:
    """The store of objects that `text` names, as a CONN without layers does. Raises UserError."""
    wanted = _without_login(Wanted("", "", text, credentials=credentials))
    conn = parse_conn(wanted.conn, (), STORES)
    keeping, parameters = STORES[conn.store], Parameters(conn.parameters, f"{conn.store}:{conn.place}")
    _check_known(parameters, keeping.parameters)
    return keeping.open(
        Opening(wanted.name, conn.place, parameters, read_only=read_only, credentials=wanted.credentials)
    )


def not_shared(wanted: Wanted, drivers: Drivers = DRIVERS, layers: Layers = LAYERS) -> list[str]:
    """The parts of its chain that several processes cannot serve at once ("cache", "raw memory"). Raises UserError."""
    with _naming(wanted):
        chain = _looked_up(_without_login(wanted), drivers, layers)
        found = [name for name, layer in zip(chain.conn.layers, chain.layers, strict=True) if not layer.shared]
        return found if chain.store.shared else [*found, f"{wanted.driver} {chain.conn.store}"]


@contextlib.contextmanager
def _naming(wanted: Wanted) -> Iterator[None]:
    where = f"export {wanted.name!r}"
    try:
        try:
            size = len(wanted.name.encode())
        except UnicodeEncodeError:  # bytes of the command line that are none
            raise UserError("a name in UTF-8 is needed") from None
        if size > EXPORT_NAME_BYTES_MAX or "\0" in wanted.name:
            raise UserError(f"a name of at most {EXPORT_NAME_BYTES_MAX} bytes without a NUL is needed")
        yield
    except UserError as error:
        raise UserError(str(error), where) from None


def _without_login(wanted: Wanted) -> Wanted:
    """`wanted` without a login in its CONN, so that nothing that shows it shows that. Raises UserError."""
    conn, login = take_login(wanted.conn)
    return wanted if login is None else msgspec.structs.replace(wanted, conn=conn, credentials=login)


def _looked_up(wanted: Wanted, drivers: Drivers, layers: Layers) -> _Chain:
    stores = drivers.get(wanted.driver)
    if stores is None:
        raise UserError(f"no driver is called {wanted.driver!r}", advice=f"known are {', '.join(drivers)}")
    conn = parse_conn(wanted.conn, layers, stores)
    if len(conn.layers) > LAYERS_MAX:
        raise UserError(f"{len(conn.layers)} layers; at most {LAYERS_MAX} are stacked", wanted.conn)
    where = f"{conn.store}:{conn.place}"
    for name, value in wanted.parameters.items():
        if "\0" in value:
            raise UserError(f"there is a NUL in {name}", where)
    for name in conn.parameters.keys() & wanted.parameters.keys():
        here, beside = conn.parameters[name], wanted.parameters[name]
        if here != beside:
            raise UserError(f"{name}={here}, and beside it {name}={beside}", where)
    parameters = Parameters({**conn.parameters, **wanted.parameters}, where)
    store, chain = stores[conn.store], [layers[name] for name in conn.layers]
    _check_known(parameters, ANY_EXPORT.union(store.parameters, *(layer.parameters for layer in chain)))
    return _Chain(conn, store, chain, parameters)


def _opened(wanted: Wanted, chain: _Chain, ending: threading.Event) -> Backend:
    read_only = chain.parameters.flag("read-only")

    def opening(layers: Sequence[Layer]) -> Opening:
        below = read_only or any(layer.only_reads for layer in layers)
        return Opening(
            wanted.name, chain.conn.place, chain.parameters, below, ending, wanted.credentials, wanted.driver
        )

    backend = chain.store.open(opening(chain.layers))
    try:
        for index in reversed(range(len(chain.layers))):
            backend = chain.layers[index].wrap(backend, opening(chain.layers[:index]))
    except BaseException:
        backend.close()
        raise
    return backend


def _check_known(parameters: Parameters, known: frozenset[str]) -> None:
    if unknown := parameters.names() - known:
        advice = f"known are {', '.join(sorted(known))}" if known else "there are none"
        raise UserError(f"no parameter is called {min(unknown)!r}", parameters.where, advice)
