"""Which image a store holds in chunks: how long it is, how it is cut, and what its objects are called.

Three layouts are known. A volume of nbdshard has a description, `NAME.volume`, and chunks `NAME.0.chunk` and so on.
nbd-rs wrote such chunks without a description (their size has to be told), and later `block-0` and an object `size`.
"""

from __future__ import annotations

import contextlib
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
OLD_SIZE: Final = "size"  # the object that nbd-rs keeps the size in


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `NAME.volume` says, as JSON. Sizes in bytes."""

    format: int
    size: int
    chunk_bytes: int


class Volume(msgspec.Struct, frozen=True):
    """An image in a store. The key of chunk 7 is `before`, "7", `after`; `described_by` that of what says its size."""

    size: int
    chunk_bytes: int
    before: str
    after: str
    described_by: str

    def key_of(self, number: int) -> str:
        """The key of a chunk."""
        return f"{self.before}{number}{self.after}"

    def number_of(self, key: str) -> int | None:
        """The number of the chunk that has this key; None where it is no chunk of this volume's."""
        if not (key.startswith(self.before) and key.endswith(self.after)):
            return None
        digits = key[len(self.before) : len(key) - len(self.after)]
        if not _is_number(digits):
            return None
        return int(digits)


def open_volume(store: Store, name: str, *, size: int | None, chunk_bytes: int | None, read_only: bool) -> Volume:
    """The volume `name` in `store`, claimed; a new one where there is none and `size` says how large.

    `size` and `chunk_bytes`: what the user said, which must not contradict what is there. Raises UserError, OSError.
    """
    check_name(name)
    found = find_volume(store, name)
    if found is None and size is None:
        raise UserError("there is no such volume", name, "size= makes a new one")
    if found is None and read_only:
        return _checked(_of(name, Description(_FORMAT, size or 0, chunk_bytes or CHUNK_BYTES_DEFAULT)))
    if found is None:
        with contextlib.suppress(FileExistsError):  # somebody else has just made it
            create_volume(store, name, size or 0, chunk_bytes)
        found = find_volume(store, name)
    if found is not None:
        store.claim(found.described_by, alone=not read_only)
        found = find_volume(store, name)  # again: it may have been changed by who had it
    if found is None:
        raise UserError("is being deleted", name)
    if size not in (None, found.size):
        raise UserError(f"size={size}, and the volume has {found.size} bytes", name)
    if chunk_bytes not in (None, found.chunk_bytes):
        raise UserError(f"chunk={chunk_bytes}, and the volume's chunks have {found.chunk_bytes} bytes", name)
    return found


def find_volume(store: Store, name: str) -> Volume | None:
    """The volume `name`, or the only one that nbd-rs made. Raises UserError, OSError."""
    return _described(store, name) or _of_old(store)


def create_volume(store: Store, name: str, size: int, chunk_bytes: int | None) -> Volume:
    """Describe a new volume; chunks of this name that are there are its own. Raises UserError, OSError.

    FileExistsError says that there is one.
    """
    check_name(name)
    description = Description(_FORMAT, size, chunk_bytes or CHUNK_BYTES_DEFAULT)
    volume = _checked(_of(name, description))
    store.put(volume.described_by, msgspec.json.encode(description), is_new=True)
    return volume


def describe(store: Store, volume: Volume) -> None:
    """Change the description of `volume`, which is claimed, to what it says now. Raises UserError, OSError."""
    _checked(volume)
    if volume.described_by == OLD_SIZE:
        text = str(volume.size).encode()
    else:
        text = msgspec.json.encode(Description(_FORMAT, volume.size, volume.chunk_bytes))
    store.put(volume.described_by, text, is_new=False)


def check_name(name: str) -> None:
    """Raises UserError."""
    if "/" in name or not name:
        raise UserError(f"no volume can be called {name!r}", advice="a name is not empty and has no / in it")


def _of(name: str, description: Description) -> Volume:
    return Volume(description.size, description.chunk_bytes, f"{name}.", ".chunk", f"{name}.volume")


def _described(store: Store, name: str) -> Volume | None:
    key = f"{name}.volume"
    text = store.read(key, Range(0, _DESCRIPTION_BYTES_MAX))
    if text is None:
        return None
    try:
        found = msgspec.json.decode(text, type=Description)
    except msgspec.MsgspecError as error:
        raise UserError(f"is no description of a volume: {error}", key) from None
    if found.format != _FORMAT:
        raise UserError(f"a volume of format {found.format}; this nbdshard knows format {_FORMAT}", key)
    return _checked(_of(name, found))


def _of_old(store: Store) -> Volume | None:
    text = store.read(OLD_SIZE, Range(0, 64))
    if text is None:
        return None
    text = bytes(text)
    digits = text.strip().decode("latin-1")
    if not _is_number(digits):
        raise UserError(f"holds {text[:20]!r} where the image's size in digits is expected", OLD_SIZE)
    return _checked(Volume(int(digits), CHUNK_BYTES_DEFAULT, "block-", "", OLD_SIZE))


def _is_number(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) < 20 and (digits[0] != "0" or digits == "0")


def _checked(volume: Volume) -> Volume:
    size, chunk_bytes, where = volume.size, volume.chunk_bytes, volume.described_by
    if not 0 < size <= EXPORT_BYTES_MAX:
        raise UserError(f"a size of {size} bytes", where)
    is_power = chunk_bytes & (chunk_bytes - 1) == 0
    if not is_power or not VOLUME_CHUNK_BYTES_MIN <= chunk_bytes <= VOLUME_CHUNK_BYTES_MAX:
        allowed = f"{format_bytes(VOLUME_CHUNK_BYTES_MIN)} to {format_bytes(VOLUME_CHUNK_BYTES_MAX)}"
        raise UserError(f"chunks of {chunk_bytes} bytes", where, f"a power of two from {allowed} is expected")
    return volume
