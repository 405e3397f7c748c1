"""The cache's machine against a model: whatever happens side by side, no byte is lost or out of nowhere."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdshard.common.ranges import Range
from nbdshard.server.layers.cache_blocks import Block, Fetch, Flush, Geometry, Reading, Through, WriteBack, Writing
from nbdshard.server.layers.cache_core import CacheCore, Obstacle

SIZE = 16 * 4 + 6
GEOMETRY = Geometry(SIZE, block=16, grain=4, unit=32, fetch=32)
SLOTS = 3
STARTS = (0, 0, 4, 6, 16, 18, 32, 48, 64, 69)
LENGTHS = (1, 3, 4, 8, 16, 20, 40)
STEPS = 300


def around(start: int, length: int) -> Range:
    return Range(start, min(SIZE, start + length))


@dataclass
class Seen:
    """A range and, for each of its bytes, what may be there from the view of a reader or a flush."""

    where: Range
    allowed: list[set[int]]


@dataclass
class Read(Seen):
    reading: Reading
    fetches: list[Fetch] = field(default_factory=list)


@dataclass
class Write:
    where: Range
    value: int
    writing: Writing


@dataclass
class Landing:
    fetch: Fetch
    data: bytes
    parts: list[tuple[Block, int]]


@dataclass
class Flight:
    taken: WriteBack
    data: list[bytes]


@dataclass
class Flushing(Seen):
    flush: Flush


@dataclass
class Pass:
    through: Through
    value: int  # what is written through; 0 is a zero, after which nothing is held
    passes: bool = False


class Machine:
    """Reads, writes, write-backs, flushes and what passes through, each in its steps."""

    def __init__(self) -> None:
        self.core = CacheCore(GEOMETRY, SLOTS)
        self.below = bytearray(SIZE)
        self.slots = [bytearray(b"\xff" * 16) for _ in range(SLOTS)]
        self.allowed: list[set[int]] = [{0} for _ in range(SIZE)]
        self.value = 0
        self.now = 0.0
        self.reads: list[Read] = []
        self.fetches: list[Fetch] = []
        self.landings: list[Landing] = []
        self.writes: list[Write] = []
        self.flights: list[Flight] = []
        self.flushes: list[Flushing] = []
        self.passes: list[Pass] = []

    # -- what may be where

    def watchers(self) -> list[Seen]:
        return [*self.reads, *self.flushes]

    def begins(self, where: Range, value: int) -> None:
        """From now on `value` may be there."""
        for at in range(where.start, where.end):
            self.allowed[at].add(value)
        for seen in self.watchers():
            if (both := seen.where.intersection(where)) is not None:
                for at in range(both.start, both.end):
                    seen.allowed[at - seen.where.start].add(value)

    def ends(self, where: Range, value: int) -> None:
        """It is there, and nothing else, where nobody else is at it."""
        for at in range(where.start, where.end):
            others = {write.value for write in self.writes if write.where.start <= at < write.where.end}
            others |= {each.value for each in self.passes if each.through.where.start <= at < each.through.where.end}
            self.allowed[at] = {value} | others

    def snapshot(self, where: Range) -> list[set[int]]:
        return [set(self.allowed[at]) for at in range(where.start, where.end)]

    def next_value(self) -> int:
        self.value = self.value % 250 + 1
        return self.value

    # -- reading

    def read_begins(self, start: int, length: int) -> None:
        where = around(start, length)
        self.reads.append(Read(where, self.snapshot(where), self.core.begin_read(where)))
        self.read_goes_on(len(self.reads) - 1)

    def read_goes_on(self, pick: int) -> None:
        read = self.reads[pick % len(self.reads)]
        fetches, waits = self.core.wanted(read.reading)
        self.fetches += fetches
        read.fetches += fetches
        if fetches or waits or any(fetch in self.fetches for fetch in read.fetches):
            return
        if any(landing.fetch in read.fetches for landing in self.landings):
            return
        found = bytearray()
        for number, start, end, block in read.reading.parts:
            if block is None:
                found += self.below[number * 16 + start : number * 16 + end]
            else:
                found += self.slots[block.slot][start:end]
        for at, byte in enumerate(found):
            assert byte in read.allowed[at], f"{byte} at {read.where.start + at}, {read.allowed[at]} may be there"
        self.core.end_read(read.reading)
        self.reads.remove(read)

    def fetch_arrives(self, pick: int, fails: bool) -> None:
        fetch = self.fetches.pop(pick % len(self.fetches))
        if fails:
            self.core.fetch_failed(fetch)
        else:
            data = bytes(self.below[fetch.where.start : fetch.where.end])
            self.landings.append(Landing(fetch, data, self.core.begin_landing(fetch)))

    def fetch_lands(self, pick: int) -> None:
        landing = self.landings.pop(pick % len(self.landings))
        for block, mask in landing.parts:
            for grain in range(4):
                if mask >> grain & 1:
                    start, end = grain * 4, min(grain * 4 + 4, GEOMETRY.length(block.number))
                    at = block.number * 16 - landing.fetch.where.start
                    self.slots[block.slot][start:end] = landing.data[at + start : at + end]
        self.core.landed(landing.fetch, landing.parts)

    # -- writing

    def write_begins(self, start: int, length: int, at_once: bool) -> None:
        where, value = around(start, length), self.next_value()
        writing, obstacle = self.core.begin_write(where)
        assert writing.parts or obstacle is not None
        assert (writing.end == where.end) == (obstacle is None)
        if writing.parts:
            granted = Range(where.start, writing.end)
            self.begins(granted, value)
            self.writes.append(Write(granted, value, writing))
        if obstacle is Obstacle.GRAIN:
            self.read_begins(writing.end, where.end - writing.end)
        elif at_once and writing.parts:
            self.write_ends(len(self.writes) - 1, False, False)

    def write_ends(self, pick: int, fails: bool, half: bool) -> None:
        write = self.writes.pop(pick % len(self.writes))
        for part in write.writing.parts:
            end = part.start + (part.end - part.start) // 2 if fails and half else part.end
            self.slots[part.block.slot][part.start : end] = bytes([write.value]) * (end - part.start)
        if fails:
            self.core.failed_write(write.writing)
        else:
            self.core.end_write(write.writing, self.now)
            self.ends(write.where, write.value)

    # -- writing back

    def write_back_begins(self, seconds: float) -> None:
        self.now += seconds
        taken = self.core.next_write_back(self.now)
        if taken is not None:
            data = [b"".join(self.slots[slot][a:b] for slot, a, b in run.pieces) for run in taken.runs]
            assert [run.where.length for run in taken.runs] == [len(each) for each in data]
            self.flights.append(Flight(taken, data))

    def write_back_ends(self, pick: int, fails: bool, runs: int) -> None:
        flight = self.flights.pop(pick % len(self.flights))
        for run, data in zip(flight.taken.runs[: runs if fails else None], flight.data, strict=False):
            self.below[run.where.start : run.where.end] = data
        if fails:
            self.core.write_back_failed(flight.taken, OSError(errno.EIO, "no"), self.now)
        else:
            self.core.written_back(flight.taken)

    def flush_begins(self) -> None:
        where = Range(0, SIZE)
        self.flushes.append(Flushing(where, self.snapshot(where), self.core.units.begin_flush()))

    def flush_ends(self, pick: int) -> None:
        flushing = self.flushes[pick % len(self.flushes)]
        if flushing.flush.units:
            return
        self.flushes.remove(flushing)
        self.core.units.end_flush(flushing.flush)
        if flushing.flush.error is None:
            for at, byte in enumerate(self.below):
                assert byte in flushing.allowed[at], f"{byte} below at {at}, flushed was {flushing.allowed[at]}"

    # -- through

    def through_begins(self, start: int, length: int, zeroes: bool) -> None:
        where = around(start, length)
        if zeroes:  # whole grains only, as the shell has it
            first, last = -(-where.start // 4) * 4, where.end if where.end == SIZE else where.end // 4 * 4
            if first >= last:
                return
            where = Range(first, last)
        value = 0 if zeroes else self.next_value()
        self.passes.append(Pass(self.core.begin_through(where), value))
        self.begins(where, value)

    def through_goes_on(self, pick: int, fails: bool) -> None:
        each = self.passes[pick % len(self.passes)]
        if not each.passes:
            each.passes = self.core.may_pass(each.through)
            return
        self.passes.remove(each)
        where = each.through.where
        end = where.start + where.length // 2 if fails else where.end
        self.below[where.start : end] = bytes([each.value]) * (end - where.start)
        if fails or not each.value:
            self.core.drop(each.through, dirty=not fails)
        else:
            parts = self.core.begin_copy(each.through)
            for part in parts:
                self.slots[part.block.slot][part.start : part.end] = bytes([each.value]) * (part.end - part.start)
            self.core.end_copy(parts)
        self.core.end_through(each.through)
        if not fails:
            self.ends(where, each.value)

    # -- always

    def holds_together(self) -> None:
        self.core.validate()
        assert self.core.claimed <= self.core.dirty_max

    def settle(self) -> None:
        """Everything ends, and is below."""
        while self.landings or self.fetches or self.writes or self.flights or self.passes:
            while self.fetches:
                self.fetch_arrives(0, False)
            while self.landings:
                self.fetch_lands(0)
            while self.writes:
                self.write_ends(0, False, False)
            while self.flights:
                self.write_back_ends(0, False, 0)
            for index in range(len(self.passes)):
                self.through_goes_on(min(index, len(self.passes) - 1), False)
        flush = self.core.units.begin_flush()
        while flush.units:
            self.write_back_begins(0.0)
            assert self.flights, "a flush waits, and nothing is written back"
            self.write_back_ends(0, False, 0)
        self.core.units.end_flush(flush)
        for at, byte in enumerate(self.below):
            assert byte in self.allowed[at], f"{byte} below at {at}, {self.allowed[at]} was written"
        for _ in range(3 * len(self.reads)):
            if self.reads:
                self.read_goes_on(0)
            while self.fetches:
                self.fetch_arrives(0, False)
            while self.landings:
                self.fetch_lands(0)
        assert not self.reads, "a read waits for nothing"
        self.core.validate()

    def step(self, chance: random.Random) -> None:
        """Something happens."""
        start, length = chance.choice(STARTS), chance.choice(LENGTHS)
        pick, fails, also = chance.randrange(1 << 16), chance.random() < 0.3, chance.random() < 0.5
        match chance.choice(KINDS):
            case "read" if len(self.reads) < 2:
                self.read_begins(start, length)
            case "go on" if self.reads:
                self.read_goes_on(pick)
            case "arrive" if self.fetches:
                self.fetch_arrives(pick, fails)
            case "land" if self.landings:
                self.fetch_lands(pick)
            case "write":
                self.write_begins(start, length, also)
            case "written" if self.writes:
                self.write_ends(pick, fails, also)
            case "write back":
                self.write_back_begins(chance.choice((0.0, 10.0, 10.0)))
            case "below" if self.flights:
                self.write_back_ends(pick, fails, chance.randrange(3))
            case "flush" if len(self.flushes) < 3:
                self.flush_begins()
            case "flushed" if self.flushes:
                self.flush_ends(pick)
            case "through" if len(self.passes) < 2:
                self.through_begins(start, length, also)
            case "pass" if self.passes:
                self.through_goes_on(pick, fails)
        self.holds_together()


KINDS = (
    *("read", "go on", "go on", "arrive", "arrive", "land", "land"),
    *("write", "write", "write", "written", "written", "write back", "write back", "below"),
    *("flush", "flushed", "flushed", "through", "pass", "pass"),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, (1 << 32) - 1))
def test_whatever_happens_no_byte_is_lost_or_out_of_nowhere(seed: int) -> None:
    machine, chance = Machine(), random.Random(seed)
    for _ in range(STEPS):
        machine.step(chance)
    machine.settle()
