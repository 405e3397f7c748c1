"""A worker process: `worker.service.Worker` on a simulated ring. It turns when it has a reason to; may be killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf

from nbdshard.common.errors import BugError, NbdshardError
from nbdshard.common.messages import PROTOCOL_VERSION, FromWorker, Hello
from nbdshard.worker.copier import Copier
from nbdshard.worker.life import WorkerState
from nbdshard.worker.service import Worker
from simulation.channel import SimChannel
from simulation.clock import Pace, SimClock
from simulation.network import SimNetwork
from simulation.plumbing import SimPlumbing
from simulation.ring import SimRing, SimSystem

TURNS_MAX = 300_000  # of one worker: more of them in one job is a loop that spins


class SimProcess:
    """One worker, from its start until `ended`. `on_end(process, reason)` is called then, once."""

    def __init__(
        self,
        name: str,
        pid: int,
        clock: SimClock,
        chance: random.Random,
        paces: tuple[Pace, Pace],
        network: SimNetwork,
        plumbing: Callable[[SimSystem, SimRing], SimPlumbing] | None,
        to_coordinator: Callable[[FromWorker], None],
        on_end: Callable[[SimProcess, str], None],
    ) -> None:
        """`paces`: of the ring's completions, and of the scheduler that lets processes run. `plumbing`: None to splice
        nothing."""
        self.name = name
        self.ended = False
        self.leaves = 0  # how often it was asked to
        self.system = SimSystem(network)
        self.channel = SimChannel(clock, chance, to_coordinator, self._wake)
        self.ring = SimRing(clock, chance, paces[0], self.system, self._stir)
        self.plumbing = plumbing(self.system, self.ring) if plumbing is not None else None
        self._clock = clock
        self._nap = paces[1]
        self._on_end = on_end
        self._turn_at = inf
        self._stalled_until = 0.0
        self._turns = 0
        self._rests_until: float | None = None  # by the worker's own clock; None: it has something else to do
        self._offset = chance.uniform(0, 1e6)  # monotonic clocks of different machines have nothing in common
        hello = Hello(PROTOCOL_VERSION, name, "machine", "host", pid, self.ring.name)
        self.worker = Worker(
            self.ring, self.channel, hello, lambda: clock.now + self._offset, self.system, self.plumbing
        )
        self._wake()

    def kill(self, reason: str) -> None:
        """SIGKILL: what the kernel has taken over still arrives, nothing else does."""
        if not self.ended:
            self.system.close_all()
            self._end(reason)

    def leave(self, reason: str) -> None:
        """As after SIGTERM."""
        if not self.ended:
            self.leaves += 1
            self.worker.leave(reason)
            self._wake()

    def writable(self) -> list[int]:
        """The leases under which it may write something now."""
        worker = self.worker
        copier = worker._work
        if (
            self.ended
            or not isinstance(copier, Copier)
            or worker.state in (WorkerState.LOSING, WorkerState.PARTING, WorkerState.GONE)
        ):
            return []
        now = self._clock.now + self._offset
        return [number for number, lease in copier.leases.items() if now < lease.expires]

    def stall(self, seconds: float) -> None:
        """It is not let run for some time."""
        self._stalled_until = self.ring.paused_until = self._clock.now + seconds
        self._turn_at = inf
        self._wake()

    def jump(self, seconds: float) -> None:
        """Its clock, which also counts the time in which the machine was suspended, is so much later all at once."""
        self._offset += seconds
        self._wake()

    def _wake(self) -> None:
        """Something that is not the ring's: whoever rests is to turn."""
        self._rests_until = None
        self._stir()

    def _stir(self) -> None:
        """The ring has something to return."""
        self._turn_by(self._clock.now)

    def _turn_by(self, when: float) -> None:
        when = max(when, self._stalled_until)
        if when < self._turn_at and not self.ended:
            when += self._nap.seconds()
            if when < self._turn_at:
                self._turn_at = when
                self._clock.at(when, lambda: self._turn(when))

    def _turn(self, when: float) -> None:
        if self.ended or self._turn_at != when:
            return
        self._turn_at = inf
        self._turns += 1
        assert self._turns < TURNS_MAX, f"worker {self.name} turns in circles"
        try:
            self._run()
        except BugError:
            raise
        except NbdshardError as error:
            self.system.close_all()
            self._end(str(error))
            return
        if self.worker.state is WorkerState.GONE:
            assert not self.system.open, f"worker {self.name} has left {sorted(self.system.open)} open"
            assert not self.system.pipe_ends, f"worker {self.name} has left pipes {self.system.pipe_ends} open"
            pending = self.ring.in_flight - self.ring.calls  # nobody can end a thread that waits for the resolver
            assert not pending, f"worker {self.name} has left {pending} operations pending"
            self._end(str(self.worker.error) if self.worker.error else "exited with status 0")
        else:
            self._turn_by(self.ring.wake_at)
            if self.channel.ready:
                self._wake()
            elif self.ring.ready:
                self._stir()

    def _run(self) -> None:
        """One turn; or what would be still the last one, if `wait` blocked: the ring's completions are handed out."""
        worker, ring = self.worker, self.ring
        if self._rests_until is not None and ring.ready and self._clock.now < ring.wake_at:
            worker._rest(self._rests_until, has_work=False)
        else:
            worker.turn()
        if self.plumbing is not None:
            self.plumbing.check(worker._pipes._free if worker._pipes is not None else ())
        left = ring.wake_at - self._clock.now
        self._rests_until = worker._clock.steady + left if ring.is_waiting else None

    def _end(self, reason: str) -> None:
        self.ended = True
        self.ring.close()
        self._on_end(self, reason)
