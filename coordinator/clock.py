"""The coordinator's clock: the monotonic one, less the time in which this process itself was stopped.

After Ctrl-Z and fg every worker would look silent for as long as the stop lasted, and the first turn of the loop would
give all of them up before it heard them. A lease that lasts longer for it is safe: workers count their own time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from nbdshard.common.limits import SUSPENSION_SECONDS_MIN


class SteadyClock:
    """Seconds. Tell it around each wait how long that should have taken at most."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lost_seconds = 0.0

    def __call__(self) -> float:
        return self._monotonic() - self._lost_seconds

    def waited(self, since: float, timeout_seconds: float) -> None:
        """A wait of at most `timeout_seconds` began at `since` and is over now; what it took beyond is not counted."""
        excess = self() - since - timeout_seconds
        if excess >= SUSPENSION_SECONDS_MIN:
            self._lost_seconds += excess
