"""Which units of the image are dirty, and when each is written back: in turn, for a flush, after a failure. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from nbdshard.common.errors import BugError
from nbdshard.common.limits import CACHE_AGE_SECONDS, CACHE_REST_SECONDS_MAX, CACHE_REST_SECONDS_MIN
from nbdshard.server.layers.cache_blocks import Flush, Unit


class CacheUnits:
    """The dirty units of a cache. One is written back once at a time: what overlaps must not overtake."""

    def __init__(self) -> None:
        self.error: OSError | None = None  # of the last write-back, if that failed ...
        self.failed_at = 0.0  # ... and when
        self._units: dict[int, Unit] = {}  # with something dirty in them
        self._queue: OrderedDict[int, Unit] = OrderedDict()  # those that are not on their way, the oldest first
        self._flying: dict[int, Unit] = {}
        self._flushes: list[Flush] = []
        self._sequence = 0
        self._rest_seconds = 0.0
        self._rest_until = 0.0

    def __getitem__(self, number: int) -> Unit:
        return self._units[number]

    def within(self, start: int, end: int) -> list[int]:
        """The numbers from `start` on and before `end` of those that are dirty, in order."""
        return sorted(number for number in self._units if start <= number < end)

    def all(self) -> Iterable[Unit]:
        """Those that are dirty."""
        return self._units.values()

    def blocks(self, number: int) -> AbstractSet[int]:
        """Those of unit `number` that are dirty."""
        unit = self._units.get(number)
        return unit.dirty if unit is not None else frozenset()

    def soiled(self, number: int, block: int, now: float) -> None:
        """There was a write to `block` of unit `number`."""
        self._sequence += 1
        unit = self._units.get(number)
        if unit is None:
            unit = self._units[number] = self._queue[number] = Unit(number)
        unit.dirty.add(block)
        if unit.oldest is None:
            unit.oldest, unit.since = self._sequence, now

    def cleaned(self, number: int, block: int) -> None:
        """Nothing of `block` is dirty any more."""
        unit = self._units[number]
        unit.dirty.remove(block)
        if not unit.dirty and number not in self._flying:
            self._remove(number)

    # -- writing back -------------------------------------------------------------------------------------------------

    def next(self, now: float, *, is_full: bool, is_barred: Callable[[int], bool]) -> Unit | None:
        """The unit that is to be written now, which is on its way then. `is_full`: do not wait for it to age."""
        for flush in self._flushes:
            for number in flush.units:
                if number not in self._flying and not is_barred(number):
                    return self._take(number)
        look = self.next_look(is_full=is_full)
        if look is None or now < look:
            return None
        found = next((number for number in self._queue if not is_barred(number)), None)
        return None if found is None else self._take(found)

    def next_look(self, *, is_full: bool) -> float | None:
        """When `next` has something, at the latest, if nothing else happens."""
        if not self._queue:
            return None
        oldest = next(iter(self._queue.values())).since
        return max(self._rest_until, oldest if is_full else oldest + CACHE_AGE_SECONDS)

    def are_flying(self, start: int, end: int) -> bool:
        """Whether any of these is on its way."""
        return any(start <= number < end for number in self._flying)

    def _take(self, number: int) -> Unit:
        unit = self._flying[number] = self._queue.pop(number)
        unit.flying_oldest, unit.oldest = unit.oldest, None
        return unit

    def written_back(self, unit: Unit) -> None:
        """All that was dirty when it was taken is below."""
        self._ended(unit)
        self.error = None
        self._rest_seconds = self._rest_until = 0.0
        for flush in self._flushes:
            if unit.number in flush.units and (unit.oldest is None or unit.oldest > flush.sequence):
                del flush.units[unit.number]

    def failed(self, unit: Unit, error: OSError, now: float) -> None:
        """It is as dirty as it was, and its turn comes again; flushes that cover it fail."""
        unit.oldest, unit.since = unit.flying_oldest, now
        self._ended(unit)
        self.error, self.failed_at = error, now
        self._rest_seconds = min(max(2 * self._rest_seconds, CACHE_REST_SECONDS_MIN), CACHE_REST_SECONDS_MAX)
        self._rest_until = now + self._rest_seconds
        for flush in self._flushes:
            if unit.number in flush.units:
                del flush.units[unit.number]
                flush.error = error

    def _ended(self, unit: Unit) -> None:
        del self._flying[unit.number]
        unit.flying_oldest = None
        if unit.dirty:
            self._queue[unit.number] = unit
        else:
            del self._units[unit.number]

    def _remove(self, number: int) -> None:
        del self._units[number], self._queue[number]
        for flush in self._flushes:
            flush.units.pop(number, None)

    # -- flushing -----------------------------------------------------------------------------------------------------

    def begin_flush(self) -> Flush:
        """It is done when it has no units any more; then `error` says whether one of them failed."""
        flush = Flush(self._sequence, dict.fromkeys([*self._flying, *self._queue]))
        self._flushes.append(flush)
        return flush

    def end_flush(self, flush: Flush) -> None:
        """Nobody waits for it any more."""
        self._flushes.remove(flush)

    def validate(self) -> None:
        """Raises BugError where something does not hold together."""
        for number, unit in self._units.items():
            if not unit.dirty or (number in self._queue) == (number in self._flying):
                raise BugError(f"unit {number}: dirty blocks {sorted(unit.dirty)}")
            if number in self._queue and unit.oldest is None:
                raise BugError(f"unit {number} is dirty since never")
        if self._queue.keys() | self._flying.keys() != self._units.keys():
            raise BugError("units that are not dirty are queued, or on their way")
        if any(flush.units.keys() - self._units.keys() for flush in self._flushes):
            raise BugError("a flush waits for what is not dirty")
