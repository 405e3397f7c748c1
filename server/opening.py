"""What the tables of `chain.py` are made of: entries for stores and layers, and what their functions are given."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.credentials import NOBODY, Credentials
from nbdshard.server.parameters import Parameters
from nbdshard.server.stores.base import Store
from nbdshard.server.volumes import Volume


class Opening(msgspec.Struct, frozen=True):
    """What a driver and the layers are given: the export's name, the place in the store, and all parameters.

    There is never a login in `place`: it is in `credentials`. `ending` is set when the server begins to end: who waits
    for nothing but time, waits no longer.
    """

    name: str
    place: str
    parameters: Parameters
    read_only: bool
    ending: threading.Event = msgspec.field(default_factory=threading.Event)
    credentials: Credentials = NOBODY
    driver: str = ""


class Opener(msgspec.Struct, frozen=True):
    """A store under a driver: `open` raises UserError. `parameters`: the names it knows.

    `shared`: several processes may each open it and serve it at once, as one export: all that one has acknowledged
    the others see, and a flush of one covers what was acknowledged by any, or tells that it may be lost.
    """

    open: Callable[[Opening], Backend]
    parameters: frozenset[str] = frozenset()
    shared: bool = False


def drive(store: Store, volume: Volume, read_only: bool) -> Backend:
    """The driver "sharded" as it is."""
    return ShardedBackend(store, volume, read_only=read_only)


class Keeping(msgspec.Struct, frozen=True):
    """A store of objects, for drivers that cut an image into many: `open` raises UserError. `parameters`: as above.

    `drive`: the backend of a volume that was opened in it, where that takes more than the driver.
    """

    open: Callable[[Opening], Store]
    parameters: frozenset[str] = frozenset()
    drive: Callable[[Store, Volume, bool], Backend] = drive


class Layer(msgspec.Struct, frozen=True):
    """A layer: `wrap` gives the backend that stands in front of the one it is given, and owns it. Raises UserError."""

    wrap: Callable[[Backend, Opening], Backend]
    parameters: frozenset[str] = frozenset()
    only_reads: bool = False  # what is below is opened read-only, whatever the export is
    shared: bool = False  # as an Opener's: it keeps nothing that the other processes would have to know
