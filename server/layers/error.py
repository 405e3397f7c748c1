"""`error`: requests fail, all or some of them, to see what a client or the layer above makes of it."""

from __future__ import annotations

import errno
import os
import random
import re
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.around import Around, Operation, Result
from nbdshard.server.opening import Layer, Opening
from nbdshard.server.parameters import Parameters

_NAME: Final = "error"
_PARTS: Final = ("", "-rate", "-count")  # of what is said for all operations, and for one
_ERRNOS: Final[Mapping[str, int]] = MappingProxyType(
    {
        name: getattr(errno, name)
        for name in (
            "EIO",
            "EPERM",
            "ENOMEM",
            "EINVAL",
            "ENOSPC",
            "ENOTSUP",
            "ESHUTDOWN",
            "ETIMEDOUT",
            "ENOTCONN",
        )
    }
)
_RATE: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)(%?)")
_COUNT_MAX: Final = 10**9
_SEED_MAX: Final = (1 << 63) - 1


class Fault:
    """Fails with `number`, so often (0 to 1) as `rate` says, `count` times in all where there is one."""

    def __init__(self, number: int, rate: float, count: int | None, chance: random.Random) -> None:
        self.number = number
        self._rate = rate
        self._left = count
        self._chance = chance
        self._lock = threading.Lock()

    def strikes(self) -> bool:
        """Whether the request that asks fails."""
        with self._lock:
            if self._left == 0 or self._chance.random() >= self._rate:
                return False
            if self._left is not None:
                self._left -= 1
            return True


class Error(Around):
    """Operations fail as `faults` say, before anything is done; only while `file` exists, where there is one."""

    def __init__(self, below: Backend, faults: Mapping[Operation, Fault], file: str | None = None) -> None:
        super().__init__(below)
        self._faults = dict(faults)
        self._file = file

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        fault = self._faults.get(operation)
        if fault is not None and (self._file is None or os.path.exists(self._file)) and fault.strikes():
            raise OSError(fault.number, f"the layer `{_NAME}` fails this {operation.value}")
        return call()


def _wrap(below: Backend, opening: Opening) -> Backend:
    parameters = opening.parameters
    seed = parameters.count(f"{_NAME}-seed", 0, _SEED_MAX)
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
        logs.info(f"export {opening.name!r}: {_NAME}-seed={seed}")
    chance = random.Random(seed)
    general = _fault(parameters, [_NAME], chance)
    faults = {}
    for operation in Operation:
        fault = _fault(parameters, [f"{_NAME}-{operation.value}", _NAME], chance) or general
        if fault is not None:
            faults[operation] = fault
    if not faults:
        raise UserError(f"{_NAME}: nothing is to fail", parameters.where, f"{_NAME}=EIO, or {_NAME}-rate=10%")
    return Error(below, faults, parameters.text(f"{_NAME}-file"))


def _fault(parameters: Parameters, names: list[str], chance: random.Random) -> Fault | None:
    """What is said under the first of these names; what it leaves out is said under the others. None: nothing is."""
    if not any(parameters.text(names[0] + part) is not None for part in _PARTS):
        return None

    def given(part: str) -> str:
        return next((name + part for name in names if parameters.text(name + part) is not None), names[0] + part)

    number = _ERRNOS[parameters.choice(given(""), tuple(_ERRNOS), "EIO")]
    return Fault(number, _rate(parameters, given("-rate")), parameters.count(given("-count"), 0, _COUNT_MAX), chance)


def _rate(parameters: Parameters, name: str) -> float:
    text = parameters.text(name)
    if text is None:
        return 1.0
    match = _RATE.fullmatch(text)
    rate = float(match[1]) / (100 if match[2] else 1) if match else 2.0
    if rate > 1:
        raise UserError(f"{name}={text}: from 0 to 1, or from 0% to 100%, is expected", parameters.where)
    return rate


_KINDS: Final = (_NAME, *(f"{_NAME}-{operation.value}" for operation in Operation))
LAYER: Final = Layer(
    _wrap, frozenset({f"{_NAME}-file", f"{_NAME}-seed", *(kind + part for kind in _KINDS for part in _PARTS)})
)
