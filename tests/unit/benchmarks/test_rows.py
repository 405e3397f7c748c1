"""The table as data."""

from __future__ import annotations

import pytest

from benchmarks.main import SECONDS
from benchmarks.rows import PARTS, ROWS, Content, LocalFile, Nbdkit, QemuNbd, Row
from benchmarks.scaling import BY_WORKERS, by_request_size
from nbdshard.common.limits import GIB, MIB, REQUEST_BYTES_DEFAULT


def named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def test_every_row_has_a_name_of_its_own() -> None:
    names = [row.name for row in ROWS]
    assert len({*names, *PARTS}) == len(names) + len(PARTS)


def test_a_full_run_is_not_meant_to_take_longer_than_it_has() -> None:
    assert sum(row.weight for row in ROWS) + sum(PARTS.values()) <= SECONDS


def test_a_quick_run_copies_less_but_what_is_small_stays_as_it_is() -> None:
    assert named("first").size_of(quick=True) == GIB
    assert named("first").size_of(quick=False) == 8 * GIB
    assert named("start").size_of(quick=True) == MIB


@pytest.mark.parametrize(
    ("name", "ends_in_memory", "share"),
    [("first", 0, 1.0), ("memory", 2, 1.0), ("qemu-nbd", 2, 1.0), ("to-file", 1, 1.0), ("fragments", 2, 0.5)],
)
def test_a_row_knows_how_much_memory_its_ends_take(name: str, ends_in_memory: int, share: float) -> None:
    row = named(name)
    assert row.memory_bytes(row.size) == pytest.approx(ends_in_memory * share * row.size + 512 * MIB)


def test_a_sparse_disk_takes_only_the_memory_of_its_data() -> None:
    assert named("sparse").memory_bytes(100 * GIB) < 2 * GIB


def test_only_nbdkit_null_forgets_what_was_written() -> None:
    kept = [end.keeps_data for end in (Nbdkit("null"), Nbdkit("memory"), QemuNbd(), LocalFile(Content.EMPTY))]
    assert kept == [False, True, True, True]


def test_every_worker_of_the_scaling_table_has_a_connection() -> None:
    assert all(connections >= workers for workers, connections, _ in BY_WORKERS)
    assert (1, 1, REQUEST_BYTES_DEFAULT) in BY_WORKERS and (4, 8, REQUEST_BYTES_DEFAULT) in BY_WORKERS


def test_request_sizes_go_from_64_kib_to_4_mib() -> None:
    sizes = [size for _, _, size in by_request_size()]
    assert sizes[0] == 64 << 10 and sizes[-1] == 4 * MIB
