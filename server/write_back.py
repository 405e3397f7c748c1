"""What the kernel says of one descriptor's write-backs, and says once only: here it is remembered."""

from __future__ import annotations

import os


class WriteBack:
    """Of the open file `number`, called `name` in errors. Its caller sees to it that one thread at a time syncs."""

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._name = name
        self._lost: OSError | None = None

    @property
    def losses(self) -> int:
        """As `Backend.losses`."""
        return 0 if self._lost is None else 1

    def sync(self) -> None:
        """All that was written is durable. Raises OSError: from the first failure on no sync succeeds."""
        if self._lost is None:
            try:
                os.fdatasync(self._number)
            except OSError as error:
                self._lost = error
        if self._lost is not None:
            raise OSError(self._lost.errno, f"{self._name} failed: {self._lost.strerror}")
