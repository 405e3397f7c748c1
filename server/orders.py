"""Who may ask a server for its end, and how often: by signals; a process that is part of a server, by a pipe."""

from __future__ import annotations

import os
from typing import Final, Protocol

from nbdshard.common.signals import SignalWatch

END: Final = 1  # finish what was accepted, flush, and end
AT_ONCE: Final = 2


class Orders(Protocol):
    """What a service looks at while it waits for anything else."""

    @property
    def descriptor(self) -> int:
        """Readable when `asked` may tell more than before; -1 where nothing more will be asked."""

    def asked(self) -> int:
        """0, END or AT_ONCE: never less than before."""


class SignalOrders:
    """The first signal asks for an end, the second for one at once."""

    def __init__(self, watch: SignalWatch) -> None:
        watch.counting()
        self._watch = watch

    @property
    def descriptor(self) -> int:
        return self._watch.descriptor

    def asked(self) -> int:
        self._watch.drain()
        return min(len(self._watch.received), AT_ONCE)


class PipeOrders:
    """The end of what is read from `number` asks for an end: who was to write there has closed it, or has died."""

    def __init__(self, number: int) -> None:
        os.set_blocking(number, False)
        self._asked = 0
        self.descriptor = number

    def asked(self) -> int:
        if not self._asked:
            try:
                self._asked = 0 if os.read(self.descriptor, 1) else END
            except BlockingIOError:
                return 0
            if self._asked:
                self.descriptor = -1
        return self._asked
