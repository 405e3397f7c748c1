"""Deterministic images and patterns, and fast comparison: by bytes, by hash, and by `qemu-img compare`."""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
COMPARE_SECONDS = 300.0

# Sizes at which programs that copy blocks break: around sectors, pages and mebibytes, and one that divides by nothing.
ODD_SIZES = (1, 511, 513, 4095, 4097, MIB - 1, MIB + 1, 10_000_001)


def pattern(start: int, length: int) -> bytes:
    """nbdkit's pattern plugin: the 64-bit big-endian offset of every 8 bytes; so a misplaced block shows."""
    first = start // 8
    words = b"".join(number.to_bytes(8, "big") for number in range(first * 8, start + length + 8, 8))
    skip = start - first * 8
    return words[skip : skip + length]


def random_bytes(length: int, seed: int = 1) -> bytes:
    """Incompressible, hardly any zero blocks; the same for the same seed."""
    return random.Random(seed).randbytes(length)


def random_image(path: Path, size: int, seed: int = 1) -> Path:
    """A dense image of `size` bytes."""
    path.write_bytes(random_bytes(size, seed))
    return path


def sparse_image(path: Path, size: int, seed: int = 1, runs: int = 8) -> Path:
    """Data, holes and written zeroes in runs of random length; the image's first and last bytes are data.

    Of each three neighbours, about one is data, one a hole of the file, one zeroes that occupy space.
    """
    source = random.Random(seed)
    borders = sorted({0, size, *(source.randrange(size + 1) for _ in range(runs * 3))})
    with path.open("wb") as file:
        file.truncate(size)
        for start, end in itertools.pairwise(borders):
            kind = source.choice(("data", "hole", "zero"))
            if kind == "hole":
                continue
            file.seek(start)
            file.write(source.randbytes(end - start) if kind == "data" else bytes(end - start))
        for offset in {0, max(size - 1, 0)} if size else ():
            file.seek(offset)
            file.write(b"\xa5")
    return path


def empty_image(path: Path, size: int) -> Path:
    """A hole of `size` bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def filled_image(path: Path, size: int, byte: int = 0xEE) -> Path:
    """`size` bytes of the same value: old content, of which a forgotten block shows."""
    with path.open("wb") as file:
        left = size
        while left:
            left -= file.write(bytes([byte]) * min(left, MIB))
    return path


def sha256(path: Path, length: int | None = None) -> str:
    """Of the first `length` bytes, or of all."""
    digest = hashlib.sha256()
    left = path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while left and (block := file.read(min(left, MIB))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def difference(left: Path, right: Path, length: int | None = None) -> int | None:
    """The offset of the first byte that differs in the first `length` (or all) bytes; None when all are equal."""
    end = length if length is not None else max(left.stat().st_size, right.stat().st_size)
    with left.open("rb") as one, right.open("rb") as two:
        offset = 0
        while offset < end:
            want = min(end - offset, MIB)
            first, second = one.read(want), two.read(want)
            if first != second:
                pairs = zip(first, second, strict=False)
                same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
                return offset + same
            if not first:
                return None
            offset += len(first)
    return None


def assert_identical(left: Path, right: Path) -> None:
    """Same size, same bytes."""
    assert left.stat().st_size == right.stat().st_size
    assert difference(left, right) is None


def assert_begins_with(larger: Path, smaller: Path, *, rest: int) -> None:
    """`larger` holds `smaller` at its start, and behind it nothing but the byte `rest`."""
    size = smaller.stat().st_size
    assert difference(larger, smaller, size) is None
    with larger.open("rb") as file:
        file.seek(size)
        while block := file.read(MIB):
            assert block == bytes([rest]) * len(block), f"bytes behind {size} were changed"


def qemu_compare(left: str | Path, right: str | Path) -> str:
    """ "" when `qemu-img compare` finds the same content in both (URIs or raw files), otherwise what it says."""
    command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(left), str(right)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=COMPARE_SECONDS, check=False)
    return "" if ended.returncode == 0 else ended.stdout + ended.stderr


def allocated_bytes(path: Path) -> int:
    """What the file occupies on its file system."""
    return path.stat().st_blocks * 512
