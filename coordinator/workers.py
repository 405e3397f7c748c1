"""One worker as the coordinator knows it. Plain data with the state table's steps; the crew owns these."""

from __future__ import annotations

from math import inf

import msgspec

from nbdshard.common.messages import Hello
from nbdshard.coordinator.leases import Granted, Holding
from nbdshard.coordinator.states import WORKERS, WorkerEvent, WorkerState
from nbdshard.coordinator.tempo import Tempo


class FlushAsked(msgspec.Struct, frozen=True):
    """A `Flush` that is not answered yet, and the written leases it must cover."""

    number: int
    leases: frozenset[int]
    deadline: float  # monotonic seconds
    seconds: float


class Worker(msgspec.Struct, eq=False):
    """A worker from its Hello until it is gone. `*_share`: connections given to it, `*_connections`: those it has."""

    identity: str
    hello: Hello
    heard: float  # monotonic seconds
    alive_at: float = 0.0  # when it said the latest Alive that was heard, by its own clock; 0: none was
    state: WorkerState = WorkerState.JOINING
    source_share: int = 0
    destination_share: int = 0
    source_connections: int = 0
    destination_connections: int = 0
    wanted: int = 0
    holding: Holding | None = None  # its page of the ledger, from its first lease on
    flush: FlushAsked | None = None
    took_part: bool = False
    killed: bool = False
    replaceable: bool = True  # another one may do better: not after the server turned it away
    instance: str = ""  # the life of the destination's server that it found last; "": the server names none
    why: str = ""  # it was told to stop, or killed
    leave_by: float = inf  # when it must have left, once it was told to stop or killed
    open_by: float = inf  # when the scout must have opened both sides
    losses: int = 0  # in a row, without a lease written in between
    return_at: float = inf  # when it is given connections again, while it waits
    rate: int | None = (
        None  # its share of the job's rate, as it was told; None: no limit, as long as it was told nothing
    )
    was_told_rate: bool = False
    mark: tuple[tuple[int, int], ...] = ()  # how far its leases were ...
    moved_at: float = 0.0  # ... when that was seen to have changed
    has_stalled: bool = False  # ... for too long: a small share is enough to show that it gets on again
    tempo: Tempo = msgspec.field(default_factory=Tempo)
    alarm: float = inf  # when the crew looks at it next (its valid entry in the heap)

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"{self.hello.host}/{self.hello.pid}"

    @property
    def assigned(self) -> bool:
        """Whether it was given connections; otherwise it stands by."""
        return self.destination_share > 0

    @property
    def ever_leased(self) -> bool:
        """Whether it may have written to the destination."""
        return self.holding is not None

    @property
    def written(self) -> list[Granted]:
        """The leases it wrote that no flush covers."""
        return list(self.holding.written.values()) if self.holding is not None else []

    def step(self, event: WorkerEvent) -> None:
        self.state = WORKERS.step(self.state, event, self)

    def __str__(self) -> str:
        return f"worker {self.name}"

    def can_take(self, leases_max: int, written_max: int) -> bool:
        """Whether it can be granted a lease now: not with `leases_max` in hand, nor with `written_max` unflushed."""
        if self.state is not WorkerState.READY or self.wanted < 1:
            return False
        if self.holding is None:
            return True
        return len(self.holding.leased) < leases_max and len(self.holding.written) < written_max

    def due(self, lease_seconds: float) -> float:
        """When something is to be done about it if it is not heard of until then (monotonic seconds)."""
        if self.state is WorkerState.DRAINING:
            return self.leave_by
        flush = self.flush.deadline if self.flush is not None else inf
        return min(self.heard + lease_seconds, flush, self.open_by, self.return_at)
