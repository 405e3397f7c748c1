"""`stats`: how many requests of each kind there were, their bytes, errors and times, as JSON."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import STATS_SECONDS
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.layers.around import Around, Operation, Result
from nbdshard.server.opening import Layer, Opening

_NAME: Final = "stats"


class Sum(msgspec.Struct):
    """Of all requests of a kind: `bytes` of those that succeeded, `seconds` of all together and of the longest."""

    count: int = 0
    errors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    seconds_max: float = 0.0


class Stats(Around):
    """Counts. What it found is written to `path` once in a while and at the end, or at the end to standard error."""

    def __init__(self, below: Backend, export: str, path: Path | None) -> None:
        super().__init__(below)
        self._export = export
        self._path = path
        self._sums = {operation: Sum() for operation in Operation}
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._began = self._written = time.monotonic()
        self._has_failed = False

    def carry_out(self, operation: Operation, where: Range | None, call: Callable[[], Result]) -> Result:
        begun, is_done = time.monotonic(), False
        try:
            result = call()
            is_done = True
            return result
        finally:
            self._add(operation, 0 if where is None else where.length, begun, is_done=is_done)

    def _add(self, operation: Operation, length: int, begun: float, *, is_done: bool) -> None:
        now = time.monotonic()
        with self._lock:
            found = self._sums[operation]
            found.count += 1
            found.errors += not is_done
            found.bytes += length if is_done else 0
            found.seconds += now - begun
            found.seconds_max = max(found.seconds_max, now - begun)
        if self._path is not None and now - self._written >= STATS_SECONDS and self._writing.acquire(blocking=False):
            try:
                self._written = now
                self._write(self._path)
            finally:
                self._writing.release()

    def report(self) -> bytes:
        """JSON: the export's name, for how long it has been served, and a Sum for each kind of request."""
        with self._lock:
            sums = {operation.value: msgspec.structs.asdict(each) for operation, each in self._sums.items()}
        seconds = round(time.monotonic() - self._began, 6)
        return msgspec.json.encode({"export": self._export, "seconds": seconds, "operations": sums})

    def close(self) -> None:
        super().close()
        if self._path is None:
            logs.say(self.report().decode())
        else:
            with self._writing:
                self._write(self._path)

    def _write(self, path: Path) -> None:
        """Beside it and then in its place, so that whoever reads it finds all of it. Never raises."""
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            fresh.write_bytes(self.report() + b"\n")
            fresh.rename(path)
        except OSError as error:
            if not self._has_failed:
                logs.warning(f"{path}: the statistics could not be written: {error.strerror}")
            self._has_failed = True
            with contextlib.suppress(OSError):
                fresh.unlink()


def _wrap(below: Backend, opening: Opening) -> Backend:
    text = opening.parameters.text(_NAME)
    if text is not None and (not text or not Path(text).parent.is_dir()):
        raise UserError(f"{_NAME}={text}: there is no such directory", opening.parameters.where)
    if text is not None and Path(text).is_dir():
        raise UserError(f"{_NAME}={text}: is a directory, where a file is to be written", opening.parameters.where)
    return Stats(below, opening.name, None if text is None else Path(text))


LAYER: Final = Layer(_wrap, frozenset({_NAME}))
