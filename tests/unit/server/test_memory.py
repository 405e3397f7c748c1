"""An export in memory: what is not there costs nothing, however large it is."""

from __future__ import annotations

import random
from itertools import pairwise

from nbdshard.common.limits import EXTENTS_TOLD_MAX, GIB, MIB
from nbdshard.common.nbd.constants import EXPORT_BYTES_MAX
from nbdshard.common.ranges import Range
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.device import Hole

PAGE = 65_536
HOLE = 3


def content(backend: MemoryBackend, where: Range) -> bytes:
    return b"".join(bytes(part.length) if isinstance(part, Hole) else bytes(part) for part in backend.read(where))


def test_requests_of_exabytes_look_only_at_what_is_there() -> None:
    backend = MemoryBackend(EXPORT_BYTES_MAX)
    whole, far = Range(0, EXPORT_BYTES_MAX), 1 << 60
    backend.write(Range.of(far, 10), memoryview(b"x" * 10))
    assert backend.extents(whole) == [
        (Range(0, far), HOLE),
        (Range(far, far + PAGE), 0),
        (Range(far + PAGE, EXPORT_BYTES_MAX), HOLE),
    ]
    backend.zero(whole, may_punch=False, fast=True)
    assert content(backend, Range.of(far, 10)) == bytes(10)
    assert len(backend.extents(whole)) == 3  # its room is kept
    backend.trim(whole)
    assert backend.extents(whole) == [(whole, HOLE)]


def test_no_more_extents_than_are_told_are_looked_for() -> None:
    backend = MemoryBackend(2 * GIB)
    for page in range(0, 2 * EXTENTS_TOLD_MAX, 2):
        backend.write(Range.of(page * PAGE, 1), memoryview(b"x"))
    found = backend.extents(Range(0, 2 * GIB))
    assert found[0] == (Range(0, PAGE), 0)
    assert EXTENTS_TOLD_MAX // 2 < len(found) <= EXTENTS_TOLD_MAX + 1
    assert all(before.end == after.start for (before, _), (after, _) in pairwise(found))


def test_a_long_run_of_data_is_told_as_far_as_was_looked() -> None:
    backend = MemoryBackend(GIB)
    for page in range(5000):
        backend.write(Range.of(page * PAGE, 1), memoryview(b"x"))
    ((found, flags),) = backend.extents(Range(10, GIB))
    assert flags == 0
    assert found.start == 10
    assert PAGE < found.end <= 5000 * PAGE


def test_random_requests_leave_what_a_reference_holds() -> None:
    chance = random.Random(4)
    backend, reference = MemoryBackend(MIB), bytearray(MIB)
    for _ in range(300):
        start = chance.randrange(MIB - 1)
        where = Range(start, chance.randrange(start + 1, MIB))
        match chance.choice(["write", "zero", "trim", "extents"]):
            case "write":
                data = chance.randbytes(where.length)
                assert backend.write_now(where, memoryview(data))
                reference[where.start : where.end] = data
            case "zero" | "trim":
                backend.zero(where, may_punch=chance.random() < 0.5, fast=True)
                reference[where.start : where.end] = bytes(where.length)
            case _:
                found = backend.extents(where)
                assert (found[0][0].start, found[-1][0].end) == (where.start, where.end)
                for each, flags in found:
                    assert not flags or not any(reference[each.start : each.end])
        assert content(backend, where) == reference[where.start : where.end]


def test_extents_end_where_the_request_does_in_the_middle_of_a_page() -> None:
    backend = MemoryBackend(GIB)
    backend.write(Range(0, 100), memoryview(b"x" * 100))
    assert backend.extents(Range(10, 90)) == [(Range(10, 90), 0)]
