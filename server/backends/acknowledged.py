"""What another server has acknowledged and no flush has covered, and whether it may be lost. Any thread may call.

Writes are numbered when they begin, zeroes and trims included, and belong to a life of the other server: until it is
not known to be the same any more. What was acknowledged in an earlier life, and not flushed there, may be gone.
"""

from __future__ import annotations

import threading


class Acknowledged:
    """Of one export."""

    def __init__(self) -> None:
        self.life = 0
        self.lost = ""  # why something may be lost, for good; "" while nothing is
        self.is_in_doubt = False  # a flush may have been told that something is lost: the next connection shows
        self.bytes_unflushed = 0
        self._begun = 0
        self._active: set[int] = set()  # numbers of writes under way
        self._last = 0  # the highest number that was acknowledged
        self._durable = 0  # the number up to which everything is that was acknowledged
        self._lock = threading.Lock()

    def begin(self, length: int) -> int:
        """The number of a write that has not been sent yet."""
        with self._lock:
            self._begun += 1
            self._active.add(self._begun)
            self.bytes_unflushed += length
            return self._begun

    def answered(self, number: int, life: int) -> bool:
        """It was acknowledged; False where the `life` it was sent in is over, and it has to be sent again."""
        with self._lock:
            if life == self.life:
                self._last = max(self._last, number)
            return life == self.life

    def end(self, number: int) -> None:
        """It was answered, or has failed."""
        with self._lock:
            self._active.remove(number)

    def covered(self) -> int:
        """The number up to which a flush that is sent now covers everything."""
        with self._lock:
            return min(self._active, default=self._begun + 1) - 1

    def flushed(self, covered: int) -> None:
        """A flush has succeeded that covers so much."""
        with self._lock:
            self._durable = max(self._durable, covered)
            if self._durable >= self._last:
                self.bytes_unflushed = 0

    def flush_failed(self, why: str, *, has_lives: bool) -> None:
        """Or its answer is lost: it may have been the only word of a write-back that failed.

        `has_lives`: the server names them, and another one then.
        """
        with self._lock:
            if self._begun == self._durable:
                return  # nothing is at stake
            if has_lives:
                self.is_in_doubt = True
            else:
                self.lost = self.lost or f"a flush failed ({why})"

    def connected(self, *, is_same_life: bool) -> None:
        """Anew, when no connection was left: whether what was acknowledged before is there for certain."""
        with self._lock:
            if not is_same_life:
                self.life += 1
                if self.is_in_doubt or self._last > self._durable:
                    self.lost = self.lost or "it was started again, or does not say that it was not"
            self.is_in_doubt = False
