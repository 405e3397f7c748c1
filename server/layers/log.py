"""`log`: a line for each request that begins and one for each that ends, as JSON, to a file or standard error.

Whatever becomes of the lines, requests are carried out: a line that cannot be written is counted, and not waited for.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.around import Around, Operation, Result
from nbdshard.server.opening import Layer, Opening

_NAME: Final = "log"
_STDERR: Final = 2


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """`time`: seconds since 1970. `id`: of a request of `process`, in both of its lines. `error`: the errno's name."""

    time: float
    export: str
    process: int
    id: int
    event: str
    operation: str
    offset: int | None = None
    length: int | None = None
    seconds: float | None = None
    error: str | None = None


class _Lost(msgspec.Struct, frozen=True):
    """So many lines could not be written before this one."""

    lost: int


class Lines:
    """Lines to the open file `number`, from any thread, as whole as the file takes them. `path`: what it is called."""

    def __init__(self, number: int, path: str) -> None:
        self._number = number
        self._path = path
        self._lock = threading.Lock()
        self._lost = 0
        self._is_torn = False  # the last line has no end

    def write(self, line: msgspec.Struct) -> None:
        """Never raises, and waits for nobody who is to read it."""
        with self._lock:
            data = msgspec.json.encode(line) + b"\n"
            if self._lost:
                data = msgspec.json.encode(_Lost(self._lost)) + b"\n" + data
            if self._is_torn:
                data = b"\n" + data
            try:
                count = os.write(self._number, data) if self._has_room() else 0
            except OSError as error:
                self._lose(os.strerror(error.errno or 0))
                return
            if count < len(data):
                self._is_torn = self._is_torn if not count else True
                self._lose("there is no room")
            else:
                self._lost, self._is_torn = 0, False

    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self._number, select.POLLOUT)
        return bool(poll.poll(0))

    def _lose(self, why: str) -> None:
        if not self._lost:
            logs.warning(f"{self._path}: a line of the log could not be written: {why}")
        self._lost += 1

    def close(self) -> None:
        """The file, if it was opened for these lines."""
        if self._number != _STDERR:
            os.close(self._number)


class Log(Around):
    """Writes of each request of `export` to `lines`, which it owns."""

    def __init__(self, below: Backend, export: str, lines: Lines) -> None:
        super().__init__(below)
        self._export = export
        self._lines = lines
        self._ids = itertools.count()

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        offset, length = (None, None) if where is None else (where.start, where.length)
        number = next(self._ids)

        def say(event: str, seconds: float | None = None, error: str | None = None) -> None:
            now = round(time.time(), 6)
            line = _Line(now, self._export, os.getpid(), number, event, operation.value, offset, length, seconds, error)
            self._lines.write(line)

        say("begin")
        begun = time.monotonic()
        failure: str | None = "?"  # what is no OSError is a bug
        try:
            result = call()
            failure = None
            return result
        except OSError as error:
            failure = errno.errorcode.get(error.errno or 0, "EIO")
            raise
        finally:
            say("end", round(time.monotonic() - begun, 6), failure)

    def close(self) -> None:
        super().close()
        self._lines.close()


def _wrap(below: Backend, opening: Opening) -> Backend:
    path = opening.parameters.text(_NAME)
    if path is None:
        return Log(below, opening.name, Lines(_STDERR, "standard error"))
    try:
        number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise UserError(f"{_NAME}={path}: cannot be opened: {error.strerror}", opening.parameters.where) from None
    return Log(below, opening.name, Lines(number, path))


LAYER: Final = Layer(_wrap, frozenset({_NAME}), shared=True)
