"""Virtual time: a heap of things to come. Time stands still between them and jumps from one to the next."""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class SimClock:
    """Seconds since the start of the simulation, and what happens when. Equal times keep their order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0  # that have happened
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heappush(self._heap, (max(when, self.now), next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heappush(self._heap, (self.now + seconds, next(self._order), action))

    def run_until(self, is_over: Callable[[], bool], seconds_max: float, events_max: int) -> bool:
        """Let things happen until `is_over`; False when time or events ran out, or nothing was left to happen."""
        heap = self._heap
        while not is_over():
            if not heap or heap[0][0] > seconds_max or self.events >= events_max:
                return False
            self.now, _, action = heappop(heap)
            self.events += 1
            action()
        return True


class Pace:
    """How long things take, at random: mostly about `usual` seconds, now and then up to `worst`."""

    def __init__(self, chance: random.Random, usual: float, worst: float, worst_share: float) -> None:
        self._chance = chance
        self._usual = usual
        self._worst = worst
        self._worst_share = worst_share

    def seconds(self) -> float:
        chance = self._chance.random()
        if chance < self._worst_share:
            return self._worst * self._chance.random()
        return 2 * self._usual * chance
