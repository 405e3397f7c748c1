"""Several processes that are one server: started, watched, and ended together.

Each opens the exports for itself, so that each descriptor is told of a write-back that failed; and each has its own
sockets of an address, among which the kernel shares out who comes, or all have the same one. The first process serves
nobody. One that dies takes the others with it: whoever was served by it would come back to a process that has not
seen what it saw (a failed write-back is told to a descriptor once), under the same `instance`.
"""

from __future__ import annotations

import functools
import os
import select
from collections.abc import Callable, Collection, Sequence
from typing import Final

from nbdshard.common import logs
from nbdshard.common.child import Child, close_all, fork
from nbdshard.common.errors import NbdshardError
from nbdshard.common.limits import COMMAND_EXIT_SECONDS
from nbdshard.server.notifying import notify
from nbdshard.server.orders import AT_ONCE, Orders, PipeOrders

Ready = Callable[[], None]  # to be called when the process lets clients in
Serve = Callable[[Orders, Ready], int]  # until its end; what the exit status is to be

_FAILED: Final = 1
_STDIN: Final = 0
_STDOUT: Final = 1
_READY: Final = b"+"


class Processes:
    """Processes that serve, and whose end is that of the server. To be made before there are threads."""

    def __init__(self, bodies: Sequence[tuple[Serve, Collection[int]]]) -> None:
        """Start one for each of `bodies`, which keeps the descriptors that stand beside it. Raises UserError."""
        self._all: list[Child] = []
        # Nothing is ever written to it: that it is closed, also by the death of this process, asks for the end.
        end, self._end = os.pipe2(os.O_CLOEXEC)
        self._ready, ready = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._is_ready_count = 0
        try:
            for body, keep in bodies:
                be = functools.partial(_be, body)
                self._all.append(fork(be, "a process of the server", stdin=end, stdout=ready, keep=keep))
        except BaseException:
            close_all(self._all, 0)
            raise
        finally:
            os.close(end)
            os.close(ready)

    def run(self, orders: Orders, ready: Ready) -> int:
        """Until all have ended, because it was asked for or one ended by itself; the worst of their statuses.

        `ready` is called once all let clients in.
        """
        running = {child.descriptor: child for child in self._all}
        try:
            return self._watch(running, orders, ready)
        finally:  # also where it could not be told that clients are let in: nothing is served unseen
            self._ask_for_the_end()
            close_all(self._all, 0 if orders.asked() == AT_ONCE else COMMAND_EXIT_SECONDS)
            os.close(self._ready)

    def _watch(self, running: dict[int, Child], orders: Orders, ready: Ready) -> int:
        poll = select.poll()
        for number in (orders.descriptor, self._ready, *running):
            poll.register(number, select.POLLIN)
        worst = 0
        while running:
            asked = orders.asked()
            if asked:
                self._ask_for_the_end()
            if asked == AT_ONCE:
                logs.error("ends at once: what no flush has covered may be lost")
                return _FAILED
            for number, _ in poll.poll():
                if number == self._ready:
                    self._hear(poll, ready)
                elif number in running and running[number].ended():
                    poll.unregister(number)
                    child = running.pop(number)
                    if not child.succeeded:
                        worst = _FAILED
                    if self._end >= 0:
                        logs.error(f"process {child.pid} {child.story()}: the server ends")
                        worst = _FAILED
                        self._ask_for_the_end()
        return worst

    def _hear(self, poll: select.poll, ready: Ready) -> None:
        said = os.read(self._ready, len(self._all))
        self._is_ready_count += len(said)
        if not said or self._is_ready_count == len(self._all):
            poll.unregister(self._ready)
        if self._is_ready_count == len(self._all) and self._end >= 0:
            ready()

    def _ask_for_the_end(self) -> None:
        if self._end >= 0:
            notify("STOPPING=1")
            os.close(self._end)
            self._end = -1


def _be(body: Serve) -> int:
    """The whole life of one of the processes. Never raises."""
    os.environ.pop("NOTIFY_SOCKET", None)  # the first process speaks for all
    try:
        return body(PipeOrders(_STDIN), _say_ready)
    except NbdshardError as error:
        logs.error(str(error))
    except Exception as error:
        logs.error(f"internal error: {type(error).__name__}: {error}")
    return _FAILED


def _say_ready() -> None:
    os.write(_STDOUT, _READY)
