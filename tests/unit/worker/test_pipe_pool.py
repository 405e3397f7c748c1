"""worker/piped.py's pool on real pipes: how many there are, what is in one that is used again, and what limits them."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator

import pytest

from nbdshard.common.limits import PIPES_MAX
from nbdshard.worker.piped import PipedPayload, PipePool
from nbdshard.worker.pipes import Pipe
from support.images import KIB, random_bytes
from support.listening import receive_exactly
from support.piped import Counted, data, world

CONTENT = random_bytes(10_000)


@pytest.fixture
def counted() -> Iterator[Counted]:
    plumbing = Counted()
    yield plumbing
    assert plumbing.pipes == []
    assert plumbing.attempts < 1000


def taken(pool: PipePool, length: int = 1) -> PipedPayload:
    payload = pool.take(length)
    assert payload is not None
    return payload


def test_a_pipe_is_opened_when_it_is_first_needed(counted: Counted) -> None:
    pool = PipePool(counted, 64 * KIB)
    pool.grow(3)
    assert counted.pipes == []
    payload = taken(pool, 1000)
    assert (len(payload), payload.pieces) == (1000, [])
    (pipe,) = counted.pipes
    assert pipe is payload.pipe
    assert fcntl.fcntl(pipe.read_end, fcntl.F_GETPIPE_SZ) == 64 * KIB
    pool.close()


def test_the_pipe_given_back_last_is_used_next(counted: Counted) -> None:
    pool = PipePool(counted, 64 * KIB)
    pool.grow(3)
    first, second, third = taken(pool), taken(pool), taken(pool)
    for payload in (second, first, third):
        pool.give(payload)
    assert [taken(pool).pipe for _ in range(3)] == [third.pipe, first.pipe, second.pipe]
    assert counted.attempts == 3
    pool.close()


def test_there_are_no_more_pipes_than_were_allowed(counted: Counted) -> None:
    pool = PipePool(counted, 64 * KIB)
    assert pool.take(1) is None
    pool.grow(1)
    payload = taken(pool)
    assert pool.take(1) is None
    pool.give(payload)
    taken(pool)
    pool.grow(1)
    taken(pool)
    assert pool.take(1) is None
    assert pool.limited == ""  # that is all that was wanted
    pool.close()


def test_there_are_never_more_pipes_than_pipes_max(counted: Counted) -> None:
    pool = PipePool(counted, 4 * KIB)
    for _ in range(5):
        pool.grow(PIPES_MAX // 2)
    for _ in range(PIPES_MAX):
        taken(pool)
    assert pool.take(1) is None
    assert len(counted.pipes) == PIPES_MAX
    pool.close()


@pytest.mark.parametrize("drained", [0, 1, 4000, 10_000])
def test_nothing_is_left_in_a_pipe_that_is_used_again(drained: int) -> None:
    with world() as one:
        payload = one.filled(10_000, data(0, CONTENT[:10_000], done=True))
        one.plumbing.drain(payload.pipe, one.target.ours.fileno(), drained, more=False)
        assert receive_exactly(one.target.theirs, drained) == CONTENT[:drained]
        one.pool.give(payload)
        again = one.begin(100)
        assert again.pipe is payload.pipe
        assert again.pipe.held == 0
        assert one.plumbing.read(again.pipe, memoryview(bytearray(1))) == -errno.EAGAIN
        one.source.come(one.client, data(0, CONTENT[-100:], done=True))
        assert one.left(again) == CONTENT[-100:]


class Stuck(Counted):
    """Cannot throw away what is in a pipe."""

    def discard(self, pipe: Pipe) -> int:
        return -errno.EMFILE


def test_a_pipe_that_cannot_be_emptied_is_closed_and_another_one_opened() -> None:
    plumbing = Stuck()
    with world(plumbing=plumbing) as one:
        for number in range(6):  # more than there may be at a time
            payload = one.filled(100, data(0, CONTENT[:100], done=True))
            assert plumbing.attempts == number + 1
            one.pool.give(payload)
            assert plumbing.pipes == []
    assert plumbing.pipes == []


def test_a_pool_that_can_open_no_more_pipes_says_why_and_goes_on_with_those_it_has() -> None:
    plumbing = Counted(open_max=2)
    pool = PipePool(plumbing, 64 * KIB)
    pool.grow(4)
    payloads = [taken(pool), taken(pool)]
    for _ in range(3):
        assert pool.take(1) is None
    assert pool.limited == "no more than 2 pipes can be opened"
    pool.grow(4)
    assert pool.take(1) is None
    assert plumbing.attempts == 3  # it is not asked again and again
    pool.give(payloads[0])
    assert taken(pool).pipe is payloads[0].pipe
    pool.close()
    assert plumbing.pipes == []


def test_a_pool_whose_next_pipe_is_too_small_says_so_and_leaves_it_alone() -> None:
    plumbing = Counted(open_max=1, refusal=8 * KIB)
    pool = PipePool(plumbing, 64 * KIB)
    pool.grow(4)
    taken(pool)
    assert pool.take(1) is None
    assert pool.limited == "pipe 2 can hold only 8192 bytes (pipe-max-size, pipe-user-pages-soft)"
    assert plumbing.attempts == 2
    assert pool.take(1) is None
    assert plumbing.attempts == 2
    pool.close()  # and nothing_leaks sees that the small one was closed


def test_a_pool_that_cannot_open_one_pipe_says_so() -> None:
    pool = PipePool(Counted(open_max=0), 64 * KIB)
    pool.grow(4)
    assert pool.take(1) is None
    assert pool.limited == "no more than 0 pipes can be opened"
    pool.close()


def test_a_closed_pool_has_closed_the_pipes_in_use_too_and_gives_none(counted: Counted) -> None:
    pool = PipePool(counted, 64 * KIB)
    pool.grow(3)
    taken(pool)
    pool.give(taken(pool))
    pool.close()
    assert counted.pipes == []
    pool.close()
    assert pool.take(1) is None


def test_a_pipe_of_which_nobody_knows_what_is_in_it_is_closed_and_another_one_opened() -> None:
    """A call of the ring's failed in the middle: what is counted may be too little."""
    plumbing = Counted()
    with world(plumbing=plumbing) as one:
        payload = one.filled(100, data(0, CONTENT[:100], done=True))
        payload.pipe.held = 0
        payload.pipe.is_unknown = True
        one.pool.give(payload)
        assert plumbing.pipes == []
        again = one.begin(100)
        assert again.pipe is not payload.pipe
        assert (plumbing.attempts, again.pipe.is_unknown) == (2, False)
