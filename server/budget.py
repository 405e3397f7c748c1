"""The memory that all connections of a server have for payload, together: who may take how much of it, and who waits.

A share is one connection's. Three rules:

- nobody takes more than is left for others: what a share holds then must be no more than what stays free. So one client
  that never reads has half of it at most, a second one half of the rest;
- a request that is too large for that waits for its turn, in order, until so much is free, and nobody else takes any
  meanwhile; but there is a reserve beside, shared out by the first rule, that keeps small requests going;
- who holds memory, and has taken or sent nothing for SERVED_STALL_SECONDS while others wait for a turn, is cut off. So
  is one that moves a byte now and then, if it takes longer than SERVED_BYTES_PER_SECOND_MIN allows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from nbdshard.common.errors import BugError
from nbdshard.common.limits import (
    SERVED_BYTES_PER_SECOND_MIN,
    SERVED_STALL_SECONDS,
    SERVER_BYTES_MAX,
    SERVER_BYTES_RESERVE,
)


class Budget:
    """`bytes_max` bytes for all, and `reserve` beside.

    Any thread may call a share; its `wake` and `cut` are called by the threads of others.
    """

    def __init__(self, bytes_max: int = SERVER_BYTES_MAX, reserve: int = SERVER_BYTES_RESERVE) -> None:
        self._free = bytes_max
        self._reserve = reserve
        self._lock = threading.Lock()
        self._shares: set[Share] = set()
        self._turns: deque[Share] = deque()  # who waits for all that is needed at once
        self._waiting: set[Share] = set()  # everybody who was told to wait

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self._free + self._reserve

    def join(self, wake: Callable[[], None], cut: Callable[[], None]) -> Share:
        """A share for a connection. `wake`: memory it waits for may be free; `cut`: it is to end."""
        share = Share(self, wake, cut)
        with self._lock:
            self._shares.add(share)
        return share

    def take(self, share: Share, count: int) -> bool:
        """See Share.take."""
        with self._lock:
            if self._may(share, count):
                self._free -= count
            elif share.reserved + 2 * count <= self._reserve:
                self._reserve -= count
                share.reserved += count
            else:
                self._waiting.add(share)
                return False
            self._forget(share)
            share.held += count
            return True

    def give(self, share: Share, count: int) -> None:
        """See Share.give."""
        with self._lock:
            if count > share.held:
                raise BugError(f"{count} bytes given back of {share.held}")
            woken = self._freed(share, count)
        for each in woken:
            each.wake()

    def give_up(self, share: Share) -> None:
        """See Share.give_up."""
        with self._lock:
            woken = self._freed(share, 0)
            self._forget(share)
        for each in woken:
            each.wake()

    def leave(self, share: Share) -> None:
        """See Share.leave."""
        with self._lock:
            self._forget(share)
            self._shares.discard(share)
            woken = self._freed(share, share.held)
        for each in woken:
            each.wake()

    def cut_stalled(self, now: float) -> None:
        """To be called by who has waited for long: whoever holds memory and does nothing with it is cut off."""
        with self._lock:
            if not self._turns:
                return
            stalled = [share for share in self._shares if share.is_stalled(now)]
        for share in stalled:
            share.cut()

    def _may(self, share: Share, count: int) -> bool:
        if not self._turns and share.held + 2 * count <= self._free:
            return True
        if share.held:
            return False  # it is asked again when that is free
        if share not in self._turns:
            self._turns.append(share)
        return self._turns[0] is share and count <= self._free

    def _forget(self, share: Share) -> None:
        self._waiting.discard(share)
        if share in self._turns:
            self._turns.remove(share)

    def _freed(self, share: Share, count: int) -> list[Share]:
        """Who is to be woken."""
        reserved = min(count, share.reserved)
        share.reserved -= reserved
        share.held -= count
        self._reserve += reserved
        self._free += count - reserved
        woken, self._waiting = list(self._waiting), set()
        return woken


class Share:
    """What one connection holds. By time.monotonic() `moved_at` is when its client last took or sent something, and
    `got_on_at` when it last gave something back, or began to hold something.
    """

    def __init__(self, budget: Budget, wake: Callable[[], None], cut: Callable[[], None]) -> None:
        self.held = 0
        self.reserved = 0  # of that, out of the reserve
        self.moved_at = 0.0
        self.got_on_at = 0.0
        self.wake = wake
        self.cut = cut
        self._budget = budget

    def take(self, count: int) -> bool:
        """Hold `count` bytes more. False where they cannot be had now: `wake` says when to try again."""
        return self._budget.take(self, count)

    def give(self, count: int) -> None:
        """Hold `count` bytes less."""
        if count:
            self._budget.give(self, count)

    def is_stalled(self, now: float) -> bool:
        """Whether it holds memory to no purpose."""
        if not self.held:
            return False
        is_slow = now - self.got_on_at > SERVED_STALL_SECONDS + self.held / SERVED_BYTES_PER_SECOND_MIN
        return is_slow or now - self.moved_at > SERVED_STALL_SECONDS

    def give_up(self) -> None:
        """What it has waited for is not needed any more. It is woken, too, where it waits for something else."""
        self._budget.give_up(self)

    def leave(self) -> None:
        """Hold nothing any more."""
        self._budget.leave(self)

    def cut_stalled(self, now: float) -> None:
        """It has waited for memory: whoever holds some without using it is cut off."""
        self._budget.cut_stalled(now)
