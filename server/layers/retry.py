"""`retry`: what fails below for a reason that may pass is tried again, each request on its own, with growing pauses.

A flush is tried again only where the layer below says that nothing was lost: its `losses` are what they were. Otherwise
the error may have been the only word of a write-back that failed, and a second flush that succeeds would hide it.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    LAYER_RETRIES,
    LAYER_RETRIES_MAX,
    LAYER_RETRY_DELAY_SECONDS,
    LAYER_RETRY_ENDING_SECONDS,
    LAYER_RETRY_PAUSE_SECONDS_MAX,
    LAYER_RETRY_SECONDS,
    LAYER_RETRY_SECONDS_MAX,
)
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.around import Around, Operation, Result
from nbdshard.server.opening import Layer, Opening

PASSING: Final = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN",
        "EBUSY",
        "ECONNABORTED",
        "ECONNREFUSED",
        "ECONNRESET",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "EINTR",
        "EIO",
        "ENETDOWN",
        "ENETUNREACH",
        "ENOBUFS",
        "ENOMEM",
        "ENOTCONN",
        "EPIPE",
        "EREMOTEIO",
        "ESHUTDOWN",
        "ETIME",
        "ETIMEDOUT",
    )
)  # errnos for which another try is worth it: not of a request that is wrong, or not allowed, or has no room
_READING: Final = frozenset({Operation.READ, Operation.CACHE, Operation.EXTENTS})


class Patience(msgspec.Struct, frozen=True):
    """How often a request is tried again, the first pause, which doubles, and when the last try may begin. Seconds."""

    retries: int = LAYER_RETRIES
    delay: float = LAYER_RETRY_DELAY_SECONDS
    total: float = LAYER_RETRY_SECONDS


class Retry(Around):
    """Tries again with `patience`. When `ending` is set, what only reads gives up, and the rest does so soon."""

    def __init__(self, below: Backend, patience: Patience, ending: threading.Event) -> None:
        super().__init__(below)
        self._patience = patience
        self._ending = ending
        self._closed = threading.Event()

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        losses = self.below.losses
        end = time.monotonic() + self._patience.total
        pause = self._patience.delay
        for retry in range(self._patience.retries + 1):
            try:
                result = call()
            except OSError as error:
                failure = error
            else:
                if retry and operation is Operation.FLUSH and self.below.losses != losses:
                    raise OSError(errno.EIO, "something was lost while this flush was tried again")
                return result
            wait = pause * random.uniform(0.5, 1)
            if failure.errno not in PASSING or time.monotonic() + wait > end:
                break
            if operation is Operation.FLUSH and self.below.losses != losses:
                break
            if retry < self._patience.retries:
                logs.info(f"{operation.value} {where or ''} failed and is tried again: {failure.strerror}")
                end = self._pause(wait, end, failure, is_reading=operation in _READING)
                pause = min(2 * pause, LAYER_RETRY_PAUSE_SECONDS_MAX)
        raise failure

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        """Only the first try may be refused for being slow: others come after half of it was done, perhaps."""

        def call() -> None:
            nonlocal fast
            is_first, fast = fast, False
            self.below.zero(where, may_punch=may_punch, fast=is_first)

        self.carry_out(Operation.ZERO, where, call)

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _pause(self, seconds: float, end: float, failure: OSError, *, is_reading: bool) -> float:
        """Wait so long; when the last try may begin then. Raises OSError where there is to be none."""
        begun = time.monotonic()
        if not self._ending.wait(seconds):
            return end
        if is_reading:
            raise OSError(errno.ESHUTDOWN, f"the server ends, and does not try again: {failure.strerror}")
        now = time.monotonic()
        self._closed.wait(max(0.0, begun + seconds - now))
        return min(end, now + LAYER_RETRY_ENDING_SECONDS)


def _wrap(below: Backend, opening: Opening) -> Backend:
    parameters = opening.parameters
    retries = parameters.count("retries", 0, LAYER_RETRIES_MAX)
    delay = parameters.seconds("retry-delay")
    total = parameters.seconds("retry-max")
    for name, seconds, most in (
        ("retry-delay", delay, LAYER_RETRY_PAUSE_SECONDS_MAX),
        ("retry-max", total, LAYER_RETRY_SECONDS_MAX),
    ):
        if seconds is not None and seconds > most:
            raise UserError(f"{name}={parameters.text(name)}: at most {most:g}s is allowed", parameters.where)
    default = Patience()
    patience = Patience(
        default.retries if retries is None else retries,
        default.delay if delay is None else delay,
        default.total if total is None else total,
    )
    return Retry(below, patience, opening.ending)


LAYER: Final = Layer(_wrap, frozenset({"retries", "retry-delay", "retry-max"}), shared=True)
