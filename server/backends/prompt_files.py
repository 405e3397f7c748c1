"""Which parts of files can be read without waiting for a disk, and reading them so."""

from __future__ import annotations

import errno
import os

from nbdshard.common.file_calls import is_at_hand, is_in_memory
from nbdshard.common.ranges import Range


class PromptFiles:
    """Of the file system that the file or directory `number` is in."""

    def __init__(self, number: int) -> None:
        self._is_in_memory = is_in_memory(number)
        self._can_ask = not self._is_in_memory  # the file system can read what is at hand, and nothing else

    def is_ready(self, number: int, where: Range) -> bool:
        """Whether `where` of the open file `number` is read without waiting."""
        return self._is_in_memory or is_at_hand(number, where)

    def read(self, number: int, where: Range) -> memoryview | None:
        """What is there; None where it would have to be waited for, or the file ends before."""
        flags = 0
        if not self._is_in_memory:
            if not self._can_ask and not is_at_hand(number, where):
                return None
            flags = os.RWF_NOWAIT if self._can_ask else 0
        view = memoryview(bytearray(where.length))
        try:
            if os.preadv(number, [view], where.start, flags) == where.length:
                return view
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._can_ask = False
        return None
