"""`rate`: so many bytes a second and no more, shared by all clients of the export."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from nbdshard.common.bucket import Bucket
from nbdshard.common.errors import UserError
from nbdshard.common.limits import RATE_BYTES_MIN
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.around import Around, Operation, Result
from nbdshard.server.opening import Layer, Opening

# Whose bytes count for which parameter: those that move. Zeroes and trims are as long as one likes.
_COUNTED: Final[Mapping[str, Sequence[Operation]]] = MappingProxyType(
    {
        "rate": (Operation.READ, Operation.WRITE),
        "rate-read": (Operation.READ,),
        "rate-write": (Operation.WRITE,),
    }
)


class Throttle:
    """`rate` bytes a second. Who takes some is told when they may be used, in the order of coming; so none starves."""

    def __init__(self, rate: int, now: float) -> None:
        self._bucket = Bucket(request_bytes=1, now=now)
        self._bucket.set(rate, now)
        self._lock = threading.Lock()

    def take(self, count: int, now: float) -> float:
        """When these `count` bytes may be moved: `now`, or later."""
        with self._lock:
            self._bucket.admits(0, now)  # what has come since is in it now
            self._bucket.ask_again()
            self._bucket.take(count)
            if self._bucket.admits(0, now):
                return now
            ready = self._bucket.ready_at()
            assert ready is not None
            return ready


class Rate(Around):
    """Waits until all throttles of an operation have room, side by side with others, but not while the server ends."""

    def __init__(
        self, below: Backend, throttles: Mapping[Operation, Sequence[Throttle]], ending: threading.Event
    ) -> None:
        super().__init__(below)
        self._throttles = dict(throttles)
        self._ending = ending

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        throttles = self._throttles.get(operation)
        if throttles and where is not None:
            now = time.monotonic()
            ready = max(throttle.take(where.length, now) for throttle in throttles)
            if ready > now:
                self._ending.wait(ready - now)
        return call()


def _wrap(below: Backend, opening: Opening) -> Backend:
    parameters = opening.parameters
    throttles: dict[Operation, list[Throttle]] = {}
    for name, operations in _COUNTED.items():
        rate = parameters.size(name)
        if rate is None:
            continue
        if rate < RATE_BYTES_MIN:
            raise UserError(f"{name}={parameters.text(name)}: at least {RATE_BYTES_MIN >> 10}k", parameters.where)
        throttle = Throttle(rate, time.monotonic())
        for operation in operations:
            throttles.setdefault(operation, []).append(throttle)
    if not throttles:
        raise UserError("rate: no rate is given", parameters.where, "rate=10M, in bytes per second")
    return Rate(below, throttles, opening.ending)


LAYER: Final = Layer(_wrap, frozenset(_COUNTED))
