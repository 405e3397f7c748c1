"""The cache as a machine: which blocks it holds, which of them are dirty, on their way, in use. Pure.

Calls are events; what they return is to be done, without the caller's lock, and reported. No bytes come by here: they
are in slots, which the caller keeps. Time is an argument. How a request goes:

    reading    begin_read, then wanted until nothing is; fetches are landed or failed; end_read
    writing    begin_write, which grants what there is room for; then end_write or failed_write, and again for the rest
    below      next_write_back; then written_back or write_back_failed
    flush      units.begin_flush, until it has no units any more; units.end_flush
    through    begin_through, may_pass, end_through: a change below that has the range to itself
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum, auto
from typing import Final

from nbdshard.common.errors import BugError
from nbdshard.common.limits import CACHE_DIRTY_SHARE_START, CACHE_SPARE_SHARE
from nbdshard.common.nbd.states import advance
from nbdshard.common.ranges import Range
from nbdshard.server.layers.cache_blocks import (
    Block,
    Fetch,
    Geometry,
    Part,
    Reading,
    Through,
    WriteBack,
    Writing,
    runs,
    runs_below,
)
from nbdshard.server.layers.cache_states import BLOCK_STATES, BlockState
from nbdshard.server.layers.cache_units import CacheUnits


class Obstacle(Enum):
    """Why a write is not granted whole."""

    ROOM = auto()  # everything is dirty or in use: a write-back makes room
    BUSY = auto()  # something else has the block for a moment
    GRAIN = auto()  # only part of a grain is written, and the cache does not hold the rest: it is to be read first


_CLEAN: Final = BlockState.CLEAN


class CacheCore:
    """A cache of `slots` blocks. `validate` checks all it promises."""

    def __init__(self, geometry: Geometry, slots: int) -> None:
        self.geometry = geometry
        self.slots = slots
        # So many blocks are dirty at most: what is left is for readers, who would else read around the cache.
        self.dirty_max = max(1, slots - max(1, slots // CACHE_SPARE_SHARE))
        self.claimed = 0  # blocks that are dirty, or being written to
        self.waiting = 0  # writers that wait for room; counted by the caller
        self.units = CacheUnits()
        self.changed: dict[int, Block | None] = {}  # by slot: what a journal of `Block.kept` has to be told
        self._blocks: dict[int, Block] = {}
        self._idle: OrderedDict[int, Block] = OrderedDict()  # clean and not in use; the one used last is last
        self._free = list(range(slots - 1, -1, -1))
        self._busy: set[int] = set()  # blocks that are fetched or written to
        self._throughs: list[Through] = []

    # -- reading ------------------------------------------------------------------------------------------------------

    def begin_read(self, where: Range) -> Reading:
        """Its blocks stay where they are until `end_read`."""
        parts: list[tuple[int, int, int, Block | None]] = []
        for number, start, end in self.geometry.parts(where):
            block = self._blocks.get(number)
            if block is not None:
                self._pin(block)
            parts.append((number, start, end, block))
        for index, (number, start, end, block) in enumerate(parts):  # now that those that are there are safe
            if block is None and (made := self._make(number)) is not None:
                self._pin(made)
                parts[index] = (number, start, end, made)
        return Reading(where, parts)

    def begin_hit(self, where: Range) -> Reading | None:
        """As `begin_read`, where the cache holds all of it; None, and nothing is begun, where it does not."""
        parts: list[tuple[int, int, int, Block | None]] = []
        for number, start, end in self.geometry.parts(where):
            block = self._blocks.get(number)
            if block is None or self.geometry.outer(start, end) & ~block.valid:
                return None
            parts.append((number, start, end, block))
        for *_, block in parts:
            assert block is not None
            self._pin(block)
        return Reading(where, parts)

    def wanted(self, reading: Reading) -> tuple[list[Fetch], bool]:
        """What its caller has to fetch now; and whether there is something else to be waited for."""
        missed: list[Block] = []
        waits = False
        for number, start, end, block in reading.parts:
            if block is not None and self.geometry.outer(start, end) & ~block.valid:
                if block.fetching or self._is_barred(number):
                    waits = True
                else:
                    missed.append(block)
        return list(self._fetches(missed)), waits

    def _fetches(self, missed: list[Block]) -> Iterator[Fetch]:
        geometry = self.geometry
        together: list[Block] = []
        for index, block in enumerate(missed):
            block.fetching = True
            self._pin(block)
            self._busy.add(block.number)
            together.append(block)
            end = (block.number + 1) * geometry.block
            following = missed[index + 1].number if index + 1 < len(missed) else None
            if following != block.number + 1 or end % geometry.fetch == 0:
                yield Fetch(Range(together[0].number * geometry.block, min(end, geometry.size)), together)
                together = []

    def begin_landing(self, fetch: Fetch) -> list[tuple[Block, int]]:
        """Which grains of which blocks it is to be copied to. Nobody else writes there until it has landed."""
        for block in fetch.blocks:
            block.landing = True
        return [(block, self.geometry.full(block.number) & ~block.valid & ~block.putting) for block in fetch.blocks]

    def landed(self, fetch: Fetch, parts: list[tuple[Block, int]]) -> None:
        """What `begin_landing` said is done."""
        for block, mask in parts:
            block.valid |= mask
        self.fetch_failed(fetch)

    def fetch_failed(self, fetch: Fetch) -> None:
        """It will not be landed: who else waits for it tries by itself."""
        for block in fetch.blocks:
            block.landing = block.fetching = False
            self._rest_of(block)
            self._unpin(block)

    def end_read(self, reading: Reading) -> None:
        """It is copied, or given up."""
        for _, _, _, block in reading.parts:
            if block is not None:
                self._unpin(block)

    # -- writing ------------------------------------------------------------------------------------------------------

    def begin_write(self, where: Range) -> tuple[Writing, Obstacle | None]:
        """As much of the beginning of `where` as there is room for now, and why not more."""
        parts: list[Part] = []
        at, obstacle = where.start, None
        for number, start, end in self.geometry.parts(where):
            block = self._blocks.get(number)
            obstacle = self._obstacle(number, block, start, end)
            if obstacle is None and block is None:
                block = self._make(number)
                obstacle = Obstacle.ROOM if block is None else None
            if block is None or obstacle is not None:
                break
            self._pin(block)
            self.claimed += not self._is_claimed(block)
            block.writers += 1
            self._busy.add(number)
            mask = self.geometry.outer(start, end)
            block.putting |= mask
            parts.append(Part(block, start, end, mask))
            at = number * self.geometry.block + end
        return Writing(parts, at), obstacle

    def _obstacle(self, number: int, block: Block | None, start: int, end: int) -> Obstacle | None:
        if self._is_barred(number) or (block is not None and block.landing):
            return Obstacle.BUSY
        odd = self.geometry.outer(start, end) & ~self.geometry.inner(number, start, end)
        if odd & ~(block.valid if block is not None else 0):
            return Obstacle.GRAIN
        if self.claimed >= self.dirty_max and (block is None or not self._is_claimed(block)):
            return Obstacle.ROOM
        return None

    def end_write(self, writing: Writing, now: float) -> None:
        """It is copied: whoever reads from now on sees it, and every flush from now on covers it."""
        for part in writing.parts:
            part.block.valid |= part.mask
            self._soil(part.block, part.mask, now)
        self.failed_write(writing)

    def failed_write(self, writing: Writing) -> None:
        """It could not be copied, and may be there in part."""
        for part in writing.parts:
            block = part.block
            block.writers -= 1
            if not block.writers:
                block.putting = 0
                self.claimed -= not self._is_claimed(block)
            self._rest_of(block)
            self._unpin(block)

    def restore(self, held: Mapping[int, tuple[int, int]], now: float) -> None:
        """At the start: a journal says that these slots hold these blocks' grains, which may not be below."""
        self._free = [slot for slot in self._free if slot not in held]
        for slot, (number, dirty) in held.items():
            block = self._blocks[number] = Block(number, slot)
            block.valid = dirty
            self.claimed += 1
            self._soil(block, dirty, now)
        self.changed.clear()  # by nothing that the journal does not have

    # -- writing back -------------------------------------------------------------------------------------------------

    def next_write_back(self, now: float) -> WriteBack | None:
        """The next unit that is to be written below, if one is: for a flush, for want of room, or for its age."""
        unit = self.units.next(now, is_full=self._is_full, is_barred=self._is_unit_barred)
        if unit is None:
            return None
        flown: list[tuple[Block, int]] = []
        for number in sorted(unit.dirty):
            block = self._blocks[number]
            block.flying = block.dirty
            self._go(block, BlockState.WRITING)
            flown.append((block, block.dirty))
        return WriteBack(unit, runs_below(flown, self.geometry), flown)

    def next_look(self) -> float | None:
        """When `next_write_back` has something, at the latest, if nothing else happens."""
        return self.units.next_look(is_full=self._is_full)

    @property
    def has_room(self) -> bool:
        """One more block may be dirty."""
        return self.claimed < self.dirty_max

    @property
    def _is_full(self) -> bool:
        """There is so much to write back that it is not waited for more."""
        return self.waiting > 0 or self.claimed * CACHE_DIRTY_SHARE_START > self.dirty_max

    def written_back(self, done: WriteBack) -> None:
        """All of it is below."""
        for block, mask in done.flown:
            block.dirty &= ~(mask & ~block.again)
            self._came_down(block)
        self.units.written_back(done.unit)

    def write_back_failed(self, done: WriteBack, error: OSError, now: float) -> None:
        """It may be below in part: it is as dirty as it was, and will be tried again; flushes that cover it fail."""
        for block, _ in done.flown:
            self._came_down(block)
        self.units.failed(done.unit, error, now)

    def _came_down(self, block: Block) -> None:
        block.flying = block.again = 0
        if block.dirty:
            self._go(block, BlockState.DIRTY)
        else:
            self._cleaned(block)

    def flushed(self, blocks: Iterable[Block]) -> None:
        """What was written back of these before the flush below began is durable: no journal needs it."""
        for block in blocks:
            if self._blocks.get(block.number) is block and block.kept != block.dirty:
                block.kept = block.dirty
                self.changed[block.slot] = block

    # -- what passes through ------------------------------------------------------------------------------------------

    def begin_through(self, where: Range) -> Through:
        """From now on nobody else begins anything in `where`; it may pass when what is under way there has ended."""
        through = Through(where, self.geometry)
        self._throughs.append(through)
        return through

    def may_pass(self, through: Through) -> bool:
        """Whether nothing else is under way there."""
        for other in self._throughs:
            if other is through:
                break
            if other.units.overlaps(through.units):
                return False
        blocks, units = through.blocks, through.units
        is_busy = any(blocks.start <= number < blocks.end for number in self._busy)
        return not is_busy and not self.units.are_flying(units.start, units.end)

    def begin_copy(self, through: Through) -> list[Part]:
        """What the cache holds of its range, which is to be as it is below, too; then `end_copy`.

        Of a grain that is changed in part, and not held, nothing is copied.
        """
        found = []
        for number, start, end in self.geometry.parts(through.where):
            block = self._blocks.get(number)
            if block is None:
                continue
            mask = self.geometry.outer(start, end) & (self.geometry.inner(number, start, end) | block.valid)
            for first, last in runs(mask):
                grain = self.geometry.grain
                part = Part(block, max(start, first * grain), min(end, last * grain), (1 << last) - (1 << first))
                self._pin(block)
                found.append(part)
        return found

    def end_copy(self, parts: list[Part]) -> None:
        """They are copied."""
        for part in parts:
            part.block.valid |= part.mask
            self._is_below(part.block, part.mask & self.geometry.inner(part.block.number, part.start, part.end))
            self._unpin(part.block)

    def give_up_copy(self, parts: list[Part]) -> None:
        """They may be copied in part."""
        for part in parts:
            part.block.valid &= ~part.mask | part.block.dirty
            self._unpin(part.block)

    def end_through(self, through: Through) -> None:
        """It has ended, well or not."""
        self._throughs.remove(through)

    def drop(self, through: Through, *, dirty: bool) -> None:
        """What the cache holds there is not what is below now: it holds it no longer, or only what is dirty."""
        blocks = through.blocks
        numbers: Iterable[int] = range(blocks.start, blocks.end)
        if len(self._blocks) < blocks.length:
            numbers = [number for number in self._blocks if blocks.start <= number < blocks.end]
        for number in numbers:
            block = self._blocks.get(number)
            if block is None:
                continue
            first, length = number * self.geometry.block, self.geometry.length(number)
            start, end = max(through.where.start - first, 0), min(through.where.end - first, length)
            mask = self.geometry.inner(number, start, end)
            self._drop(block, mask if dirty else mask & ~block.dirty)

    def _drop(self, block: Block, mask: int) -> None:
        if block.flying & mask or block.fetching or block.writers:
            raise BugError(f"{block!r} loses grains {mask:x} while it is in use")
        block.valid &= ~mask
        was_clean = not block.dirty
        self._is_below(block, mask)
        if was_clean and not block.pins:
            self._settle(block)

    def _is_below(self, block: Block, mask: int) -> None:
        """Whatever these grains are, it was not the cache that has to write them."""
        if block.kept & mask:
            block.kept &= ~mask
            self.changed[block.slot] = block
        if block.dirty & mask:
            block.dirty &= ~mask
            if not block.dirty:
                self._cleaned(block)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def dirty_bytes(self) -> int:
        """What is not known to be below; grains are counted whole."""
        grains = sum(self._blocks[number].dirty.bit_count() for unit in self.units.all() for number in unit.dirty)
        return grains * self.geometry.grain

    def dirty_ranges(self, where: Range) -> list[Range]:
        """What of `where` is not known to be below, in order, and apart."""
        touched = self.geometry.units(where)
        found: list[Range] = []
        for number in (each for unit in self.units.within(*touched) for each in sorted(self.units[unit].dirty)):
            first = number * self.geometry.block
            for start, end in runs(self._blocks[number].dirty):
                bytes_end = min(first + end * self.geometry.grain, self.geometry.size)
                piece = Range(first + start * self.geometry.grain, bytes_end).intersection(where)
                if piece is None:
                    continue
                if found and found[-1].end == piece.start:
                    found[-1] = Range(found[-1].start, piece.end)
                else:
                    found.append(piece)
        return found

    # -- moves --------------------------------------------------------------------------------------------------------

    def _go(self, block: Block, to: BlockState) -> None:
        block.state = advance(BLOCK_STATES, f"block {block.number}", block.state, to)

    def _make(self, number: int) -> Block | None:
        """A block with nothing in it, in a free slot or in that of the block that was longest not used."""
        if self._free:
            slot = self._free.pop()
        elif self._idle:
            _, old = self._idle.popitem(last=False)
            self._forget(old)
            slot = self._free.pop()
        else:
            return None
        block = self._blocks[number] = Block(number, slot)
        return block

    def _forget(self, block: Block) -> None:
        del self._blocks[block.number]
        self._free.append(block.slot)
        if block.kept:
            self.changed[block.slot] = None

    def _pin(self, block: Block) -> None:
        if not block.pins:
            self._idle.pop(block.number, None)
        block.pins += 1

    def _unpin(self, block: Block) -> None:
        block.pins -= 1
        if not block.pins and block.state is _CLEAN:
            self._settle(block)

    def _settle(self, block: Block) -> None:
        """It is clean, and nobody uses it."""
        if block.valid:
            self._idle[block.number] = block
        else:
            self._idle.pop(block.number, None)
            self._forget(block)

    def _soil(self, block: Block, mask: int, now: float) -> None:
        block.dirty |= mask
        block.kept |= mask
        block.again |= mask & block.flying
        self.changed[block.slot] = block
        if block.state is _CLEAN:
            self._go(block, BlockState.DIRTY)
        elif block.state is BlockState.WRITING:
            self._go(block, BlockState.REWRITTEN)
        self.units.soiled(self._unit_of(block), block.number, now)

    def _cleaned(self, block: Block) -> None:
        """Nothing of it is dirty any more."""
        self._go(block, _CLEAN)
        self.claimed -= not block.writers
        self.units.cleaned(self._unit_of(block), block.number)
        if not block.pins:
            self._settle(block)

    def _unit_of(self, block: Block) -> int:
        return block.number * self.geometry.block // self.geometry.unit

    def _rest_of(self, block: Block) -> None:
        if not block.fetching and not block.writers:
            self._busy.discard(block.number)

    def _is_claimed(self, block: Block) -> bool:
        return block.state is not _CLEAN or block.writers > 0

    def _is_barred(self, number: int) -> bool:
        return any(through.blocks.start <= number < through.blocks.end for through in self._throughs)

    def _is_unit_barred(self, number: int) -> bool:
        return any(through.units.start <= number < through.units.end for through in self._throughs)

    def validate(self) -> None:
        """Raises BugError where something does not hold together."""
        self.units.validate()
        taken = sorted([*self._free, *(block.slot for block in self._blocks.values())])
        if taken != list(range(self.slots)):
            raise BugError(f"slots {taken} of {self.slots}")
        for number, block in self._blocks.items():
            outside = (block.valid | block.putting) & ~self.geometry.full(number)
            unmet = block.dirty & ~block.valid | block.flying & ~block.dirty | block.again & ~block.flying
            if outside or unmet or block.dirty & ~block.kept:
                raise BugError(f"{block!r}: masks that do not fit")
            if block.state is not _state_of(block):
                raise BugError(f"{block!r}: it looks like {_state_of(block).name}")
            if (number in self._idle) != (block.state is _CLEAN and not block.pins):
                raise BugError(f"{block!r}: in use, or not, contrary to what it says")
            if (number in self._busy) != (block.fetching or block.writers > 0):
                raise BugError(f"{block!r}: busy, or not, contrary to what it says")
            if bool(block.dirty) != (number in self.units.blocks(self._unit_of(block))):
                raise BugError(f"{block!r}: its unit says otherwise")
        if self.claimed != sum(map(self._is_claimed, self._blocks.values())):
            raise BugError(f"{self.claimed} blocks are claimed, which is not so")


def _state_of(block: Block) -> BlockState:
    if block.flying:
        is_new = block.again or block.dirty & ~block.flying
        return BlockState.REWRITTEN if is_new else BlockState.WRITING
    return BlockState.DIRTY if block.dirty else BlockState.CLEAN
