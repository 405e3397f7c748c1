"""From the parameters of a CONN to a cache: how much of it, where, and how it is cut."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Final

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    CACHE_BLOCK_BYTES_DEFAULT,
    CACHE_BLOCK_BYTES_MAX,
    CACHE_BLOCK_BYTES_MIN,
    CACHE_BLOCKS_MIN,
    CACHE_BYTES_DEFAULT,
    CACHE_BYTES_MAX,
    CACHE_DISK_BLOCK_BYTES_DEFAULT,
    CACHE_DISK_BYTES_DEFAULT,
    CACHE_DISK_GRAIN_BYTES,
    CACHE_DISK_GRAINS_MAX,
    CACHE_EXPORT_BYTES_MAX,
    CACHE_FETCH_BYTES_MAX,
    CACHE_GRAIN_BYTES,
    CACHE_TRANSFER_BYTES_MAX,
    CACHE_TRANSFER_SHARE,
    CACHE_TRANSFERS_MAX,
    CACHE_UNIT_BYTES_MAX,
    CACHE_UNIT_BYTES_MIN,
)
from nbdshard.common.units import format_bytes
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.cache import Cache
from nbdshard.server.layers.cache_blocks import Geometry
from nbdshard.server.layers.cache_core import CacheCore
from nbdshard.server.layers.cache_disk import open_folder
from nbdshard.server.layers.cache_index import Header
from nbdshard.server.layers.cache_slots import MemorySlots, Slots
from nbdshard.server.opening import Layer, Opening
from nbdshard.server.parameters import Parameters


def _wrap(below: Backend, opening: Opening) -> Backend:
    parameters = opening.parameters
    folder = parameters.text("dir")
    if folder is None and parameters.text("dir-limit") is not None:
        raise UserError("dir-limit= without dir=", parameters.where, "limit= is for a cache in memory")
    block = _size(parameters, "block", CACHE_BLOCK_BYTES_DEFAULT if folder is None else CACHE_DISK_BLOCK_BYTES_DEFAULT)
    if block & (block - 1) or not CACHE_BLOCK_BYTES_MIN <= block <= CACHE_BLOCK_BYTES_MAX:
        allowed = f"{format_bytes(CACHE_BLOCK_BYTES_MIN)} to {format_bytes(CACHE_BLOCK_BYTES_MAX)}"
        raise UserError(f"block={block}: a power of two from {allowed} is expected", parameters.where)
    limit = _limit(parameters, "limit", CACHE_BYTES_DEFAULT, block)
    transfer = min(limit // CACHE_TRANSFER_SHARE, CACHE_TRANSFER_BYTES_MAX)
    mode = parameters.choice("mode", ("writeback", "writethrough"), "writeback")
    if folder is None:
        count = (limit - transfer) // block
        core = CacheCore(_geometry(below, block, CACHE_GRAIN_BYTES), count)
        slots: Slots = MemorySlots(count, block)
    else:
        core, slots = _on_disk(below, opening, Path(folder), block)
    geometry = core.geometry
    return Cache(
        below,
        core,
        slots,
        write_back=mode == "writeback",
        fetchers=max(1, min(CACHE_TRANSFERS_MAX, transfer // 2 // geometry.fetch)),
        writers=max(1, min(CACHE_TRANSFERS_MAX // 2, transfer // 2 // geometry.unit)),
        through=max(below.block_size, geometry.block),
    )


def _on_disk(below: Backend, opening: Opening, folder: Path, block: int) -> tuple[CacheCore, Slots]:
    limit = _limit(opening.parameters, "dir-limit", CACHE_DISK_BYTES_DEFAULT, block)
    grain = max(CACHE_DISK_GRAIN_BYTES, block // CACHE_DISK_GRAINS_MAX)
    export = _identity(f"export {opening.name!r} ({opening.driver} {opening.parameters.where})")
    count = min(limit // block, max(-(-below.size // block), CACHE_BLOCKS_MIN))  # more than all of it is no use
    slots, dirty = open_folder(folder, Header(export, below.size, block, grain, count))
    header = slots.header
    core = CacheCore(_geometry(below, header.block, header.grain), header.slots)
    core.restore(dirty, time.monotonic())
    if dirty:
        logs.warning(f"{folder}: {format_bytes(core.dirty_bytes)} of an earlier run are written back")
    return core, slots


def _identity(text: str) -> str:
    """`text` so that it fits into the index, with a name of its own where it is too long for that."""
    data = text.encode(errors="backslashreplace")
    if len(data) <= CACHE_EXPORT_BYTES_MAX:
        return data.decode()
    return f"{data[:CACHE_EXPORT_BYTES_MAX].decode(errors='replace')}... {hashlib.sha256(data).hexdigest()}"


def _geometry(below: Backend, block: int, grain: int) -> Geometry:
    unit = min(max(below.block_size, block, CACHE_UNIT_BYTES_MIN), CACHE_UNIT_BYTES_MAX)
    return Geometry(below.size, block, grain, unit, fetch=max(block, min(unit, CACHE_FETCH_BYTES_MAX)))


def _limit(parameters: Parameters, name: str, default: int, block: int) -> int:
    limit = _size(parameters, name, default)
    if not CACHE_BLOCKS_MIN * block <= limit <= CACHE_BYTES_MAX:
        least = f"at least {format_bytes(CACHE_BLOCKS_MIN * block)}"
        raise UserError(f"{name}={limit}: {least} is needed with blocks of {format_bytes(block)}", parameters.where)
    return limit


def _size(parameters: Parameters, name: str, default: int) -> int:
    found = parameters.size(name)
    return default if found is None else found


LAYER: Final = Layer(_wrap, frozenset({"block", "dir", "dir-limit", "limit", "mode"}))
