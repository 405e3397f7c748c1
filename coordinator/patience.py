"""How long a server is waited for, and how often it is tried: what the user says, else what it hints itself. Pure."""

from __future__ import annotations

from nbdshard.common.limits import BACKOFF_SECONDS_MIN
from nbdshard.common.messages import EndpointDescription, Side
from nbdshard.common.nbd.hints import NO_HINTS, Hints
from nbdshard.coordinator.job import Job


class Patience:
    """Of one job. Times in seconds; `side` is the one whose server is meant, None if nobody knows."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._hints: dict[Side, Hints] = {}

    def learn(self, source: EndpointDescription, destination: EndpointDescription) -> None:
        """What a worker found just now: a server may say something else each time it is started."""
        self._hints = {"source": source.hints, "destination": destination.hints}

    def loss(self, side: Side | None) -> float:
        """How long it is waited for; 0: not at all."""
        hinted = self._of(side).loss
        return hinted if hinted is not None and self._job.loss_hinted else self._job.loss_seconds

    def backoff(self, side: Side | None) -> tuple[float, float]:
        """The first pause before it is tried again, and the longest."""
        hints = self._of(side)
        lowest = BACKOFF_SECONDS_MIN if hints.backoff_min is None else hints.backoff_min
        longest = self._job.reconnect_seconds
        if self._job.reconnect_hinted and hints.backoff_max is not None:
            longest = hints.backoff_max
        return min(lowest, longest), longest

    @property
    def request(self) -> float:
        """How old a request may become, on the more patient side."""
        seconds = self._job.options.request_seconds
        if self._job.options.request_hinted:
            hinted = [hints.request for hints in self._hints.values() if hints.request is not None]
            seconds = max([seconds, *hinted])
        return seconds

    def _of(self, side: Side | None) -> Hints:
        return NO_HINTS if side is None else self._hints.get(side, NO_HINTS)
