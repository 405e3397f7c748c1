"""Flushing: written leases become durable by a flush acknowledged on every connection that wrote. Pure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from nbdshard.common.errors import RequestError
from nbdshard.common.messages import ErrorReport, Flushed

if TYPE_CHECKING:
    from nbdshard.worker.copier import Copier
    from nbdshard.worker.sides import Target


class Flushes:
    """The flushes asked of one worker, one at a time.

    A flush covers the leases that were written when it was sent. One that fails is never repeated: the kernel may
    report a lost write-back only once, so a second success would prove nothing.
    """

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._written: set[int] = set()  # leases no flush covers yet
        self._asked: deque[int] = deque()
        self._current: int | None = None
        self._covers: list[int] = []
        self._pending = 0
        self._error: ErrorReport | None = None

    @property
    def busy(self) -> bool:
        return self._current is not None

    def written(self, lease: int) -> None:
        """Every byte of `lease` was acknowledged."""
        self._written.add(lease)

    def ask(self, flush: int) -> None:
        """Flush every connection to the destination, and answer with `Flushed`."""
        self._asked.append(flush)
        self._begin()

    def _begin(self) -> None:
        if self.busy or not self._asked:
            return
        targets = self._copier.targets
        self._current = self._asked.popleft()
        self._covers = sorted(self._written)
        self._error = None
        if not targets:
            self._answer(durable=True)  # nothing was written here
            return
        if not all(target.connection.description.can_flush for target in targets):
            self._answer(durable=False)
            return
        self._pending = len(targets)
        for target in targets:
            if not self._copier.lanes.flush(target):
                target.flush()

    def done(self, target: Target, error: RequestError | None) -> None:
        """One connection answered."""
        if error is not None and self._error is None:
            peer = target.connection.description.peer
            text = f"destination {peer}: flush failed: {error}; what was written may be lost"
            self._error = ErrorReport("request", text, "destination", peer, errno_name=error.errno_name)
        self._pending -= 1
        if self._pending == 0:
            self._answer(durable=self._error is None)

    def _answer(self, *, durable: bool) -> None:
        copier = self._copier
        assert self._current is not None
        if self._error is None:
            self._written.difference_update(self._covers)
        answer = Flushed(copier.job, copier.epoch, self._current, self._covers, durable, self._error)
        copier.outbox.append(answer)
        self._current = None
        self._begin()
