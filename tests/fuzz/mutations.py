"""Ways to spoil a stream of bytes, all from one random generator."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

BOUNDARIES = [0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
BOUNDARIES += [1 << 20, 1 << 25, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8]


def _flip(data: bytearray, random: Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _overwrite(data: bytearray, random: Random) -> None:
    data[random.randrange(len(data))] = random.randrange(256)


def _number(data: bytearray, random: Random) -> None:
    """A number at a limit in the place of a field; most fields lie at even offsets."""
    width = random.choice((1, 2, 4, 8))
    at = random.randrange(len(data)) & ~1
    data[at : at + width] = (random.choice(BOUNDARIES) & ((1 << 8 * width) - 1)).to_bytes(width, "big")


def _nudge(data: bytearray, random: Random) -> None:
    """A field that is off by a little."""
    at, width = random.randrange(len(data)), random.choice((2, 4, 8))
    value = int.from_bytes(data[at : at + width], "big") + random.choice((-8, -1, 1, 8))
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "big")


def _insert(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = random.randbytes(random.randrange(1, 40))


def _delete(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data))
    del data[at : at + random.randrange(1, 40)]


def _repeat(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data))
    piece = data[at : at + random.randrange(1, 80)]
    data[at:at] = piece * random.randrange(1, 80)


def _move(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data))
    piece = data[at : at + random.randrange(1, 80)]
    del data[at : at + len(piece)]
    to = random.randrange(len(data) + 1)
    data[to:to] = piece


def _truncate(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data)) :]


def _flood(data: bytearray, random: Random) -> None:
    data += random.randbytes(random.choice((10, 1000, 70_000)))


MUTATIONS: list[Callable[[bytearray, Random], None]] = [
    _flip,
    _overwrite,
    _number,
    _number,
    _number,
    _nudge,
    _insert,
    _delete,
    _repeat,
    _move,
    _truncate,
    _flood,
]


def spoil(stream: bytes, random: Random) -> bytes:
    """`stream` with a few mutations; now and then with none."""
    data = bytearray(stream)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3, 8))):
        if not data:
            break
        random.choice(MUTATIONS)(data, random)
    return bytes(data)
