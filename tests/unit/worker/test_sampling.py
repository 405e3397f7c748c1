"""Samples of what is in a pipe: which bytes they are, that all stays where it was, and when they prove density."""

from __future__ import annotations

import fcntl
import os

import pytest

from nbdshard.worker.piped import PipedPayload
from nbdshard.worker.pipes import SAMPLE_BYTES, SAMPLES_MAX, Pipe
from nbdshard.worker.plumbing import SAMPLE_OFFSET, SystemPlumbing
from support.descriptors import none_left
from support.images import KIB, MIB, pattern, random_bytes
from support.pipes import fill_up, prepared, taken_out, unix_ends


def put(plumbing: SystemPlumbing, pipe: Pipe, data: bytes) -> PipedPayload:
    """A payload with `data` in its pipe, as a socket brought it."""
    payload = PipedPayload(len(data), pipe, plumbing)
    payload.begin(0, len(data))
    with prepared(unix_ends()) as ends:
        fill_up(plumbing, pipe, ends, data)
    payload.advance(len(data))
    return payload


@pytest.mark.parametrize(("unit", "length"), [(512, 64 * KIB), (4 * KIB, MIB), (64 * KIB, MIB), (MIB, MIB)])
def test_samples_are_taken_from_inside_every_unit_and_nothing_moves(
    plumbing: SystemPlumbing, pipe: Pipe, unit: int, length: int
) -> None:
    data = random_bytes(length)
    put(plumbing, pipe, data)
    wanted = b"".join(data[at + SAMPLE_OFFSET :][:SAMPLE_BYTES] for at in range(0, length, unit))
    for _ in range(2):
        assert plumbing.sample(pipe, unit) == wanted
    assert taken_out(plumbing, pipe) == data


def test_samples_follow_the_payload_when_its_length_or_unit_changes(plumbing: SystemPlumbing, pipe: Pipe) -> None:
    for length, unit in ((128 * KIB, 4 * KIB), (64 * KIB, 4 * KIB), (64 * KIB, 8 * KIB)):
        data = random_bytes(length, seed=length + unit)
        put(plumbing, pipe, data)
        assert len(plumbing.sample(pipe, unit)) == length // unit * SAMPLE_BYTES
        assert taken_out(plumbing, pipe) == data


def test_there_are_no_samples_where_a_copy_could_not_be_had_whole(plumbing: SystemPlumbing, pipe: Pipe) -> None:
    first = put(plumbing, pipe, random_bytes(8 * KIB))
    assert plumbing.sample(pipe, 4 * KIB) != b""
    look = plumbing._look
    assert look is not None
    fcntl.fcntl(look.write_end, fcntl.F_SETPIPE_SZ, 4 * KIB)
    data = taken_out(plumbing, first.pipe) + random_bytes(MIB - 8 * KIB)
    payload = put(plumbing, pipe, data)
    assert plumbing.sample(pipe, 4 * KIB) == b""
    assert not payload.seems_dense(4 * KIB)
    assert look.held == 0
    assert taken_out(plumbing, pipe) == data


def test_a_copy_that_could_not_be_thrown_away_is_never_taken_for_the_next(plumbing: SystemPlumbing, pipe: Pipe) -> None:
    put(plumbing, pipe, random_bytes(8 * KIB))
    assert plumbing.sample(pipe, 4 * KIB) != b""
    look = plumbing._look
    assert look is not None
    fcntl.fcntl(look.write_end, fcntl.F_SETPIPE_SZ, 4 * KIB)
    taken_out(plumbing, pipe)
    put(plumbing, pipe, random_bytes(MIB))
    os.close(plumbing._null)
    plumbing._null = -1
    with none_left():
        assert plumbing.sample(pipe, 4 * KIB) == b""
    assert look.held > 0
    taken_out(plumbing, pipe)
    data = random_bytes(64 * KIB, seed=2)
    put(plumbing, pipe, data)
    buffer = bytearray(64 * KIB)
    assert plumbing.peek(pipe, memoryview(buffer)) == 64 * KIB
    assert buffer == data


def test_dense_data_seems_dense(plumbing: SystemPlumbing, pipe: Pipe) -> None:
    for data in (random_bytes(MIB), pattern(1 << 32, MIB), b"\1" * MIB):
        assert put(plumbing, pipe, data).seems_dense(4 * KIB)
        assert taken_out(plumbing, pipe) == data


@pytest.mark.parametrize("block", [0, 7, 255])
def test_one_zero_block_is_enough_to_be_looked_at_whole(plumbing: SystemPlumbing, pipe: Pipe, block: int) -> None:
    data = bytearray(random_bytes(MIB))
    data[block * 4 * KIB : (block + 1) * 4 * KIB] = bytes(4 * KIB)
    assert not put(plumbing, pipe, bytes(data)).seems_dense(4 * KIB)


@pytest.mark.parametrize(("length", "unit"), [(MIB - 1, 4 * KIB), (MIB, 512)])
def test_what_has_a_rest_or_too_many_units_is_looked_at_whole(
    plumbing: SystemPlumbing, pipe: Pipe, length: int, unit: int
) -> None:
    assert length % unit or length // unit > SAMPLES_MAX
    assert not put(plumbing, pipe, random_bytes(length)).seems_dense(unit)


def test_what_is_partly_in_memory_is_looked_at_whole(plumbing: SystemPlumbing, pipe: Pipe) -> None:
    payload = PipedPayload(8 * KIB, pipe, plumbing)
    payload.begin(0, 8 * KIB)
    payload.take(memoryview(random_bytes(4 * KIB)))
    with prepared(unix_ends()) as ends:
        fill_up(plumbing, pipe, ends, random_bytes(4 * KIB))
    payload.advance(4 * KIB)
    assert not payload.seems_dense(4 * KIB)
