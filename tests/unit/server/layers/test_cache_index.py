"""server/layers/cache_index.py: what is packed is unpacked, and nothing that was changed since."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    CACHE_BLOCK_BYTES_MAX,
    CACHE_BLOCK_BYTES_MIN,
    CACHE_DISK_GRAIN_BYTES,
    CACHE_DISK_GRAINS_MAX,
    CACHE_EXPORT_BYTES_MAX,
)
from nbdshard.server.layers.cache_index import (
    HEADER_BYTES,
    RECORD_BYTES_MAX,
    DamagedRecord,
    Header,
    Record,
    pack_header,
    pack_record,
    record_bytes,
    unpack_header,
    unpack_record,
)

GRAINS = 20


def records() -> st.SearchStrategy[Record]:
    whole = st.integers(0, (1 << 64) - 1)
    mask = st.integers(1, (1 << GRAINS) - 1)
    return st.builds(Record, whole, whole, mask, st.binary(min_size=4 * GRAINS, max_size=4 * GRAINS))


@given(records())
def test_a_record_is_what_it_was(record: Record) -> None:
    data = pack_record(record, GRAINS)
    assert len(data) == record_bytes(GRAINS)
    assert unpack_record(data, GRAINS) == record


@given(records(), st.integers(0, 8 * record_bytes(GRAINS) - 1))
def test_a_record_with_another_bit_is_damaged(record: Record, bit: int) -> None:
    data = bytearray(pack_record(record, GRAINS))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedRecord):
        unpack_record(bytes(data), GRAINS)


def test_zeroes_are_no_record() -> None:
    assert unpack_record(pack_record(None, GRAINS), GRAINS) is None


def test_no_record_crosses_a_page() -> None:
    """A process that is killed has written it whole or not at all."""
    block = CACHE_BLOCK_BYTES_MIN
    while block <= CACHE_BLOCK_BYTES_MAX:
        grain = max(CACHE_DISK_GRAIN_BYTES, block // CACHE_DISK_GRAINS_MAX)
        size = record_bytes(block // grain)
        assert size <= RECORD_BYTES_MAX
        assert HEADER_BYTES % size == 0
        block *= 2


@given(st.text(max_size=CACHE_EXPORT_BYTES_MAX // 4), st.integers(1, 1 << 60), st.booleans())
def test_a_header_is_what_it_was(export: str, size: int, closed: bool) -> None:
    header = Header(export, size, 65_536, 4096, 16, "boot", closed)
    data = pack_header(header)
    assert len(data) == HEADER_BYTES
    assert unpack_header(data, "here", "") == header


@given(st.binary(max_size=200))
def test_anything_else_is_refused_in_a_line(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^here: "):
        unpack_header(data, "here", "advice")
