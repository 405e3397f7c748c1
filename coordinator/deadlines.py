"""The clocks of a job: for how long nobody was connected, a server was away, no byte was completed. Pure.

::

    idle      nobody is connected                    IDLE_JOB_SECONDS, then the job fails
    lost      a server was lost, nothing came since  what `--loss-timeout` says, then the job pauses
    stalled   somebody is connected, nothing comes   STALL_SECONDS and what all tries take, then the job fails

The scheduler says what has happened, and asks when the time is over. Times are monotonic seconds.
"""

from __future__ import annotations

from math import inf

from nbdshard.common.limits import IDLE_JOB_SECONDS, RETRY_DELAY_SECONDS_MAX, STALL_SECONDS
from nbdshard.common.messages import EndpointDescription, Side
from nbdshard.coordinator.crew import Crew
from nbdshard.coordinator.job import Job
from nbdshard.coordinator.patience import Patience


class Deadlines:
    """Those of one job."""

    def __init__(self, job: Job, crew: Crew, now: float) -> None:
        self._job = job
        self._crew = crew
        self._patience = Patience(job)
        self._idle_since: float | None = now  # no worker is connected since then
        self._lost_side: Side | None = None  # whose server was lost last
        self._lost_since: float | None = None  # a server was lost then, and nothing was completed since
        self._moved_at = now  # when the last byte was completed

    # -- what has happened ---------------------------------------------------------------------------------------------

    def learn(self, source: EndpointDescription, destination: EndpointDescription) -> None:
        """What a worker found just now: servers may say for how long they are to be waited for."""
        self._patience.learn(source, destination)

    def lost(self, side: Side | None) -> None:
        """A worker has lost the server of `side`."""
        self._lost_side = side

    def completed(self, now: float) -> None:
        """A byte was completed, or made durable."""
        self._moved_at = now
        self._lost_since = None  # not sooner: a server may take connections, and lose them, for ever

    def begin(self, now: float) -> None:
        """From now on bytes are to be completed, or at another pace."""
        self._moved_at = now

    def look(self, now: float, *, is_paused: bool) -> None:
        """After every event: who is connected now? `is_paused`: nobody is to complete anything."""
        if self._crew.ready_count == 0:
            self._idle_since = now if self._idle_since is None else self._idle_since
            if self._crew.waiting_count and self._lost_since is None:
                self._lost_since = now
            return
        if self._idle_since is not None:
            self._idle_since = None
            self._moved_at = now
        if is_paused:
            self._lost_since = None  # a connection is all that a server can show then

    # -- when the time is over -----------------------------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Nobody is connected, and those who were, or others in their place, try again."""
        return self._idle_since is not None and self._lost_since is not None

    def waited(self, now: float) -> float:
        """For how long a server is lost."""
        return now - self._lost_since if self._lost_since is not None else 0.0

    def stood(self, now: float) -> float:
        """For how long no byte was completed."""
        return now - self._moved_at

    @property
    def loss_seconds(self) -> float:
        """For how long the server that was lost last is waited for."""
        return self._patience.loss(self._lost_side)

    def is_waited_for(self, side: Side | None) -> bool:
        """Whether a server of `side` that is lost is waited for at all."""
        return self._patience.loss(side) > 0

    def backoff(self, side: Side | None) -> tuple[float, float]:
        """The first pause before the server of `side` is tried again, and the longest."""
        return self._patience.backoff(side)

    def idle_by(self) -> float:
        """When it has lasted too long that nobody is connected."""
        if self._idle_since is None:
            return inf
        if self._lost_since is not None:
            return self._lost_since + self.loss_seconds
        return self._idle_since + IDLE_JOB_SECONDS

    def stalled_by(self, share_seconds: float) -> float:
        """When it has lasted too long that no byte was completed: a net below all other time-outs.

        `share_seconds`: how long a worker may have to wait for its share of the rate.
        """
        if self._crew.ready_count == 0 or self._crew.flushing_count:
            return inf  # other clocks run
        once = self._patience.request + RETRY_DELAY_SECONDS_MAX + share_seconds
        return self._moved_at + STALL_SECONDS + self._job.options.attempts * once
