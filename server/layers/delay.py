"""`delay`: every request takes so much longer, side by side, as with a disk or a network that is far away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.limits import LAYER_DELAY_SECONDS_MAX
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.around import Around, Operation, Result, names_of
from nbdshard.server.opening import Layer, Opening

_NAME: Final = "delay"


class Delay(Around):
    """Waits `seconds` before an operation that has some, but not while the server ends."""

    def __init__(self, below: Backend, seconds: Mapping[Operation, float], ending: threading.Event) -> None:
        super().__init__(below)
        self._seconds = dict(seconds)
        self._ending = ending

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        if seconds := self._seconds.get(operation):
            self._ending.wait(seconds)
        return call()


def _wrap(below: Backend, opening: Opening) -> Backend:
    parameters = opening.parameters
    seconds = {}
    for operation in Operation:
        name = f"{_NAME}-{operation.value}"
        name = name if parameters.text(name) is not None else _NAME
        seconds[operation] = parameters.seconds(name) or 0.0
        if seconds[operation] > LAYER_DELAY_SECONDS_MAX:
            what = f"{name}={parameters.text(name)}: at most {LAYER_DELAY_SECONDS_MAX:g}s are waited"
            raise UserError(what, parameters.where)
    if not any(parameters.text(name) is not None for name in names_of(_NAME)):
        raise UserError(f"{_NAME}: nothing is to wait", parameters.where, f"{_NAME}=100ms, say")
    return Delay(below, seconds, opening.ending)


LAYER: Final = Layer(_wrap, names_of(_NAME), shared=True)
