"""Which image a store holds in chunks: how long it is, how it is cut, and what its objects are called.

Three layouts are known. A volume of nbdshard has a description, `NAME.volume`, and chunks `NAME.0.chunk` and so on.
nbd-rs wrote such chunks without a description (their size has to be told), and later `block-0` and an object `size`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import CHUNK_BYTES_DEFAULT, VOLUME_CHUNK_BYTES_MAX, VOLUME_CHUNK_BYTES_MIN
from nbdshard.common.nbd.constants import EXPORT_BYTES_MAX
from nbdshard.common.ranges import Range
from nbdshard.common.units import format_bytes
from nbdshard.server.stores.base import Store

_DESCRIPTION_BYTES_MAX: Final = 4096
_FORMAT: Final = 1
_OLD_SIZE: Final = "size"  # the object that nbd-rs keeps the size in


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `NAME.volume` says, as JSON. Sizes in bytes."""

    format: int
    size: int
    chunk_bytes: int


class Volume(msgspec.Struct, frozen=True):
    """An image in a store. `key_of`: the key of a chunk by its number."""

    size: int
    chunk_bytes: int
    key_of: Callable[[int], str]


def open_volume(store: Store, name: str, *, size: int | None, chunk_bytes: int | None, read_only: bool) -> Volume:
    """The volume `name` in `store`; a new one where there is none and `size` says how large. Raises UserError, OSError.

    `size` and `chunk_bytes`: what the user said, which must not contradict what is there.
    """
    if "/" in name or not name:
        raise UserError(f"an image called {name!r}", advice="its name is part of its chunks' names")
    found = _described(store, name) or _of_old(store)
    if found is None:
        found = _new(store, name, size, chunk_bytes, read_only=read_only)
    if size not in (None, found.size):
        raise UserError(f"size={size}, and the volume has {found.size} bytes", name)
    if chunk_bytes not in (None, found.chunk_bytes):
        raise UserError(f"chunk={chunk_bytes}, and the volume's chunks have {found.chunk_bytes} bytes", name)
    return found


def key_of(name: str) -> Callable[[int], str]:
    """The keys of the chunks of image `name`."""
    return lambda number: f"{name}.{number}.chunk"


def _old_key_of(number: int) -> str:
    return f"block-{number}"


def _described(store: Store, name: str) -> Volume | None:
    text = store.read(f"{name}.volume", Range(0, _DESCRIPTION_BYTES_MAX))
    if text is None:
        return None
    try:
        found = msgspec.json.decode(text, type=Description)
    except msgspec.MsgspecError as error:
        raise UserError(f"is no description of a volume: {error}", f"{name}.volume") from None
    if found.format != _FORMAT:
        raise UserError(f"a volume of format {found.format}; this nbdshard knows format {_FORMAT}", f"{name}.volume")
    _check(found.size, found.chunk_bytes, f"{name}.volume")
    return Volume(found.size, found.chunk_bytes, key_of(name))


def _of_old(store: Store) -> Volume | None:
    text = store.read(_OLD_SIZE, Range(0, 64))
    if text is None:
        return None
    digits = text.strip()
    if not digits.isdigit():
        raise UserError(f"holds {text[:20]!r} where the image's size in digits is expected", _OLD_SIZE)
    _check(int(digits), CHUNK_BYTES_DEFAULT, _OLD_SIZE)
    return Volume(int(digits), CHUNK_BYTES_DEFAULT, _old_key_of)


def _new(store: Store, name: str, size: int | None, chunk_bytes: int | None, *, read_only: bool) -> Volume:
    if size is None:
        raise UserError("there is no such volume", name, "size= makes a new one")
    chunk_bytes = chunk_bytes or CHUNK_BYTES_DEFAULT
    _check(size, chunk_bytes, name)
    if not read_only:
        key = f"{name}.volume"
        text = msgspec.json.encode(Description(_FORMAT, size, chunk_bytes))
        store.write(key, Range(0, len(text)), memoryview(text))
        store.sync([key])
    return Volume(size, chunk_bytes, key_of(name))


def _check(size: int, chunk_bytes: int, where: str) -> None:
    if not 0 < size <= EXPORT_BYTES_MAX:
        raise UserError(f"a size of {size} bytes", where)
    is_power = chunk_bytes & (chunk_bytes - 1) == 0
    if not is_power or not VOLUME_CHUNK_BYTES_MIN <= chunk_bytes <= VOLUME_CHUNK_BYTES_MAX:
        allowed = f"{format_bytes(VOLUME_CHUNK_BYTES_MIN)} to {format_bytes(VOLUME_CHUNK_BYTES_MAX)}"
        raise UserError(f"chunks of {chunk_bytes} bytes", where, f"a power of two from {allowed} is expected")
