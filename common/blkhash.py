"""The digest of an image: nbdcopy's blkhash with SHA-256 over blocks of 64 KiB, which here are called leaves. Pure.

::

    leaf 0   leaf 1   leaf 2  ...  leaf n-1 (may be shorter)      size: 8 bytes, little-endian
       |        |        |            |                             |
    SHA-256( SHA-256  SHA-256  ...  SHA-256                       size )

Every whole leaf of zeroes has the same digest, so where block status says zero nothing is read and nothing hashed. The
size at the end keeps an image apart from a longer one that begins with the same digests.

Bit for bit what `nbdcopy --blkhash` of libnbd 1.24 prints: its source, copy/blkhash.c, has the construction, nbdcopy(1)
the defaults ("without parameters selects sha256/64k"), copy/copy-blkhash-known.sh digests to compare with.
"""

from __future__ import annotations

import hashlib
from typing import Final

from nbdshard.common.limits import LEAF_BYTES

ALGORITHM: Final = "blkhash sha256/64k"
DIGEST_BYTES: Final = 32
ZERO_LEAF: Final = hashlib.sha256(bytes(LEAF_BYTES)).digest()

_ZERO_LEAVES: Final = ZERO_LEAF * 1024  # hashed at a time


def leaf_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest of one leaf: LEAF_BYTES bytes, or fewer at the end of the image."""
    return hashlib.sha256(data).digest()


def leaves_in(length: int) -> int:
    """How many leaves so many bytes have."""
    return -(-length // LEAF_BYTES)


class Root:
    """Takes the digests of all leaves in their order, makes one of them. `count`: leaves taken so far."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.count = 0

    def data(self, digests: bytes) -> None:
        """The digests of the next leaves, one after the other."""
        self._hash.update(digests)
        self.count += len(digests) // DIGEST_BYTES

    def zeroes(self, count: int) -> None:
        """The next `count` leaves are whole, and zeroes."""
        self.count += count
        whole, rest = divmod(count, 1024)
        for _ in range(whole):
            self._hash.update(_ZERO_LEAVES)
        self._hash.update(_ZERO_LEAVES[: rest * DIGEST_BYTES])

    def finish(self, size: int) -> str:
        """The digest of an image of `size` bytes, in hexadecimal, once all of its leaves were taken."""
        whole = self._hash.copy()
        whole.update(size.to_bytes(8, "little"))
        return whole.hexdigest()
