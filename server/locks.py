"""Locks of parts that are many: chunks of an image, blocks of an overlay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Locks:
    """A lock for each part that somebody has, or waits for; no more of them than there are threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[int, tuple[threading.Lock, int]] = {}  # and by how many it is wanted

    @contextmanager
    def of(self, part: int) -> Iterator[None]:
        with self._lock:
            lock, wanted = self._taken.get(part, (threading.Lock(), 0))
            self._taken[part] = (lock, wanted + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                wanted = self._taken[part][1] - 1
                if wanted:
                    self._taken[part] = (lock, wanted)
                else:
                    del self._taken[part]
