"""What is tried again after a pause. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from nbdshard.common.limits import RETRY_DELAY_SECONDS, RETRY_DELAY_SECONDS_MAX


class Retries:
    """Actions that wait for their time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def add(self, now: float, attempts: int, action: Callable[[], None]) -> None:
        """Have `action` done after a pause that doubles with each of the `attempts` that failed."""
        pause = min(RETRY_DELAY_SECONDS * 2.0 ** min(attempts - 1, 16), RETRY_DELAY_SECONDS_MAX)
        heapq.heappush(self._waiting, (now + pause, next(self._order), action))

    def run(self, now: float) -> None:
        """Do what is due."""
        while self._waiting and self._waiting[0][0] <= now:
            heapq.heappop(self._waiting)[2]()

    @property
    def deadline(self) -> float | None:
        """When `run` has something to do next."""
        return self._waiting[0][0] if self._waiting else None
