"""How fast a worker gets on, and so how much it is given at a time. Pure; time is an argument.

A lease is finished as a whole: what is left of it when a connection is lost, or a worker dies, is done again from its
beginning. So it is to be no more than what takes RANGE_SECONDS, however slow a server or small a rate is.
"""

from __future__ import annotations

import msgspec

from nbdshard.common.limits import RANGE_SECONDS, TEMPO_SECONDS


class Tempo(msgspec.Struct, eq=False):
    """Of one worker. `speed` in bytes per second, None until it is known: how far its leases got in the latest second
    or more in which it had some. Holes that are left out count, too."""

    speed: float | None = None
    _at: float = 0.0  # the time until then is counted
    _seconds: float = 0.0
    _bytes: int = 0

    def begin(self, now: float) -> None:
        """Until now it had nothing to do, or was not to do it."""
        self._at = now

    def count(self, completed: int, now: float) -> None:
        """So many bytes more of its leases are complete."""
        self._seconds += now - self._at
        self._bytes += max(0, completed)
        self._at = now
        if self._seconds >= TEMPO_SECONDS:
            self.speed = self._bytes / self._seconds
            self._seconds = 0.0
            self._bytes = 0

    def lease_bytes(self, share: float | None) -> float | None:
        """What it is given at a time, at most. `share`: its share of the job's rate, in bytes per second."""
        speeds = [speed for speed in (self.speed, share) if speed is not None]
        return RANGE_SECONDS * min(speeds) if speeds else None
