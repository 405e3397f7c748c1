"""One request over several chunks, as several that are carried out side by side: for stores where each takes its time.

It is no layer that a user names: the openers of such stores put it in front of the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from threading import Lock
from typing import TypeVar

from nbdshard.common.limits import CHUNKS_WALKED_MAX, OBJECT_READS_AT_ONCE, OBJECT_WRITES_AT_ONCE
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.sharded import parts_first
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing

_Result = TypeVar("_Result")


class Spread(Passing):
    """Cuts requests at multiples of `chunk_bytes`. Reads have threads of their own: no write holds them up."""

    def __init__(self, below: Backend, chunk_bytes: int) -> None:
        super().__init__(below)
        self._chunk_bytes = chunk_bytes
        self._readers = ThreadPoolExecutor(OBJECT_READS_AT_ONCE, "reads")
        self._writers = ThreadPoolExecutor(OBJECT_WRITES_AT_ONCE, "writes")

    @property
    def block_size(self) -> int:
        return self._chunk_bytes

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        found = self._each(self._readers, self.below.read, where)
        return [part for parts in found for part in parts]

    def write(self, where: Range, data: memoryview) -> None:
        def write(part: Range) -> None:
            self.below.write(part, data[part.start - where.start : part.end - where.start])

        self._each(self._writers, write, where)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        def zero(part: Range) -> None:
            self.below.zero(part, may_punch=may_punch, fast=fast)

        for some in parts_first(where, self._chunk_bytes) if fast else (where,):
            self._each(self._writers, zero, some)

    def trim(self, where: Range) -> None:
        self._each(self._writers, self.below.trim, where)

    def extents(self, where: Range) -> Extents:
        """Of few chunks at a time: the driver asks for each, instead of listing all while a client waits."""
        end = (where.start // self._chunk_bytes + CHUNKS_WALKED_MAX) * self._chunk_bytes
        return self.below.extents(Range(where.start, min(where.end, end)))

    def close(self) -> None:
        for pool in (self._readers, self._writers):
            pool.shutdown()
        super().close()

    def _each(self, pool: ThreadPoolExecutor, call: Callable[[Range], _Result], where: Range) -> list[_Result]:
        """What `call` gives for each part, none of which is under way when this is over. Raises what the first raised.

        Parts behind one that failed are not begun, if there are many.
        """
        if where.end <= (where.start // self._chunk_bytes + 1) * self._chunk_bytes:
            return [call(where)]
        found: list[_Result] = []
        parts = where.split(self._chunk_bytes)
        while some := list(islice(parts, CHUNKS_WALKED_MAX)):
            tasks = [_begun(pool, call, part) for part in some]
            for task, run in tasks:
                if run is not None:  # no thread was to be had; one of the pool's may take it up yet, or we do
                    run()
                wait([task])
            found += [task.result() for task, _ in tasks]
        return found


def _begun(
    pool: ThreadPoolExecutor, call: Callable[[Range], _Result], part: Range
) -> tuple[Future[_Result], Callable[[], None] | None]:
    """`call` of `part` as a task of the pool, and what has it done if the system gave the pool no thread for it.

    The pool keeps such a task in its queue: whoever is first carries it out, and nobody a second time.
    """
    task = Future[_Result]()
    taken = Lock()

    def run() -> None:
        if not taken.acquire(blocking=False):
            return
        try:
            task.set_result(call(part))
        except BaseException as error:
            task.set_exception(error)

    try:
        pool.submit(run)
    except RuntimeError:
        return task, run
    return task, None
