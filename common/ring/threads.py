"""The few threads for what cannot be asked of the kernel without waiting: CALL, and under epoll file I/O."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from errno import EAGAIN

from nbdshard.common.limits import RING_THREADS_MAX
from nbdshard.common.ring.interface import Operation

Outcome = tuple[int, object]  # the operation's `result` and `value`
Job = Callable[[], Outcome]


def call(function: Callable[[], object] | None) -> Outcome:
    """Run the function of a CALL: (0, its value) or (-1, the exception it raised)."""
    try:
        return 0, function()  # type: ignore[misc]  # `submit` has checked that there is one
    except BaseException as error:  # a SystemExit would end a thread that belongs to us
        return -1, error


def system_call(function: Callable[..., int | None], *arguments: object) -> Outcome:
    """Run a system call of the os module: what it returned (None counts as 0), or -errno."""
    try:
        return function(*arguments) or 0, None
    except OSError as error:
        return -(error.errno or 0), None


class Threads:
    """At most RING_THREADS_MAX daemon threads, started when there is work that no idle one could take.

    The queue is bounded by the ring's own bound on operations in flight. `wake` is called from the threads after
    each job; the ring then collects with `take`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[tuple[Operation, Job]] = deque()
        self._done: deque[tuple[Operation, Outcome]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._stopping = False

    def start(self, operation: Operation, job: Job) -> None:
        """Run `job` on a thread; `take` returns its outcome together with `operation`."""
        with self._changed:
            self._queue.append((operation, job))
            if len(self._queue) > self._idle and len(self._threads) < RING_THREADS_MAX:
                self._grow()
            self._changed.notify()

    def cancel(self, operation: Operation) -> bool:
        """Whether `operation` had not begun and never will. One that has begun runs to its end."""
        with self._changed:
            for entry in self._queue:
                if entry[0] is operation:
                    self._queue.remove(entry)
                    return True
        return False

    def take(self) -> list[tuple[Operation, Outcome]]:
        """Everything that ended since the last time."""
        taken = []
        while self._done:
            taken.append(self._done.popleft())
        return taken

    def close(self, seconds: float) -> bool:
        """Stop; whether every thread ended within `seconds`. One that did not is left to die with the process."""
        with self._changed:
            self._stopping = True
            self._queue.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _grow(self) -> None:
        thread = threading.Thread(target=self._work, name=f"ring-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process may have no more threads; those it has will do
            if not self._threads:
                operation, _ = self._queue.pop()
                self._done.append((operation, (-EAGAIN, error)))
                self._wake()
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        # Signals belong to the main thread: one delivered here would not interrupt its wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (entry := self._next()) is not None:
            operation, job = entry
            self._done.append((operation, job()))
            del entry, operation, job  # or they, and what they hold, would live until the next job comes
            self._wake()

    def _next(self) -> tuple[Operation, Job] | None:
        with self._changed:
            self._idle += 1
            while not self._queue and not self._stopping:
                self._changed.wait()
            self._idle -= 1
            return None if self._stopping else self._queue.popleft()
