"""What becomes of what the source cannot read, where the rest of the disk is wanted all the same. Pure.

::

    |          a read that failed `attempts` times           |
    |        good: copied        |            bad            |     halves are read once each
                                 |    bad      |     good    |     ...
                                 | bad  | good |                    down to the unit; that is tried `attempts` times,
                                  zeroes                            and only then given up

So one bad block costs two reads for each halving, and its neighbours are not lost with it.
"""

from __future__ import annotations

from typing import Final

from nbdshard.common.errors import RequestError
from nbdshard.common.limits import UNREADABLE_PER_LEASE_MAX
from nbdshard.common.ranges import Range
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.operation import Operation
from nbdshard.worker.shape import CopyShape

# A server has EIO for all of these. Disks and file systems tell more: a medium error (ENODATA), protection data that
# does not match (EILSEQ), checksums that do not (EBADMSG, EUCLEAN), the other end's own trouble (EREMOTEIO).
_UNREADABLE: Final = frozenset({"EIO", "ENODATA", "EILSEQ", "EBADMSG", "EUCLEAN", "EREMOTEIO"})


class Salvage:
    """Decides, for one copier, how often a read is tried, and what then."""

    def __init__(self, shape: CopyShape) -> None:
        self._unit = shape.salvage_unit
        self._attempts = shape.attempts

    def attempts(self, operation: Operation, error: RequestError) -> int:
        """How often the read is tried that failed with `error` just now: a part that can be cut further, once."""
        is_cut = operation.is_suspect and self.applies(error) and self._middle(operation.where) is not None
        return 1 if is_cut else self._attempts

    def applies(self, error: RequestError) -> bool:
        """Whether a read that failed so for the last time is no reason to fail the copy."""
        return self._unit > 0 and error.errno_name in _UNREADABLE

    def cut(self, operation: Operation) -> bool:
        """Leave the read to its halves; False where it is too short to be cut."""
        where = operation.where
        middle = self._middle(where)
        if middle is None:
            return False
        operation.lease.suspects += [Range(middle, where.end), Range(where.start, middle)]
        return True

    def _middle(self, where: Range) -> int | None:
        unit = self._unit
        middle = (where.start + where.end) // 2
        middle -= middle % unit
        if middle <= where.start:
            middle = where.start - where.start % unit + unit
        return middle if middle < where.end else None


def give_up(operation: Operation) -> None:
    """What the operation should have read is lost: its buffer has zeroes instead, which go the way of all data."""
    where = operation.where
    assert operation.buffer is not None
    operation.lease.unreadable.add(where)
    memoryview(operation.buffer)[: where.length] = bytes(where.length)


def places(lease: LeaseWork) -> tuple[Range, ...]:
    """Where `lease` has zeroes for what could not be read, as they are reported."""
    return lease.unreadable.coarse(UNREADABLE_PER_LEASE_MAX)
