"""`cache`: what was read is kept, what is written is acknowledged at once and written back behind it.

The machine is `cache_core.py`; here are its lock, the threads that write back, and the calls below. Every export has
one cache, which all its clients share, and which goes on whoever is connected.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from nbdshard.common import logs
from nbdshard.common.limits import CACHE_FAILING_SECONDS
from nbdshard.common.nbd.constants import STATE_ZERO, TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.common.units import format_bytes
from nbdshard.server.backends.base import Backend, Deferred
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing
from nbdshard.server.layers.cache_blocks import (
    Block,
    Fetch,
    Part,
    Reading,
    WriteBack,
    Writing,
    laid_over,
    runs,
)
from nbdshard.server.layers.cache_core import CacheCore, Obstacle
from nbdshard.server.layers.cache_slots import Slots
from nbdshard.server.layers.cache_transfers import flat, write_runs

_ZEROES: Final = memoryview(bytes(1 << 20))
_OURS: Final = TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_CACHE  # whatever is below


class Cache(Passing):
    """Stands in front of `below` with `core` and its `slots`. `write_back`: or else writes go through.

    `fetchers`, `writers`: reads and writes below at the same time, at most. `through`: zeroes of aligned stretches of
    so many bytes go through; smaller ones are written like data, and reach what is below with their neighbours.
    """

    def __init__(
        self,
        below: Backend,
        core: CacheCore,
        slots: Slots,
        *,
        write_back: bool,
        fetchers: int,
        writers: int,
        through: int,
        clock: Callable[[], float] = time.monotonic,
        failing_seconds: float = CACHE_FAILING_SECONDS,
    ) -> None:
        super().__init__(below)
        self._core = core
        self._slots = slots
        self._writes_back = write_back
        self._through_bytes = through
        self._clock = clock
        self._failing_seconds = failing_seconds
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # something has ended, in which somebody may have waited
        self._room = threading.Condition(self._lock)  # there may be room for a writer
        self._work = threading.Condition(self._lock)  # there may be something to write back
        self._wake_at: float | None = None  # when a writer looks again by itself
        self._written: list[Block] = []  # written back since the last flush below, if a journal wants to know
        self._is_closing = False
        self._fetching = threading.BoundedSemaphore(fetchers)
        self._pool = ThreadPoolExecutor(fetchers)
        self._threads: list[threading.Thread] = []
        if not self.flags & TransmissionFlag.READ_ONLY:
            self._threads = [threading.Thread(target=self._write_back, daemon=True) for _ in range(writers)]
        for thread in self._threads:
            thread.start()

    @property
    def flags(self) -> TransmissionFlag:
        return self.below.flags | _OURS

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        reading = self._hold(where)
        found: list[memoryview | bytes | Hole] = []
        base = self._core.geometry.block
        try:
            around: Range | None = None
            for number, start, end, block in reading.parts:
                if block is None:
                    first = number * base + start if around is None else around.start
                    around = Range(first, number * base + end)
                    continue
                if around is not None:
                    found += self._read_around(around)
                    around = None
                found.append(self._slots.get(block.slot, start, end))
            if around is not None:
                found += self._read_around(around)
            return found
        finally:
            self._release(reading)

    def read_now(self, where: Range) -> Sequence[memoryview | bytes | Hole] | None:
        """What is in memory is read without waiting; not what is on disk."""
        if self._slots.lasting:
            return None
        with self._lock:
            reading = self._core.begin_hit(where)
        if reading is None:
            return None
        try:
            return [self._slots.get(block.slot, start, end) for _, start, end, block in reading.parts if block]
        finally:
            self._release(reading)

    def _release(self, reading: Reading) -> None:
        with self._lock:
            self._core.end_read(reading)
            self._note()
            self._tell()

    def _read_around(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        """What has no room in the cache, because everything in it is dirty or in use."""
        with self._fetching:
            return self.below.read(where)

    def _hold(self, where: Range) -> Reading:
        """The blocks of `where`, kept in their slots until `end_read`, with what was missed in them fetched."""
        with self._lock:
            reading = self._core.begin_read(where)
            self._note()
            fetches, waits = self._core.wanted(reading)
        try:
            while fetches or waits:
                if fetches:
                    self._fetch_all(fetches)
                with self._lock:
                    fetches, waits = self._core.wanted(reading)
                    while waits and not fetches:
                        self._changed.wait()
                        fetches, waits = self._core.wanted(reading)
            return reading
        except BaseException:
            self._release(reading)
            raise

    def _fetch_all(self, fetches: list[Fetch]) -> None:
        """Side by side, as far as there are threads; all have ended when it returns, or raises the error of one."""
        others = [(fetch, self._begun(fetch)) for fetch in fetches[1:]]
        errors = [self._fetch(fetches[0])]
        errors += [self._fetch(fetch) if task.cancel() else task.result() for fetch, task in others]
        for error in errors:
            if error is not None:
                raise error

    def _begun(self, fetch: Fetch) -> Future[Exception | None]:
        """By a thread of the pool; where it has none, it is not begun, and can be cancelled."""
        task = Future[Exception | None]()

        def carry_out() -> None:
            if task.set_running_or_notify_cancel():
                task.set_result(self._fetch(fetch))

        with contextlib.suppress(RuntimeError):  # the system gives no more threads
            self._pool.submit(carry_out)
        return task

    def _fetch(self, fetch: Fetch) -> Exception | None:
        """Read it below, and put it where it is missed. Whoever waits for it is told either way."""
        try:
            with self._fetching:
                found = flat(self.below.read(fetch.where))
                if (found.length if isinstance(found, Hole) else len(found)) != fetch.where.length:
                    raise OSError(errno.EIO, "the layer below has read another length")
                with self._lock:
                    parts = self._core.begin_landing(fetch)
                self._land(fetch, found, parts)
            with self._lock:
                self._core.landed(fetch, parts)
                self._note()
                self._tell()
            return None
        except Exception as error:
            with self._lock:
                self._core.fetch_failed(fetch)
                self._note()
                self._tell()
            return error

    def _land(self, fetch: Fetch, found: memoryview | Hole, parts: list[tuple[Block, int]]) -> None:
        geometry = self._core.geometry
        for block, mask in parts:
            at = block.number * geometry.block - fetch.where.start
            for first, last in runs(mask):
                start, end = first * geometry.grain, min(last * geometry.grain, geometry.length(block.number))
                if isinstance(found, Hole):
                    self._slots.zero(block.slot, start, end)
                else:
                    self._slots.put(block.slot, start, found[at + start : at + end])

    def cache(self, where: Range) -> None:
        """Fill the cache with it, as far as there is room: half of the cache at most."""
        geometry = self._core.geometry
        end = min(where.end, where.start + max(self._core.slots // 2, 1) * geometry.block)
        for piece in Range(where.start, end).split(4 * geometry.fetch):
            reading = self._hold(piece)
            self._release(reading)
            if any(block is None for *_, block in reading.parts):
                return
        if end < where.end:
            self.below.cache(Range(end, where.end))

    def extents(self, where: Range) -> Extents:
        with self._lock:  # before what is below is asked: what is written back meanwhile is data there
            dirty = self._core.dirty_ranges(where)
        return laid_over(self.below.extents(where), dirty)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, where: Range, data: memoryview) -> None:
        if not self._writes_back:
            self._pass(where, lambda: self.below.write(where, data), data)
            return
        at, since, block = where.start, self._clock(), self._core.geometry.block
        held: Reading | None = None  # of the block at `at`, in which a grain is written in part
        while at < where.end:
            with self._lock:
                writing, obstacle = self._core.begin_write(Range(at, where.end))
                self._note()
                if held is not None:
                    self._core.end_read(held)
                    held = None
                if not writing.parts and obstacle is not Obstacle.GRAIN:
                    self._wait(obstacle, since)
                    continue
            if writing.parts:
                self._copy(writing, data[at - where.start : writing.end - where.start])
                at, since = writing.end, self._clock()
                continue
            held = self._hold(Range(at, min(where.end, (at // block + 1) * block)))
            if held.parts[0][3] is None:  # everything is dirty, so there is no place to read it to
                with self._lock:
                    self._core.end_read(held)
                    held = None
                    self._wait(Obstacle.ROOM, since)

    def write_now(self, where: Range, data: memoryview) -> bool:
        """Where there is room in memory for all of it, nothing is waited for."""
        if not self._writes_back or self._slots.lasting:
            return False
        with self._lock:
            if self._core.waiting:
                return False  # others wait for room, and were first
            writing, obstacle = self._core.begin_write(where)
            if obstacle is not None:
                self._core.failed_write(writing)
                return False
        self._copy(writing, data)
        return True

    def _wait(self, obstacle: Obstacle | None, since: float) -> None:
        """Until something has changed. Raises OSError where it is room that is waited for, in vain since `since`."""
        if obstacle is not Obstacle.ROOM:
            self._changed.wait()
            return
        units, waited = self._core.units, self._clock() - since
        if (error := units.error) is not None and units.failed_at >= since and waited >= self._failing_seconds:
            raise OSError(error.errno, f"the cache is full, and cannot be written back: {error.strerror}")
        self._core.waiting += 1
        self._wake()
        self._room.wait(self._failing_seconds)
        self._core.waiting -= 1

    def _copy(self, writing: Writing, data: memoryview) -> None:
        at = 0
        try:
            for part in writing.parts:
                piece = data[at : at + part.end - part.start]
                self._slots.put(part.block.slot, part.start, piece)
                self._slots.sign(part.block.slot, part.start, part.end, piece)
                at += len(piece)
        except BaseException:
            with self._lock:
                self._core.failed_write(writing)
                self._tell()
            raise
        with self._lock:
            self._core.end_write(writing, self._clock())
            self._note()
            self._wake()
            self._changed.notify_all()  # there is no more room than before

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        unit = self._through_bytes
        start = min(-(-where.start // unit) * unit, where.end)
        end = where.end if where.end == self.size else max(where.end // unit * unit, start)
        if start < end:
            middle = Range(start, end)
            self._pass(middle, lambda: self.below.zero(middle, may_punch=may_punch, fast=fast))
        for first, last in ((where.start, start), (max(start, end), where.end)):
            while first < last:
                piece = Range(first, min(last, first + len(_ZEROES)))
                self.write(piece, _ZEROES[: piece.length])
                first = piece.end

    def trim(self, where: Range) -> None:
        """Whole grains of it: of others the cache may hold the rest."""
        grain = self._core.geometry.grain
        start, end = -(-where.start // grain) * grain, where.end // grain * grain
        end = where.end if where.end == self.size else end
        if start < end:
            where = Range(start, end)
            self._pass(where, lambda: self.below.trim(where), stays=lambda: not self._is_empty(where))

    def _is_empty(self, where: Range) -> bool:
        """Whether all of it is known to read as zeroes below."""
        found = self.below.extents(where)
        return found[-1][0].end >= where.end and all(flags & STATE_ZERO for _, flags in found)

    def _pass(
        self,
        where: Range,
        call: Callable[[], None],
        data: memoryview | None = None,
        stays: Callable[[], bool] | None = None,
    ) -> None:
        """Have `call` change what is below, and nobody anything in `where` meanwhile; then hold `data`, or nothing.

        `stays`: asked where something was dirty there, whether that is still what is to be read.
        """
        with self._lock:
            through = self._core.begin_through(where)
            while not self._core.may_pass(through):
                self._changed.wait()
            may_stay = stays is not None and bool(self._core.dirty_ranges(where))
        done = drops = False
        parts: list[Part] = []
        try:
            call()
            drops = stays is None or not may_stay or not stays()
            if data is not None:
                with self._lock:
                    parts = self._core.begin_copy(through)
                self._copy_held(where, parts, data)
            done = True
        finally:
            with self._lock:
                if done and data is not None:
                    self._core.end_copy(parts)
                else:
                    self._core.give_up_copy(parts)
                    self._core.drop(through, dirty=drops)
                self._core.end_through(through)
                self._note()
                self._tell()
                self._work.notify_all()

    def _copy_held(self, where: Range, parts: list[Part], data: memoryview) -> None:
        for part in parts:
            at = part.block.number * self._core.geometry.block - where.start
            self._slots.put(part.block.slot, part.start, data[at + part.start : at + part.end])

    # -- writing back -------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """All that was written is below, then flushed there. A failure stays with what it has left dirty."""
        if not self._threads:
            self.below.flush()
            return
        with self._lock:
            flush = self._core.units.begin_flush()
            try:
                self._work.notify_all()
                while flush.units:
                    self._changed.wait()
            finally:
                self._core.units.end_flush(flush)
            covered, self._written = self._written, []
        try:
            if flush.error is not None:
                raise self._told(flush.error)
            self.below.flush()
        except BaseException:
            with self._lock:
                self._written += covered
            raise
        if covered:
            with self._lock:
                again = {id(block) for block in self._written}
                self._core.flushed(block for block in covered if id(block) not in again)
                self._note()
        self._slots.settle()

    def _told(self, error: OSError) -> OSError:
        told = f"{format_bytes(self.dirty_bytes)} cannot be written back: {error.strerror or error}"
        if self._slots.lasting:
            return Deferred(error.errno, f"{told}; kept in {self._slots.lasting} for the next start")
        return OSError(error.errno, told)

    @property
    def dirty_bytes(self) -> int:
        """What was written and has not reached what is below."""
        with self._lock:
            return self._core.dirty_bytes

    def _write_back(self) -> None:
        """A thread: until the cache is closed."""
        while True:
            with self._lock:
                while (unit := self._core.next_write_back(self._clock())) is None:
                    if self._is_closing:
                        return
                    self._wake_at = self._core.next_look()
                    now = self._clock()
                    is_later = self._wake_at is not None and self._wake_at > now
                    self._work.wait(self._wake_at - now if is_later and self._wake_at is not None else None)
                self._work.notify()  # there may be another one, for another thread
            error = self._write_unit(unit)
            with self._lock:
                if error is None:
                    self._core.written_back(unit)
                    if self._slots.lasting:
                        self._written += [block for block, _ in unit.flown]
                else:
                    self._core.write_back_failed(unit, error, self._clock())
                    self._room.notify_all()  # who has waited for long is to fail
                self._note()
                self._tell()
                self._work.notify()

    def _write_unit(self, unit: WriteBack) -> OSError | None:
        try:
            write_runs(self.below, self._slots, unit.runs, self._core.geometry.unit)
            return None
        except OSError as error:
            if self._core.units.error is None:
                logs.warning(f"a write-back failed, and will be tried again: {error.strerror or error}")
            return error
        except Exception as error:  # a bug; the thread that it ends would be missed for ever
            logs.error(f"internal error: a write-back: {type(error).__name__}: {error}")
            return OSError(errno.EIO, "an internal error of the server")

    def _wake(self) -> None:
        """Have a thread look, where it would not by itself in time."""
        look = self._core.next_look()
        if look is not None and (self._wake_at is None or look < self._wake_at):
            self._wake_at = look
            self._work.notify()

    def _tell(self) -> None:
        """Whoever waits looks again. Writers do so only where there is room: they may be many."""
        self._changed.notify_all()
        if self._core.has_room:
            self._room.notify_all()

    def _note(self) -> None:
        """Have a journal know what has changed, before anybody builds on it."""
        if self._core.changed:
            self._slots.note(self._core.changed)
            self._core.changed.clear()

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """What can be written back is; what cannot is kept by a cache on disk, and else lost, which is told.

        Raises OSError where it cannot be kept.
        """
        try:
            self.flush()
        except Deferred:
            pass
        except OSError as error:
            logs.error(f"what was written is lost: {error.strerror or error}")
        with self._lock:
            self._is_closing = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()
        try:
            self._slots.keep()
        finally:
            self._slots.close()
            self.below.close()
