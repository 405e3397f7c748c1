"""Keeping a copy of local files from driving everything else out of the page cache.

Pages that were only filled for this copy are given up again, window by window, behind the transfers; what the user had
cached before stays. All of it is hints to the kernel: none may fail a copy, and few may be under way, so that requests
never wait behind them. It costs nothing measurable (docs/benchmarks.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nbdshard.common.limits import (
    CACHE_HINTS_MAX,
    CACHE_RUNS_MAX,
    CACHE_WINDOW_BYTES,
    CACHE_WINDOWS_BEHIND,
    CACHE_WINDOWS_MAX,
)
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.worker.file_calls import cached_bytes, drop_pages, start_write_back

Batch = list[Range]
Hint = Callable[[], None]


class PageCache:
    """The pages one connection has touched of the file with descriptor `number`, and has not yet let go.

    `call(function, then)` runs a function on another thread, and `then` back on ours.
    """

    def __init__(self, number: int, call: Callable[[Hint, Callable[[object], None]], None]) -> None:
        self._number = number
        self._call = call
        self._ours: dict[int, bool] = {}  # windows looked at lately: whether we are the first to fill them
        self._read = RangeSet()
        self._written = RangeSet()
        self._writing: deque[Batch] = deque()  # given to write-back, oldest first
        self._hints = 0

    # -- reading -------------------------------------------------------------------------------------------------------

    def before_read(self, where: Range) -> None:
        """Look, once for each window, whether it was cached before we came. Costs microseconds, does not block."""
        for index in range(where.start // CACHE_WINDOW_BYTES, (where.end - 1) // CACHE_WINDOW_BYTES + 1):
            if index not in self._ours:
                if len(self._ours) >= CACHE_WINDOWS_MAX:
                    del self._ours[next(iter(self._ours))]
                self._ours[index] = self._is_cold(Range.of(index * CACHE_WINDOW_BYTES, CACHE_WINDOW_BYTES))

    def _is_cold(self, window: Range) -> bool:
        """Less than half is there: readahead from the window before fills some of it."""
        try:
            return cached_bytes(self._number, window) < window.length // 2
        except OSError:
            return True

    def after_read(self, where: Range) -> None:
        """`where` was read: when a window's worth was, let it go."""
        for piece in where.split(CACHE_WINDOW_BYTES):
            if self._ours.get(piece.start // CACHE_WINDOW_BYTES, False):
                self._read.add(piece)
        if self._is_batch(self._read):
            batch, self._read = list(self._read), RangeSet()
            self._hint(lambda: _each(drop_pages, self._number, batch))

    # -- writing -------------------------------------------------------------------------------------------------------

    def after_write(self, where: Range) -> None:
        """`where` was written: begin its write-back when it is a window's worth, and let earlier windows go.

        Write-back begins early, so that dirty pages do not pile up until the kernel stops every writer.
        """
        self._written.add(where)
        if not self._is_batch(self._written):
            return
        batch, self._written = list(self._written), RangeSet()
        self._writing.append(batch)
        clean = self._writing.popleft() if len(self._writing) > CACHE_WINDOWS_BEHIND else []

        def write_back() -> None:
            _each(start_write_back, self._number, batch)
            _each(drop_pages, self._number, clean)

        self._hint(write_back)

    def after_sync(self) -> None:
        """Everything written is on the disk: whatever is left of it can go."""
        self._writing.clear()
        self._written = RangeSet()
        self._hint(lambda: _each(drop_pages, self._number, [_WHOLE]))

    # -- both ----------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The connection ends: let the last pages read go, less than a window."""
        _each(drop_pages, self._number, list(self._read))

    def _is_batch(self, touched: RangeSet) -> bool:
        if self._hints >= CACHE_HINTS_MAX:
            if len(touched) > CACHE_RUNS_MAX:  # the disk is behind by far: these stay in the cache
                touched.pop_first()
            return False
        return touched.total >= CACHE_WINDOW_BYTES or len(touched) >= CACHE_RUNS_MAX

    def _hint(self, function: Hint) -> None:
        def over(_: object) -> None:
            self._hints -= 1

        self._hints += 1
        self._call(function, over)


_WHOLE = Range(0, (1 << 63) - 1)


def _each(hint: Callable[[int, Range], None], number: int, batch: Batch) -> None:
    """Give one hint for every range of `batch`. A kernel or file system that takes no such hint is no matter."""
    for where in batch:
        try:
            hint(number, where)
        except OSError:
            return
