"""How other threads wake one that waits in poll(2), and what it asks without waiting."""

from __future__ import annotations

import os
import select
import threading


class Wake:
    """`number` is readable from a `notify` to the next `clear`. What is to be seen is there before `notify`."""

    def __init__(self) -> None:
        """Raises OSError where there is no descriptor left."""
        self.number = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_set = False
        self._lock = threading.Lock()

    def notify(self) -> None:
        """From any thread. Said many times before it is heard, it costs one system call."""
        with self._lock:
            if not self._is_set:
                self._is_set = True
                os.eventfd_write(self.number, 1)

    def clear(self) -> bool:
        """Before looking at what it may be about: whether it was notified."""
        if not self._is_set:
            return False
        with self._lock:
            self._is_set = False
            os.eventfd_read(self.number)
        return True

    def close(self) -> None:
        """Nobody hears it any more. Who notifies all the same, because what it is about was seen before it said so,
        must not wake, or write to, whatever has the number next.
        """
        with self._lock:
            self._is_set = True
            os.close(self.number)


def is_readable(number: int) -> bool:
    """Whether there is something to be read at once, and be it the end."""
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))
