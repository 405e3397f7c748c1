"""Locks of parts that are many: chunks of an image, blocks of an overlay."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager


class Locks:
    """A lock for each part that somebody has, or waits for; no more of them than there are threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[int, _Taken] = {}

    def of(self, part: int) -> AbstractContextManager[None]:
        """A block's own, by which it has `part` alone."""
        return _Turn(self, part)

    def take(self, part: int) -> None:
        """Wait for `part`; to be followed by `give`."""
        with self._lock:
            taken = self._taken.get(part)
            if taken is None:
                taken = self._taken[part] = _Taken()
            taken.wanted += 1
        taken.lock.acquire()

    def give(self, part: int) -> None:
        """Have `part` no more."""
        with self._lock:
            taken = self._taken[part]
            taken.wanted -= 1
            if not taken.wanted:
                del self._taken[part]
        taken.lock.release()


class _Taken:
    __slots__ = ("lock", "wanted")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted = 0  # by how many threads, who has it included


class _Turn:
    """Not a generator: it is taken for each write."""

    __slots__ = ("_locks", "_part")

    def __init__(self, locks: Locks, part: int) -> None:
        self._locks, self._part = locks, part

    def __enter__(self) -> None:
        self._locks.take(self._part)

    def __exit__(self, *_: object) -> None:
        self._locks.give(self._part)
