"""A server whose first bytes go fast, and the others slowly until a test says so: its copy has a middle for certain."""

from __future__ import annotations

from pathlib import Path

BYTES_PER_SECOND = 2 << 20


class Brake:
    """An nbdkit with the filter `rate` and the parameters `options` reads, and writes, `first_bytes` as fast as it can.

    What is left takes half a second for each MiB, until `release`. The server may be started again.
    """

    def __init__(self, folder: Path, first_bytes: int) -> None:
        self._path = folder / "rate"
        seconds = first_bytes / BYTES_PER_SECOND
        self.options = (f"rate={BYTES_PER_SECOND * 8}", f"burstiness={seconds:g}", f"rate-file={self._path}")

    def release(self) -> None:
        """From the next request on there is no limit."""
        new = self._path.with_suffix(".new")
        new.write_text("1T\n")
        new.rename(self._path)
