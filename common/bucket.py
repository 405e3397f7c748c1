"""How much may be read now, when there is a rate: a token bucket. Pure: the time is an argument.

A token is a byte. They come at `rate` and are kept up to `burst`; a read is begun when as many are there as it is long,
and takes them. So over any time at one rate, no more is read than rate * seconds + burst.

A worker begins with an empty bucket, and a new rate leaves in it what is there, up to the new burst: whoever is told
of new rates all the time gains nothing by it.
"""

from __future__ import annotations

from math import inf

from nbdshard.common.limits import RATE_BURST_SECONDS, RATE_WAIT_EXTRA_SECONDS


class Bucket:
    """`rate` in bytes per second; None: there is no limit; 0: nothing is to be read."""

    __slots__ = ("_at", "_burst", "_missing", "_request_bytes", "_tokens", "rate")

    def __init__(self, request_bytes: int, now: float) -> None:
        """`request_bytes`: the longest read."""
        self.rate: int | None = None
        self._request_bytes = request_bytes
        self._tokens = 0.0
        self._burst = 0.0
        self._at = now  # `_tokens` are as of then
        self._missing = inf  # the fewest tokens that somebody waits for

    @property
    def is_closed(self) -> bool:
        """Nothing is to be read until there is another rate."""
        return self.rate == 0

    @property
    def burst(self) -> float:
        """The most that can be read at once, in bytes: a quarter of a second's worth, or one read."""
        return inf if self.rate is None else self._burst

    def set(self, rate: int | None, now: float) -> None:
        """From now on there is this rate."""
        self._fill(now)
        self._tokens = 0.0 if self.rate is None else self._tokens
        self.rate = rate
        self._burst = max(rate * RATE_BURST_SECONDS, float(self._request_bytes)) if rate else 0.0
        self._tokens = min(self._tokens, self._burst)
        self._missing = inf

    def admits(self, count: int, now: float) -> bool:
        """Whether `count` bytes, at most `burst`, may be read now; else `ready_at` tells when to ask again."""
        if self.rate is None:
            return True
        self._fill(now)
        if self.rate and self._tokens >= count:
            return True
        self._missing = min(self._missing, count - self._tokens)
        return False

    def take(self, count: int) -> None:
        """`count` bytes are going to be read. More than there are is made up for later: a read that has failed."""
        if self.rate is not None:
            self._tokens -= count

    def give_back(self, count: int) -> None:
        """So many of the bytes taken will not be read after all."""
        if self.rate is not None:
            self._tokens = min(self._tokens + count, self._burst)

    def ask_again(self) -> None:
        """Forget what was waited for: everybody asks again."""
        self._missing = inf

    def ready_at(self) -> float | None:
        """When the first of those that were not admitted will be; None: there are none, or another rate has to come."""
        if not self.rate or self._missing == inf:
            return None
        return self._at + self._missing / self.rate + RATE_WAIT_EXTRA_SECONDS

    def _fill(self, now: float) -> None:
        if self.rate and now > self._at:
            self._tokens = min(self._tokens + (now - self._at) * self.rate, self._burst)
        self._at = max(self._at, now)


def earliest(one: float | None, other: float | None) -> float | None:
    """The earlier of two times, of which there may be none."""
    return min((each for each in (one, other) if each is not None), default=None)
