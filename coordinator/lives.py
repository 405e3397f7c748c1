"""Which life of the destination's server acknowledged what, and what that proves. Pure.

A server may name its life by an `instance` (common/nbd/hints.py), which is another one after each start, and whenever
what it acknowledged without a flush may be lost. So where a worker has lost its connections, and finds the same life
when it comes back, what was acknowledged to it is still there; and if the server CAN_MULTI_CONN, a flush on any
connection makes it durable::

    written under life A  ->  connections lost  ->  back under A:  kept, the next flush of this worker covers it
                                      ->  back, and told of another or of none:  copied again, as below
                                      ->  not back when nothing else is left to do:  copied again by others
    anybody is told of life B, after A  ->  what anybody wrote, or is writing, and no flush has settled: copied again

Who has nothing that is kept, and is told of no life, proves nothing either way.
"""

from __future__ import annotations

from nbdshard.coordinator.job import Job
from nbdshard.coordinator.planner import Plan
from nbdshard.coordinator.workers import Worker


class Lives:
    """What is known of one job's destination. `waiting`: workers without connections for whom something is kept."""

    def __init__(self, job: Job, plan: Plan) -> None:
        # Without flushes nothing would ever ask a worker that came back, and the job might end without it.
        self._is_provable = job.options.flush and plan.can_flush and plan.repeatable and not plan.single_writer
        self._latest = ""
        self.waiting: dict[str, Worker] = {}

    def keep(self, worker: Worker) -> bool:
        """`worker` has lost its connections: whether what it wrote waits for it to come back."""
        written = worker.written
        if not (self._is_provable and worker.instance and written):
            return False
        for granted in written:
            granted.is_kept = True
        self.waiting[worker.identity] = worker
        return True

    def begins_another(self, instance: str) -> bool:
        """A worker was told of `instance` ("": of none): whether that is another life than the one before."""
        is_another = bool(instance and self._latest and instance != self._latest)
        self._latest = instance or self._latest
        return is_another
