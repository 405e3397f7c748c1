"""Another backend: `python own_backend.py -e numbers raw pattern:1G --unix SOCKET` serves a disk that is nowhere.

Every 8 bytes of it are their own offset. All that `nbdshard serve` can do is there as well: its other drivers, layers
in front of this one, and every option.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Sequence

from nbdshard.cli.extended import serve_extended
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.common.units import parse_size
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import DRIVERS
from nbdshard.server.device import Hole
from nbdshard.server.extensions import Extensions
from nbdshard.server.opening import Opener, Opening


class Pattern:
    """A `Backend` that can only be read. Any thread may call it at any time."""

    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.CAN_MULTI_CONN
    block_size = 4096
    losses = 0  # of what was acknowledged: there is nothing to lose

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        first = where.start & ~7
        numbers = range(first, where.end, 8)
        data = struct.pack(f">{len(numbers)}Q", *numbers)
        return [memoryview(data)[where.start - first : where.end - first]]

    def write(self, where: Range, data: memoryview) -> None:
        raise OSError(errno.EROFS, "numbers cannot be written")  # what the client is told; READ_ONLY keeps it away

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        raise OSError(errno.EROFS, "numbers cannot be zeroed")

    def trim(self, where: Range) -> None:
        raise OSError(errno.EROFS, "numbers cannot be trimmed")

    def cache(self, where: Range) -> None:
        return None

    def flush(self) -> None:
        return None

    def extents(self, where: Range) -> Extents:
        return [(where, 0)]  # data, all of it

    def close(self) -> None:
        return None


def open_pattern(opening: Opening) -> Backend:
    return Pattern(parse_size(opening.place))


if __name__ == "__main__":
    raw = {**DRIVERS["raw"], "pattern": Opener(open_pattern, shared=True)}
    sys.exit(serve_extended(Extensions(drivers={**DRIVERS, "raw": raw})))
