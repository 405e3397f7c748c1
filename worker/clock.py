"""The worker's two times: the true one, which leases are judged by, and one without the stops, for everything else.

A process that was stopped (Ctrl-Z, a suspended machine) has heard nothing meanwhile, and found nothing late: by the
steady time a server or coordinator is late only when we were there to hear it. A lease has gone on ageing all the same.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdshard.common.limits import SUSPENSION_SECONDS_MIN


class WorkerClock:
    """Seconds. `look` on both sides of each wait, and tell `waiting` how long that may take."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.true = clock()  # as of the last look
        self.stopped_seconds = 0.0  # that the steady time does not count, all together
        self.last_stop = 0.0  # how long we were stopped before the last look; 0.0: not at all
        self._back_by = self.true

    @property
    def steady(self) -> float:
        """As of the last look."""
        return self.true - self.stopped_seconds

    def waiting(self, timeout_seconds: float) -> None:
        """A wait begins that takes this long at most."""
        self._back_by = self.true + timeout_seconds

    def look(self) -> float:
        """The steady time now."""
        self.true = true = self._clock()
        late = true - self._back_by
        self.last_stop = 0.0
        if late > 0.0:
            self._back_by = true
            if late >= SUSPENSION_SECONDS_MIN:
                self.last_stop = late
                self.stopped_seconds += late
        return true - self.stopped_seconds
