"""What can be done to volumes that nobody serves: made, resized, deleted, listed. Each step is durable before the next.

A volume that is made smaller is described as smaller first; then what is beyond its end goes. If that is interrupted,
something may be left there: so one that is made larger is cleared beyond its end before it is. Nothing that was cut off
is ever seen again. A volume that is deleted loses its chunks first: without a description they would be those of the
next one of this name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.server.stores.base import Store
from nbdshard.server.volumes import OLD_SIZE, Volume, check_name, create_volume, describe, find_volume

_CHUNK: Final = re.compile(r"(?P<name>.+)\.(?:0|[1-9][0-9]*)\.chunk|block-(?:0|[1-9][0-9]*)", re.DOTALL)
_SUFFIX: Final = ".volume"


class Listed(msgspec.Struct, frozen=True):
    """A volume as it is listed. `name`: None for that of nbd-rs, which has none; `stored_bytes`: room of its chunks.

    Chunks without a description have no `volume`; `problem` says why one with a description has none.
    """

    name: str | None
    volume: Volume | None
    stored_bytes: int
    problem: str = ""


def create(store: Store, name: str, size: int, chunk_bytes: int | None) -> Volume:
    """A new volume, all zeroes. Raises UserError where there is one, or chunks are left of one; OSError."""
    check_name(name)
    if find_volume(store, name) is not None:
        raise UserError("there is such a volume already", name)
    mine = (match for match in map(_CHUNK.fullmatch, store.keys()) if match is not None and match["name"] == name)
    if next(mine, None) is not None:
        raise UserError("chunks of that name are there already", name, "`nbdshard serve` with size= takes them over")
    try:
        return create_volume(store, name, size, chunk_bytes)
    except FileExistsError:
        raise UserError("somebody else has just made it", name) from None


def resize(store: Store, name: str, size: int, *, may_shrink: bool) -> tuple[int, int]:
    """Give the volume `size` bytes: what it had, and how many chunks went. Raises UserError, OSError."""
    volume = _claimed(store, name)
    changed = msgspec.structs.replace(volume, size=size)
    if size >= volume.size:
        gone = _clear_beyond(store, volume)
        describe(store, changed)
        return volume.size, gone
    if not may_shrink:
        raise UserError(f"has {volume.size} bytes, and {size} are fewer", name, "--shrink gives up what is beyond")
    describe(store, changed)
    return volume.size, _clear_beyond(store, changed)


def delete(store: Store, name: str) -> int:
    """The volume and all its chunks, whose number is returned. Raises UserError, OSError."""
    volume = _claimed(store, name)
    gone = _delete_from(store, volume, 0)
    store.sync()
    store.delete(volume.described_by)
    store.sync()
    return gone


def listed(store: Store) -> Iterator[Listed]:
    """All volumes, by name. Raises OSError."""
    stored: defaultdict[str | None, int] = defaultdict(int)
    described: set[str | None] = set()
    for key, size in store.stored():
        if (match := _CHUNK.fullmatch(key)) is not None:
            stored[match["name"]] += size
        elif key.endswith(_SUFFIX) and key != _SUFFIX:
            described.add(key.removesuffix(_SUFFIX))
        elif key == OLD_SIZE:
            described.add(None)
    for name in sorted(described | stored.keys(), key=lambda name: name or ""):
        volume, problem = None, ""
        if name in described:
            try:
                volume = find_volume(store, name or "")
            except UserError as error:
                problem = str(error)
        yield Listed(name, volume, stored[name], problem)


def _claimed(store: Store, name: str) -> Volume:
    """The volume `name`, nobody else having it. Raises UserError, OSError."""
    check_name(name)
    volume = find_volume(store, name)
    if volume is not None:
        store.claim(volume.described_by, alone=True)
        volume = find_volume(store, name)
    if volume is None:
        raise UserError("there is no such volume", name)
    return volume


def _clear_beyond(store: Store, volume: Volume) -> int:
    """Delete the chunks beyond the end, and cut the one that the end is in. How many were deleted."""
    whole, rest = divmod(volume.size, volume.chunk_bytes)
    if rest:
        store.cut(volume.key_of(whole), rest)
    gone = _delete_from(store, volume, whole + bool(rest))
    store.sync()
    return gone


def _delete_from(store: Store, volume: Volume, first: int) -> int:
    numbers = (volume.number_of(key) for key in store.keys())  # noqa: SIM118  (no mapping)
    beyond = [number for number in numbers if number is not None and number >= first]
    return sum(store.delete(volume.key_of(number)) for number in beyond)
