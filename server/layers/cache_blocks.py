"""What the cache's machine is made of: how an image is cut, blocks, and what it is told and tells. Pure.

An image is cut into blocks, which have a slot of the cache each; a block into grains, a bit each in a mask. Blocks are
written back by aligned units, which are what the layer below likes to be given.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.layers.cache_states import BlockState


class Geometry(msgspec.Struct, frozen=True):
    """How an image of `size` bytes is cut. All are powers of two: grain <= block <= unit, and block <= fetch."""

    size: int
    block: int
    grain: int  # what a bit stands for: a block may hold some of its grains only
    unit: int  # written back together
    fetch: int  # asked of what is below at a time, at most

    def parts(self, where: Range) -> Iterator[tuple[int, int, int]]:
        """(number of a block, first byte within it, the byte after the last) for each that `where` touches."""
        for number in range(where.start // self.block, -(-where.end // self.block)):
            first = number * self.block
            yield number, max(where.start - first, 0), min(where.end - first, self.block)

    def length(self, number: int) -> int:
        """Of a block, in bytes: the last one may be shorter."""
        return min(self.block, self.size - number * self.block)

    def full(self, number: int) -> int:
        """The mask of all its grains."""
        return (1 << -(-self.length(number) // self.grain)) - 1

    def outer(self, start: int, end: int) -> int:
        """The mask of the grains that these bytes of a block touch."""
        return (1 << -(-end // self.grain)) - (1 << start // self.grain)

    def inner(self, number: int, start: int, end: int) -> int:
        """The mask of the grains that these bytes of a block cover whole; the last of the image may be shorter."""
        first = -(-start // self.grain)
        last = -(-end // self.grain) if end == self.length(number) else end // self.grain
        return (1 << last) - (1 << first) if first < last else 0

    def units(self, where: Range) -> tuple[int, int]:
        """The numbers of the units that `where` touches: the first, the one after the last."""
        return where.start // self.unit, -(-where.end // self.unit)


def runs(mask: int) -> Iterator[tuple[int, int]]:
    """(first, the one after the last) for each run of bits that are set, in order."""
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        length = (~mask & (mask + 1)).bit_length() - 1
        yield at + skip, at + skip + length
        mask >>= length
        at += skip + length


class Block:
    """A block that the cache holds, or part of one. Masks of grains:

    `valid`: what its slot holds; `dirty`: what is not known to be below, `flying` what of that is on its way there, and
    `again` what of that was written to since; `putting`: what writers are copying into the slot; `kept`: what a journal
    has to have, because it is dirty, or no flush has followed on its way below.
    """

    __slots__ = (
        "again",
        "dirty",
        "fetching",
        "flying",
        "kept",
        "landing",
        "number",
        "pins",
        "putting",
        "slot",
        "state",
        "valid",
        "writers",
    )

    def __init__(self, number: int, slot: int) -> None:
        self.number = number
        self.slot = slot
        self.state = BlockState.CLEAN
        self.valid = self.dirty = self.flying = self.again = self.putting = self.kept = 0
        self.pins = 0  # of readers, writers and a fetch: it keeps its slot
        self.writers = 0  # that copy into its slot
        self.fetching = False  # what it misses has been asked for
        self.landing = False  # ... and is being copied into its slot

    def __repr__(self) -> str:
        masks = " ".join(f"{name}={getattr(self, name):x}" for name in ("valid", "dirty", "flying", "again", "kept"))
        return f"block {self.number} in slot {self.slot}, {self.state.name}, {masks}, {self.pins} pins"


class Unit:
    """An aligned stretch of the image with dirty blocks in it. Sequences count the writes to the whole cache."""

    __slots__ = ("dirty", "flying_oldest", "number", "oldest", "since")

    def __init__(self, number: int) -> None:
        self.number = number
        self.dirty: set[int] = set()  # numbers of blocks
        self.oldest: int | None = None  # the first write that is not below, nor on its way
        self.since = 0.0  # when that was
        self.flying_oldest: int | None = None  # the first write that is on its way


class Part(msgspec.Struct, frozen=True):
    """Bytes of a block. `mask`: its grains that they touch."""

    block: Block
    start: int
    end: int
    mask: int


class Reading:
    """A range that somebody reads. A part without a block has no room in the cache: it is read around it."""

    __slots__ = ("parts", "where")

    def __init__(self, where: Range, parts: list[tuple[int, int, int, Block | None]]) -> None:
        self.where = where
        self.parts = parts


class Fetch(msgspec.Struct, frozen=True):
    """To be read below, for these blocks, and put where it is missed."""

    where: Range
    blocks: list[Block]


class Writing(msgspec.Struct, frozen=True):
    """Bytes to be copied into slots now; `end`: of the range of which they are the beginning."""

    parts: list[Part]
    end: int


class Run(msgspec.Struct, frozen=True):
    """One write to what is below, from these pieces of slots: (slot, first byte, the byte after the last)."""

    where: Range
    pieces: list[tuple[int, int, int]]


class WriteBack(msgspec.Struct, frozen=True):
    """A unit that is to be written. `flown`: the blocks and grains that are on their way."""

    unit: Unit
    runs: list[Run]
    flown: list[tuple[Block, int]]


def runs_below(flown: list[tuple[Block, int]], geometry: Geometry) -> list[Run]:
    """The writes for these grains of these blocks, which are in order. Between two of them, what is held goes along."""
    found: list[Run] = []
    for block, mask in flown:
        base = block.number * geometry.block
        pieces = list(runs(mask))
        at = pieces[0][0]
        for index, (_, last) in enumerate(pieces):
            if index + 1 < len(pieces):
                gap = (1 << pieces[index + 1][0]) - (1 << last)
                if not gap & ~block.valid:
                    continue
            start, end = at * geometry.grain, min(last * geometry.grain, geometry.length(block.number))
            if found and found[-1].where.end == base + start:
                before = found[-1]
                found[-1] = Run(Range(before.where.start, base + end), [*before.pieces, (block.slot, start, end)])
            else:
                found.append(Run(Range(base + start, base + end), [(block.slot, start, end)]))
            if index + 1 < len(pieces):
                at = pieces[index + 1][0]
    return found


class Flush:
    """Somebody waits until all writes up to `sequence` are below. `error`: of a unit that failed meanwhile."""

    __slots__ = ("error", "sequence", "units")

    def __init__(self, sequence: int, units: dict[int, None]) -> None:
        self.sequence = sequence
        self.units = units  # numbers of those that are not done yet
        self.error: OSError | None = None


class Through:
    """A range that somebody changes below, with nothing between: `blocks` and `units` it touches, by number."""

    __slots__ = ("blocks", "units", "where")

    def __init__(self, where: Range, geometry: Geometry) -> None:
        self.where = where
        self.blocks = Range(where.start // geometry.block, -(-where.end // geometry.block))
        self.units = Range(*geometry.units(where))


def laid_over(found: Extents, dirty: list[Range]) -> Extents:
    """`found`, where what is `dirty` is data, whatever it was. Both are in order."""
    over: Extents = []

    def add(start: int, end: int, flags: int) -> None:
        if start >= end:
            return
        if over and over[-1][1] == flags:
            over[-1] = (Range(over[-1][0].start, end), flags)
        else:
            over.append((Range(start, end), flags))

    index = 0
    for piece, flags in found:
        at = piece.start
        while index < len(dirty) and dirty[index].start < piece.end:
            add(at, dirty[index].start, flags)
            add(max(at, dirty[index].start), min(dirty[index].end, piece.end), 0)
            at = max(at, min(dirty[index].end, piece.end))
            if dirty[index].end > piece.end:
                break
            index += 1
        add(at, piece.end, flags)
    return over
