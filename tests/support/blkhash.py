"""nbdcopy's blkhash, written down a second time and as plainly as can be: what every checksum is compared with."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

BLOCK = 65536


def blkhash(content: bytes) -> str:
    """The SHA-256 digest of the digests of all blocks of 64 KiB and the size; all of it in memory."""
    digests = [sha256(content[at : at + BLOCK]).digest() for at in range(0, len(content), BLOCK)]
    return sha256(b"".join(digests) + len(content).to_bytes(8, "little")).hexdigest()


def blkhash_of(path: Path) -> str:
    """The same of a file."""
    return blkhash(path.read_bytes())
