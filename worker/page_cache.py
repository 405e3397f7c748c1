"""Keeping a copy of local files from driving everything else out of the page cache.

Pages that were only filled for this copy are given up again, window by window, behind the transfers; what the user had
cached before stays. All of it is hints to the kernel: none may fail a copy, and few may be under way at once, so that
requests do not wait behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from nbdshard.common.file_calls import cached_bytes, drop_pages, read_by_pages, start_write_back
from nbdshard.common.limits import (
    CACHE_HINTS_MAX,
    CACHE_LOOK_AHEAD_BYTES,
    CACHE_RUNS_MAX,
    CACHE_WINDOW_BYTES,
    CACHE_WINDOWS_BEHIND,
    PAGES_TOGETHER_BYTES,
)
from nbdshard.common.ranges import Range, RangeSet

Batch = list[Range]
Hint = Callable[[], None]


class PageCache:
    """The pages one connection has touched of the file with descriptor `number`, and has not yet let go.

    `call(function, then)` runs a function on another thread, and `then` back on ours.
    """

    def __init__(self, number: int, call: Callable[[Hint, Callable[[object], None]], None]) -> None:
        self._number = number
        self._call = call
        self._looked = RangeSet()  # whole windows
        self._cold = RangeSet()  # those of them that were not cached before we came
        self._read = RangeSet()
        self._written = RangeSet()
        self._writing: deque[Batch] = deque()  # given to write-back, oldest first
        self._hints = 0

    @property
    def busy(self) -> bool:
        """A hint is under way."""
        return self._hints > 0

    # -- reading -------------------------------------------------------------------------------------------------------

    def before_read(self, where: Range) -> None:
        """Look, once at each window, whether it is cached before we come: microseconds, without blocking.

        That is to say before the kernel's readahead comes, which runs ahead of us by megabytes.
        """
        start = where.start - where.start % CACHE_WINDOW_BYTES
        end = where.end + CACHE_LOOK_AHEAD_BYTES
        ahead = Range(start, end + -end % CACHE_WINDOW_BYTES)
        if ahead in self._looked:
            return
        for gap in list(self._looked.gaps(ahead)):
            for window in gap.split(CACHE_WINDOW_BYTES):
                if self._is_cold(window):
                    self._cold.add(window)
        self._looked.add(ahead)
        for known in (self._looked, self._cold):
            if len(known) > CACHE_RUNS_MAX:
                known.pop_first()

    def _is_cold(self, window: Range) -> bool:
        """Less than half of it is there: a neighbour's readahead may have filled some. Also if nobody can tell."""
        try:
            return cached_bytes(self._number, window) < window.length // 2
        except OSError:
            return True

    def after_read(self, where: Range) -> None:
        """`where` was read: let a window's worth go when there is one."""
        for piece in where.split(CACHE_WINDOW_BYTES):
            if piece in self._cold:
                self._read.add(piece)
        if self._is_batch(self._read):
            self._drop(self._read)
            self._read = RangeSet()

    def after_failure(self, where: Range) -> None:
        """The kernel fails the pages of its cache that it reads together: with one bad one up to PAGES_TOGETHER_BYTES.

        So let it forget those, and from now on read no more than what is asked for.
        """
        unit = PAGES_TOGETHER_BYTES
        _each(read_by_pages, self._number, [Range(where.start - where.start % unit, where.end + -where.end % unit)])

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
        self._drop([_WHOLE])

    # -- both ----------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The connection ends: let go what is left of what we read, and what readahead left behind us."""
        if len(self._cold):
            self._drop(self._cold)
            self._cold = RangeSet()

    def _drop(self, ranges: Iterable[Range]) -> None:
        batch = list(ranges)
        self._hint(lambda: _each(drop_pages, self._number, batch))

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
