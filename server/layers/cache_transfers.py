"""What a cache moves between its slots and the layer below: pieces made one, and one made of pieces."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Hole
from nbdshard.server.layers.cache_blocks import Run
from nbdshard.server.layers.cache_slots import Slots


def flat(parts: Sequence[memoryview | bytes | Hole]) -> memoryview | Hole:
    """What was read as one piece."""
    if len(parts) == 1:
        return parts[0] if isinstance(parts[0], Hole) else memoryview(parts[0])
    if all(isinstance(part, Hole) for part in parts):
        return Hole(sum(part.length for part in parts if isinstance(part, Hole)))
    return memoryview(b"".join(bytes(part.length) if isinstance(part, Hole) else part for part in parts))


def write_runs(below: Backend, slots: Slots, runs: Sequence[Run], unit_bytes: int) -> None:
    """Write these of one unit to `below`. Raises what it raises.

    Where that writes whole units anew for each part, as chunks are, they go in one piece, with what is there
    between them. Nobody else changes it meanwhile, because one unit is on its way once.
    """
    if len(runs) == 1 or below.block_size < unit_bytes:
        for run in runs:
            below.write(run.where, _joined(slots, run))
        return
    where = Range(runs[0].where.start, runs[-1].where.end)
    data = bytearray()
    for part in below.read(where):
        data += bytes(part.length) if isinstance(part, Hole) else part
    if len(data) != where.length:
        raise OSError(errno.EIO, "the layer below has read another length")
    for run in runs:
        data[run.where.start - where.start : run.where.end - where.start] = _joined(slots, run)
    below.write(where, memoryview(data))


def _joined(slots: Slots, run: Run) -> memoryview:
    found = [slots.get(*piece) for piece in run.pieces]
    return memoryview(found[0] if len(found) == 1 else b"".join(found))
