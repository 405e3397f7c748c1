"""How many clients may be connected at a time, to one process or to several that are one server."""

from __future__ import annotations

import os

from nbdshard.common.limits import CONNECTION_DESCRIPTORS, EXPORT_DESCRIPTORS, SERVER_DESCRIPTORS


class Places:
    """So many places: bytes in a pipe, which is the same one in every process that has been forked."""

    def __init__(self, count: int) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.write(self._write, bytes(count))  # at most SERVED_CONNECTIONS_MAX, which every pipe holds

    @property
    def descriptors(self) -> tuple[int, int]:
        """To be kept by a process that is forked."""
        return self._read, self._write

    def close(self) -> None:
        """For a process that goes on when nobody is connected any more."""
        os.close(self._read)
        os.close(self._write)

    def take(self) -> bool:
        """Whether there was a place; then it is taken."""
        try:
            return bool(os.read(self._read, 1))
        except BlockingIOError:
            return False

    def give(self) -> None:
        """A place is free again."""
        os.write(self._write, b"\0")


def places_for(descriptors: int, exports: int) -> int:
    """How many clients so many descriptors of a process are enough for, beside those that the `exports` take."""
    kept = min(SERVER_DESCRIPTORS + exports * EXPORT_DESCRIPTORS, descriptors // 2)
    return max((descriptors - kept) // CONNECTION_DESCRIPTORS, 1)
