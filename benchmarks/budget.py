"""Time as a bound: how many rounds there is time for. Pure; the clock's readings come in as arguments.

A run has so many seconds in all. Each part gets its share of what is left, by its weight among the parts that are still
to come, so what one part leaves over is the others'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

ROUNDS_SHARE = 0.95  # of a part's time may be over when its last timed round ends; the copy is still to be proven

Item = TypeVar("Item")


class Budget:
    """Seconds, shared out among named parts."""

    def __init__(self, seconds: float, weights: Mapping[str, float], now: float) -> None:
        self._end = now + seconds
        self._weights = dict(weights)

    def is_spent(self, now: float) -> bool:
        """Whether nothing is left for the parts that were not begun."""
        return now >= self._end

    def begin(self, part: str, now: float) -> float:
        """`part`, which was not begun before, begins; until when its rounds may go on."""
        among = sum(self._weights.values())
        share = self._weights.pop(part) / among if among else 1.0
        return now + max(self._end - now, 0.0) * share * ROUNDS_SHARE


@dataclass(slots=True)
class Rounds:
    """Whether there is time for another round: at least one is made, and no more than are wanted."""

    wanted: int
    deadline: float
    made: int = 0
    _began: float = field(default=0.0)

    def another(self, now: float) -> bool:
        """Ask before each round, and once after the last.

        A round is expected to take as long as the one before it: the first ones may be of more commands than the last.
        """
        if self.made == self.wanted or (self.made and now + (now - self._began) > self.deadline):
            return False
        self.made += 1
        self._began = now
        return True


def alternating(items: Sequence[Item], turn: int) -> Iterator[Item]:
    """`items` in the order of round number `turn`: each round begins with another one, so none always follows the same
    state of the machine.
    """
    first = turn % len(items)
    yield from items[first:]
    yield from items[:first]
