"""The control channel, simulated: encoded frames between the coordinator and each worker, late, but in order.

By switches, the messages that may be lost, doubled or overtaken without harm are (`Mischief`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nbdshard.common.errors import UserError
from nbdshard.common.limits import COORDINATOR_ANSWER_SECONDS
from nbdshard.common.messages import (
    Alive,
    AliveToo,
    FromCoordinator,
    FromWorker,
    Leaves,
    Message,
    Progress,
    Written,
    decode_from_coordinator,
    decode_from_worker,
    encode,
)
from simulation.clock import Pace, SimClock


@dataclass(frozen=True, slots=True)
class Mischief:
    """Shares of messages that may be treated so: Progress, Leaves, heartbeats; Written may be doubled and overtaken."""

    lost: float = 0.0
    doubled: float = 0.0
    overtaken: float = 0.0


_MAY_BE_LOST = (Progress, Leaves, Alive, AliveToo)
_MAY_BE_DOUBLED = (*_MAY_BE_LOST, Written)


class Wire:
    """One direction: frames arrive in order, each some time after it was sent."""

    def __init__(self, clock: SimClock, chance: random.Random, pace: Pace, mischief: Mischief) -> None:
        self._clock = clock
        self._chance = chance
        self._pace = pace
        self._mischief = mischief
        self.last_arrival = 0.0

    def hold_up(self, seconds: float) -> None:
        """What is sent from now on arrives no earlier than after so long."""
        self.last_arrival = max(self.last_arrival, self._clock.now + seconds)

    def send(self, message: Message, arrive: Callable[[bytes], None]) -> None:
        frame = encode(message)
        mischief, chance = self._mischief, self._chance
        if isinstance(message, _MAY_BE_LOST) and chance.random() < mischief.lost:
            return
        when = self._clock.now + self._pace.seconds()
        if isinstance(message, _MAY_BE_DOUBLED):
            if chance.random() < mischief.doubled:
                self._clock.at(max(when, self.last_arrival) + self._pace.seconds(), lambda: arrive(frame))
            if chance.random() < mischief.overtaken:
                self._clock.at(when + self._pace.seconds(), lambda: arrive(frame))
                return
        self.last_arrival = max(when, self.last_arrival)
        self._clock.at(self.last_arrival, lambda: arrive(frame))


class SimChannel:
    """A worker's end. `on_message` is called when there is something to receive."""

    def __init__(
        self,
        clock: SimClock,
        chance: random.Random,
        to_coordinator: Callable[[FromWorker], None],
        on_message: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._chance = chance
        self._to_coordinator = to_coordinator
        self._on_message = on_message
        self._inbox: deque[bytes] = deque()
        self._answered = False
        self._silent_until = clock.now + COORDINATOR_ANSWER_SECONDS

    @property
    def answered(self) -> bool:
        return self._answered

    @property
    def ready(self) -> bool:
        return bool(self._inbox)

    def arrive(self, frame: bytes) -> None:
        """A frame from the coordinator is here."""
        self._inbox.append(frame)
        self._on_message()

    def receive(self) -> list[FromCoordinator]:
        count = self._chance.randint(1, 3)
        taken = [self._inbox.popleft() for _ in range(min(count, len(self._inbox)))]
        self._answered |= bool(taken)
        return [decode_from_coordinator(frame, "the coordinator") for frame in taken]

    def send(self, message: FromWorker) -> bool:
        """Now and then the queue is full."""
        if self._chance.random() < 0.02:
            self._clock.after(0.001, self._on_message)
            return False
        self._to_coordinator(message)
        return True

    def check(self, now: float) -> None:
        if not self._answered and self._clock.now >= self._silent_until:
            raise UserError(f"no answer within {COORDINATOR_ANSWER_SECONDS:g} s", "the simulated coordinator")


def decode(frame: bytes, worker: str) -> FromWorker:
    """A frame as the coordinator reads it."""
    return decode_from_worker(frame, worker)
