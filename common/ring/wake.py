"""How a wait is cut short: a pipe that threads, signal handlers and the interpreter itself write to."""

from __future__ import annotations

import os
import signal
import threading


class Waker:
    """A non-blocking pipe; poll `number` for reading.

    In the main thread it also becomes the interpreter's wake-up descriptor (unless somebody took that role before).
    A handler that calls `wake()` is not enough: a signal that arrives after the interpreter's last check and
    before the system call has no handler run until the call is over, and then the wait would last its whole time.
    """

    __slots__ = ("number", "_write", "_owns_signals")

    def __init__(self) -> None:
        self.number, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._owns_signals = False
        if threading.current_thread() is threading.main_thread():
            earlier = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._owns_signals = earlier == -1
            if earlier != -1:
                signal.set_wakeup_fd(earlier, warn_on_full_buffer=False)

    def wake(self) -> None:
        """Make `number` readable. Safe anywhere until `close`; after it, it does nothing."""
        if self._write == -1:
            return
        try:
            os.write(self._write, b"\0")
        except BlockingIOError:
            pass  # the pipe is full: nobody could be more awake

    def drain(self) -> None:
        """Forget every wake-up so far."""
        try:
            while len(os.read(self.number, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Give the descriptors back. No other thread may call `wake` while this runs."""
        if self._write == -1:
            return
        if self._owns_signals:
            signal.set_wakeup_fd(-1)
        write, self._write = self._write, -1
        os.close(write)
        os.close(self.number)
