"""Where a file has data and where holes. Blocking calls: for a thread."""

from __future__ import annotations

import errno
import os

from nbdshard.common.limits import FILE_EXTENTS_MAX
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range


class FileMap:
    """Of one open file. Raises OSError as lseek(2) does.

    SEEK_HOLE looks for the end of the data, however far it is behind what was asked about: in a tmpfs page by page,
    which took a quarter of a copy's CPU when each range asked anew. So the last end that was found is remembered. Where
    there is a hole meanwhile, what is read as data is zeroes; of holes nothing is remembered, for they may be written.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._data = (0, 0)  # the run of data that was found last; one tuple, for there may be two threads

    def find(self, where: Range) -> Extents:
        """Data and holes of `where`, from its start on, FILE_EXTENTS_MAX at most.

        Past the end of a file that became shorter there is no hole but data: the read that follows will say what is
        wrong.
        """
        found: Extents = []
        at, end = where.start, min(where.end, os.fstat(self._number).st_size)
        while at < end and len(found) < FILE_EXTENTS_MAX:
            data, hole = self._next_data(at, end)
            if at < data:
                found.append((Range(at, data), STATE_HOLE | STATE_ZERO))
            if data < end:
                at = min(hole, end)
                found.append((Range(data, at), 0))
            else:
                at = end
        if at == end < where.end or not found:
            found.append((Range(max(end, where.start), where.end), 0))
        return found

    def _next_data(self, at: int, end: int) -> tuple[int, int]:
        """Where the next data begins, `end` at most, and where it ends."""
        start, hole = self._data
        if start <= at < hole:
            return at, hole
        try:
            data = os.lseek(self._number, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # lseek(2): no data between here and the end
                return end, end
            raise
        if data >= end:
            return end, end
        hole = max(os.lseek(self._number, data, os.SEEK_HOLE), data + 1)  # even if the file changes under us
        self._data = (data, hole)
        return data, hole
