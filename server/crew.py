"""The threads that carry out what may wait: one crew for an export, whoever its clients are.

So a store that hangs holds up the clients of its own export alone. Flushes have threads of their own: when all of them
wait for a disk, reads go on. So have changes, which may wait for room in a cache. Threads are started when they are
first needed, and are daemons: a call that never returns does not keep the server from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from nbdshard.common import logs
from nbdshard.common.limits import CREW_CALLS_MAX, CREW_FLUSHES_MAX

Call = Callable[[], None]  # never raises


class Crew:
    """Carries out the calls of one export's backend."""

    def __init__(self, calls_max: int = CREW_CALLS_MAX, flushes_max: int = CREW_FLUSHES_MAX) -> None:
        self._calls = _Gang(calls_max)
        self._changes = _Gang(calls_max)
        self._flushes = _Gang(flushes_max)

    def carry_out(self, call: Call, *, is_flush: bool, is_change: bool = False) -> None:
        """Have `call` made as soon as a thread is free; here and now where there is none and none can be started."""
        gang = self._flushes if is_flush else self._changes if is_change else self._calls
        if not gang.submit(call):
            call()


class _Gang:
    def __init__(self, threads_max: int) -> None:
        self._threads_max = threads_max
        self._threads = 0
        self._busy = 0  # calls that are made, or wait for a thread
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Call] = SimpleQueue()

    def submit(self, call: Call) -> bool:
        with self._lock:
            if self._busy >= self._threads < self._threads_max and not self._start() and not self._threads:
                return False
            self._busy += 1
        self._queue.put(call)
        return True

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except (
            RuntimeError
        ) as error:  # the system gives no more threads: those that are there do it, one after the other
            logs.warning(f"{self._threads} threads carry out requests, and there is no further one: {error}")
            return False
        self._threads += 1
        return True

    def _work(self) -> None:
        while True:
            call = self._queue.get()
            call()
            with self._lock:
                self._busy -= 1
