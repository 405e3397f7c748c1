"""worker/shape.py: how a copy is cut, from what both ends and the user say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    KIB,
    MIB,
    REQUEST_BYTES_MAX,
    REQUEST_BYTES_MIN,
    SPARSE_UNIT_MIN,
    SPLICE_BYTES_MIN,
)
from nbdshard.common.messages import EndpointDescription, JobOptions
from nbdshard.common.ranges import Range
from nbdshard.worker.shape import CopyShape, ZeroPolicy

SOURCE = EndpointDescription("nbd://source/", size=MIB, can_extents=True)
DESTINATION = EndpointDescription("nbd://destination/", size=MIB, can_zero=True)
OPTIONS = JobOptions(request_size=MIB, requests=64, queue_size=16 * MIB, sparse_unit=None)


def shape(
    source: dict[str, object] | None = None,
    destination: dict[str, object] | None = None,
    options: dict[str, object] | None = None,
    *,
    splice: bool = False,
) -> CopyShape:
    """The shape between plain ends with plain options, but for what is named."""
    return CopyShape.of(
        msgspec.structs.replace(SOURCE, **(source or {})),
        msgspec.structs.replace(DESTINATION, **(destination or {})),
        msgspec.structs.replace(OPTIONS, **(options or {})),
        splice=splice,
    )


def test_plain_ends_and_options_make_this_shape() -> None:
    assert shape() == CopyShape(
        request_size=MIB,
        request_size_varies=False,
        requests=64,
        attempts=5,
        salvage_unit=0,
        depth=16,
        queue_size=16 * MIB,
        alignment=1,
        sparse_unit=4096,
        hole_min=128 * 1024,
        merge_unit=1,
        zero_policy=ZeroPolicy.REQUEST,
        allocated=False,
        ask_extents=True,
        synchronous=False,
        splice=False,
        checksum=False,
    )
    assert len(CopyShape.__struct_fields__) == 17


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination", "options", "request_size"),
    [
        ({}, {}, {"request_size": 256 * KIB}, 256 * KIB),
        ({"block_maximum": 64 * KIB}, {}, {}, 64 * KIB),
        ({}, {"block_maximum": 64 * KIB}, {}, 64 * KIB),
        ({}, {"block_maximum": 100_000}, {}, 64 * KIB),  # a maximum need not be a power of two
        ({"block_minimum": 64 * KIB}, {}, {"request_size": 4 * KIB}, 64 * KIB),
        ({}, {"block_minimum": 64 * KIB}, {"request_size": 4 * KIB}, 64 * KIB),
    ],
)
def test_a_request_suits_both_ends(
    source: dict[str, object], destination: dict[str, object], options: dict[str, object], request_size: int
) -> None:
    assert shape(source, destination, options).request_size == request_size


def test_ends_that_no_request_suits_are_refused() -> None:
    with pytest.raises(UserError) as raised:
        shape({"block_maximum": 2048}, {"block_minimum": 4096})
    assert str(raised.value) == (
        "nbd://source/ to nbd://destination/: "
        "block sizes do not fit: a request must be at least 4096 and at most 2048 bytes"
    )


def test_the_alignment_is_the_larger_minimum_and_the_merge_unit_the_destinations() -> None:
    assert (shape({"block_minimum": 4096}, {"block_minimum": 512})).alignment == 4096
    assert (shape({"block_minimum": 512}, {"block_minimum": 4096})).alignment == 4096
    assert (shape({"block_minimum": 4096}, {"block_minimum": 512})).merge_unit == 512


def test_only_what_ends_inside_a_block_of_the_destination_is_merged() -> None:
    blocks = shape({}, {"block_minimum": 4096})
    assert not blocks.needs_merge(Range(0, 8192))
    assert blocks.needs_merge(Range(4096, 8191))
    assert not shape().needs_merge(Range(4096, 8191))


@pytest.mark.parametrize(
    ("options", "depth", "queue_size"),
    [
        ({"requests": 4}, 4, 16 * MIB),
        ({"queue_size": 4 * MIB}, 4, 4 * MIB),
        ({"queue_size": 4 * MIB, "request_size": 256 * KIB}, 16, 4 * MIB),
        ({"queue_size": 0}, 1, MIB),  # one request always fits
        ({"queue_size": 1000}, 1, MIB),
        ({"synchronous": True}, 1, 16 * MIB),
    ],
)
def test_no_more_is_under_way_than_the_queue_holds(options: dict[str, object], depth: int, queue_size: int) -> None:
    found = shape(options=options)
    assert (found.depth, found.queue_size) == (depth, queue_size)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_stream_on_either_side_makes_a_copy_synchronous(side: str) -> None:
    found = shape(**{side: {"is_stream": True, "size": None}})
    assert (found.synchronous, found.depth) == (True, 1)


# -- splicing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "splices"),
    [
        ({}, {}, True),
        ({"block_maximum": SPLICE_BYTES_MIN}, {}, True),
        ({"block_maximum": SPLICE_BYTES_MIN // 2}, {}, False),  # no request is long enough to be worth it
        ({}, {"request_size": SPLICE_BYTES_MIN // 2}, False),
        ({}, {"synchronous": True}, False),
        ({"is_stream": True, "size": None}, {}, False),
    ],
)
def test_a_copy_is_spliced_where_its_requests_are_long_and_many(
    source: dict[str, object], options: dict[str, object], splices: bool
) -> None:
    assert shape(source, options=options, splice=True).splice is splices
    assert not shape(source, options=options, splice=False).splice


def test_only_a_long_piece_that_stays_as_it_is_may_be_spliced() -> None:
    blocks = shape({}, {"block_minimum": 4096}, splice=True)
    assert blocks.may_splice(Range.of(MIB, MIB))
    assert blocks.may_splice(Range.of(MIB, SPLICE_BYTES_MIN))
    assert not blocks.may_splice(Range.of(MIB, SPLICE_BYTES_MIN - 4096))
    assert not blocks.may_splice(Range.of(MIB, SPLICE_BYTES_MIN + 1))  # the end of its last block is merged into it
    assert not shape({}, {"block_minimum": 4096}, splice=False).may_splice(Range.of(MIB, MIB))


# -- zeroes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("destination", "options", "policy"),
    [
        ({}, {}, ZeroPolicy.REQUEST),
        ({"can_zero": False}, {}, ZeroPolicy.FILL),
        ({}, {"destination_is_zero": True}, ZeroPolicy.SKIP),
        ({"can_zero": False}, {"destination_is_zero": True}, ZeroPolicy.SKIP),
        # zeroes that must be allocated cannot be skipped
        ({}, {"destination_is_zero": True, "allocated": True}, ZeroPolicy.REQUEST),
        ({"can_zero": False}, {"destination_is_zero": True, "allocated": True}, ZeroPolicy.FILL),
    ],
)
def test_what_becomes_of_zeroes(destination: dict[str, object], options: dict[str, object], policy: ZeroPolicy) -> None:
    assert shape(destination=destination, options=options).zero_policy is policy


@pytest.mark.parametrize(
    ("source", "destination", "options", "unit"),
    [
        ({}, {}, {}, 4096),
        ({}, {"block_preferred": 65536}, {}, 65536),
        ({}, {"block_preferred": 512}, {}, 4096),
        ({}, {"block_preferred": 0}, {}, 4096),
        ({}, {}, {"sparse_unit": 512}, 512),
        ({}, {"block_preferred": 65536}, {"sparse_unit": 512}, 512),  # the user's word
        ({"block_minimum": 4096}, {}, {"sparse_unit": 512}, 4096),  # a zero must be asked for whole blocks
        ({}, {}, {"sparse_unit": 8 * MIB}, MIB),  # no more than there is in a buffer
        ({}, {}, {"sparse_unit": 0}, 0),
        ({}, {}, {"allocated": True}, 0),
        ({}, {"can_zero": False}, {}, 0),  # found zeroes would only be written as data again
        ({}, {"can_zero": False}, {"destination_is_zero": True}, 4096),
    ],
)
def test_the_unit_of_zero_detection(
    source: dict[str, object], destination: dict[str, object], options: dict[str, object], unit: int
) -> None:
    assert shape(source, destination, options).sparse_unit == unit


@pytest.mark.parametrize(
    ("source", "options", "asks"),
    [({}, {}, True), ({"can_extents": False}, {}, False), ({}, {"extents": False}, False)],
)
def test_extents_are_asked_where_there_are_any_and_the_user_wants_them(
    source: dict[str, object], options: dict[str, object], asks: bool
) -> None:
    assert shape(source, options=options).ask_extents is asks


# -- whatever the ends say --------------------------------------------------------------------------------------------

powers = st.sampled_from([1 << n for n in range(17)])  # minimum block sizes: the spec's limit is 64 KiB
ends = st.fixed_dictionaries(
    {"block_minimum": powers, "block_maximum": st.integers(1, 1 << 32), "block_preferred": st.integers(0, 1 << 26)}
)


@given(
    ends,
    ends,
    st.fixed_dictionaries(
        {
            "request_size": st.sampled_from(
                [n for n in (1 << k for k in range(26)) if REQUEST_BYTES_MIN <= n <= REQUEST_BYTES_MAX]
            ),
            "requests": st.integers(1, 1024),
            "queue_size": st.integers(0, 1 << 30),
            "sparse_unit": st.none() | st.just(0) | st.sampled_from([SPARSE_UNIT_MIN << k for k in range(16)]),
        }
    ),
)
def test_every_shape_keeps_within_its_bounds(
    source: dict[str, object], destination: dict[str, object], options: dict[str, object]
) -> None:
    try:
        found = shape(source, destination, options)
    except UserError:
        least = max(source["block_minimum"], destination["block_minimum"])  # type: ignore[call-overload]
        assert min(source["block_maximum"], destination["block_maximum"]) < least  # type: ignore[call-overload]
        return
    for end in (source, destination):
        assert found.request_size % end["block_minimum"] == 0  # type: ignore[operator]
        assert found.request_size <= end["block_maximum"]  # type: ignore[operator]
        assert found.alignment % end["block_minimum"] == 0  # type: ignore[operator]
    assert found.request_size & (found.request_size - 1) == 0
    assert 1 <= found.depth <= options["requests"]  # type: ignore[operator]
    assert found.depth == 1 or found.depth * found.request_size <= options["queue_size"]  # type: ignore[operator]
    if found.sparse_unit:
        assert found.request_size % found.sparse_unit == 0
        assert found.sparse_unit % found.alignment == 0
