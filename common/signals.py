"""Signals as events: SIGINT, SIGTERM and SIGHUP are counted, and make `descriptor` readable for a poll loop.

Nothing is raised where the program happens to be, so nothing can be lost between its making and its noting down. Only
a second signal before the loop runs (`counting`) raises Interrupted: something in the preparations must hang, on a dead
network file system perhaps. Once the loop runs, and while things are cleaned up after it, nothing raises.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Final, Self

HANDLED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WAKE_BYTES_MAX: Final = 4096

_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupted(KeyboardInterrupt):
    """The user asked twice for an end, the second time by signal `number`, before the copy began."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class SignalWatch:
    """A context manager that handles HANDLED while it lasts. Main thread only."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._counting = False
        self._before: dict[signal.Signals, _Handler] = {}
        self._before_wakeup = -1
        self.descriptor = -1
        self._write_end = -1

    def __enter__(self) -> Self:
        self.descriptor, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in HANDLED:
            if signal.getsignal(number) is signal.SIG_IGN and number is signal.SIGHUP:
                continue  # started by nohup(1)
            self._before[number] = signal.signal(number, self._handle)
        return self

    def counting(self) -> None:
        """A loop looks at `received` from now on: never raise."""
        self._counting = True

    def drain(self) -> None:
        """Make `descriptor` quiet again."""
        try:
            os.read(self.descriptor, _WAKE_BYTES_MAX)
        except BlockingIOError:
            pass

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that ended because of the first signal: 130 after Ctrl-C."""
        return 128 + (self.received[0] if self.received else signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received.append(signal.Signals(number))
        if len(self.received) == 2 and not self._counting:
            raise Interrupted(signal.Signals(number))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_wakeup)
        os.close(self.descriptor)
        os.close(self._write_end)
