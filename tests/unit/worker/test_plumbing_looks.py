"""worker/plumbing.py: looking at what is in a pipe and leaving it there, taking it out, and throwing it away."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support.descriptors import none_left
from support.images import MIB, random_bytes
from support.pipes import PAGE, Ends, closed_number, fill_up, opened, prepared, taken_out, unix_ends


@pytest.fixture
def unix() -> Iterator[Ends]:
    with prepared(unix_ends()) as one:
        yield one


@pytest.mark.parametrize("length", [1, 4095, 100_000, MIB])
def test_a_look_gives_all_that_is_in_the_pipe_and_leaves_it_there(
    plumbing: SystemPlumbing, pipe: Pipe, unix: Ends, length: int
) -> None:
    data = random_bytes(length)
    fill_up(plumbing, pipe, unix, data)
    for _ in range(3):
        buffer = bytearray(length)
        assert plumbing.peek(pipe, memoryview(buffer)) == length == pipe.held
        assert buffer == data
    assert taken_out(plumbing, pipe) == data


def test_a_look_at_what_was_drained_in_part_gives_the_rest(plumbing: SystemPlumbing, pipe: Pipe, unix: Ends) -> None:
    data = random_bytes(10_000)
    fill_up(plumbing, pipe, unix, data)
    assert plumbing.drain(pipe, unix[0].fileno(), 5000, more=False) == 5000
    buffer = bytearray(5000)
    assert plumbing.peek(pipe, memoryview(buffer)) == 5000
    assert buffer == data[5000:]


def test_a_look_that_sees_only_a_part_gives_the_beginning_and_leaves_all(plumbing: SystemPlumbing, unix: Ends) -> None:
    """What is looked through is as large as the first pipe that was looked at; a larger one does not fit."""
    small, large = opened(plumbing, PAGE), opened(plumbing, MIB)
    fill_up(plumbing, small, unix, b"small")
    assert plumbing.peek(small, memoryview(bytearray(5))) == 5
    data = random_bytes(100_000)
    fill_up(plumbing, large, unix, data)
    for _ in range(3):
        buffer = bytearray(100_000)
        seen = plumbing.peek(large, memoryview(buffer))
        assert 0 < seen < 100_000 == large.held
        assert buffer == data[:seen] + bytes(100_000 - seen)
    assert taken_out(plumbing, large) == data
    again = bytearray(5)
    assert plumbing.peek(small, memoryview(again)) == 5
    assert again == b"small"  # and nothing of the other
    for each in (small, large):
        plumbing.close_pipe(each)


def test_a_look_for_which_there_is_no_pipe_says_so_and_takes_nothing(
    plumbing: SystemPlumbing, pipe: Pipe, unix: Ends
) -> None:
    fill_up(plumbing, pipe, unix, b"payload")
    buffer = bytearray(7)
    with none_left():
        assert plumbing.peek(pipe, memoryview(buffer)) == -errno.EMFILE
    assert plumbing.peek(pipe, memoryview(buffer)) == 7
    assert buffer == b"payload"


def test_a_look_into_a_pipe_that_is_gone_says_so(plumbing: SystemPlumbing, unix: Ends) -> None:
    pipe = opened(plumbing)
    fill_up(plumbing, pipe, unix, b"payload")
    assert plumbing.peek(pipe, memoryview(bytearray(7))) == 7
    plumbing.close_pipe(pipe)
    assert plumbing.peek(pipe, memoryview(bytearray(7))) == -errno.EBADF


def test_bytes_are_taken_out_in_parts(plumbing: SystemPlumbing, pipe: Pipe, unix: Ends) -> None:
    fill_up(plumbing, pipe, unix, b"first second")
    buffer = bytearray(6)
    assert plumbing.read(pipe, memoryview(buffer)) == 6
    assert (bytes(buffer), pipe.held) == (b"first ", 6)
    assert plumbing.read(pipe, memoryview(buffer)) == 6
    assert (bytes(buffer), pipe.held) == (b"second", 0)


@pytest.mark.parametrize("length", [1, 5000, MIB])
def test_what_is_thrown_away_is_gone(plumbing: SystemPlumbing, pipe: Pipe, unix: Ends, length: int) -> None:
    fill_up(plumbing, pipe, unix, bytes(length))
    assert plumbing.discard(pipe) == length
    assert pipe.held == 0
    assert plumbing.read(pipe, memoryview(bytearray(1))) == -errno.EAGAIN
    fill_up(plumbing, pipe, unix, b"next")
    assert taken_out(plumbing, pipe) == b"next"


def test_what_cannot_be_thrown_away_is_still_there(plumbing: SystemPlumbing, pipe: Pipe, unix: Ends) -> None:
    fill_up(plumbing, pipe, unix, b"payload")
    reading, pipe.read_end = pipe.read_end, closed_number()
    assert plumbing.discard(pipe) == -errno.EBADF
    assert pipe.held == 7
    pipe.read_end = reading
    assert plumbing.discard(pipe) == 7


def test_throwing_away_without_a_descriptor_for_it_says_so(plumbing: SystemPlumbing, pipe: Pipe, unix: Ends) -> None:
    fill_up(plumbing, pipe, unix, b"payload")
    with none_left():
        assert plumbing.discard(pipe) == -errno.EMFILE
    assert pipe.held == 7
    assert plumbing.discard(pipe) == 7


def test_closing_twice_is_closing_once_and_what_is_needed_later_is_opened_again(
    plumbing: SystemPlumbing, pipe: Pipe, unix: Ends
) -> None:
    for _ in range(2):
        fill_up(plumbing, pipe, unix, b"payload")
        assert plumbing.peek(pipe, memoryview(bytearray(7))) == 7
        assert plumbing.discard(pipe) == 7
        plumbing.close()
        plumbing.close()
