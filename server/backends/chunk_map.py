"""Which chunks of an image are there: a bit for each, in pages, and no page where there are none. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort

from nbdshard.common.limits import CHUNKS_PAGE


class ChunkMap:
    """A set of chunk numbers that takes a bit for each number near one that is in it. Not for several threads."""

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}  # bits, by the page's number
        self._order: list[int] = []  # those numbers, sorted

    def __contains__(self, number: int) -> bool:
        page, bit = divmod(number, CHUNKS_PAGE)
        return bool(self._pages.get(page, 0) >> bit & 1)

    def add(self, number: int) -> None:
        page, bit = divmod(number, CHUNKS_PAGE)
        if page not in self._pages:
            self._pages[page] = 0
            insort(self._order, page)
        self._pages[page] |= 1 << bit

    def discard(self, number: int) -> None:
        page, bit = divmod(number, CHUNKS_PAGE)
        left = self._pages.get(page, 0) & ~(1 << bit)
        if left:
            self._pages[page] = left
        elif self._pages.pop(page, None) is not None:
            del self._order[bisect_left(self._order, page)]

    def next(self, first: int, end: int) -> int | None:
        """The lowest number from `first` on and below `end`; None where there is none."""
        page, bit = divmod(first, CHUNKS_PAGE)
        for at in range(bisect_left(self._order, page), len(self._order)):
            found = self._order[at]
            bits = self._pages[found]
            if found == page:
                bits = bits >> bit << bit
            if bits:
                number = found * CHUNKS_PAGE + (bits & -bits).bit_length() - 1
                return number if number < end else None
        return None
