"""worker/plumbing.py on real pipes, socket pairs and TCP: what every call moves, and what it says when it cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support.descriptors import none_left
from support.images import KIB, MIB, random_bytes
from support.pipes import (
    PAGE,
    Ends,
    arrive,
    closed_number,
    fill_up,
    opened,
    prepared,
    received,
    reset,
    taken_out,
    tcp_ends,
    unix_ends,
    waiting_in,
)
from support.unprivileged import as_lonely_user
from support.waiting import WAIT_SECONDS

SIOCOUTQNSD = 0x894B  # linux/sockios.h: bytes that wait in a TCP socket and were not yet sent once
EVERY = bytes(range(256))


@pytest.fixture(params=[unix_ends, tcp_ends], ids=["unix", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Our end, which never waits, and the peer's."""
    with prepared(request.param()) as one:
        yield one


@pytest.fixture
def unix() -> Iterator[Ends]:
    with prepared(unix_ends()) as one:
        yield one


@pytest.fixture
def tcp() -> Iterator[Ends]:
    with prepared(tcp_ends()) as one:
        yield one


# -- pipes ------------------------------------------------------------------------------------------------------------


def test_a_new_pipe_is_empty_as_large_as_asked_and_never_waits(pipe: Pipe) -> None:
    assert (pipe.capacity, pipe.held, pipe.is_full) == (MIB, 0, False)
    assert fcntl.fcntl(pipe.read_end, fcntl.F_GETPIPE_SZ) == MIB
    for end in (pipe.read_end, pipe.write_end):
        assert not os.get_blocking(end)
        assert not os.get_inheritable(end)


def test_a_pipes_size_is_what_the_kernel_made_of_it(plumbing: SystemPlumbing) -> None:
    pipe = opened(plumbing, 100_000)
    assert pipe.capacity == 128 * KIB
    plumbing.close_pipe(pipe)


def test_a_closed_pipe_has_no_open_end(plumbing: SystemPlumbing) -> None:
    pipe = opened(plumbing)
    plumbing.close_pipe(pipe)
    for end in (pipe.read_end, pipe.write_end):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)


def test_without_descriptors_there_is_no_pipe(plumbing: SystemPlumbing) -> None:
    with none_left():
        assert plumbing.open_pipe(MIB) == -errno.EMFILE


def test_a_user_whose_share_of_pipe_memory_is_used_up_gets_smaller_pipes_and_reads_so() -> None:
    """pipe(7): over pipe-user-pages-soft a pipe is not enlarged (EPERM), and a new one has two pages, or one."""
    soft_limit = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text()) * PAGE  # 0: none
    wanted = soft_limit // MIB + 3

    def capacities() -> list[tuple[int, int]]:
        plumbing = SystemPlumbing()
        pipes = [opened(plumbing) for _ in range(wanted)]
        return [(pipe.capacity, fcntl.fcntl(pipe.write_end, fcntl.F_GETPIPE_SZ)) for pipe in pipes]

    with as_lonely_user(capacities) as found:
        told, real = zip(*found, strict=True)
    assert told == real
    enlarged = soft_limit // MIB or wanted
    assert set(told[:enlarged]) == {MIB}
    assert all(size < MIB for size in told[enlarged:])


# -- filling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 511, 4096, 4097, 65_537, 100_000])
def test_what_was_filled_in_comes_out_again(plumbing: SystemPlumbing, pipe: Pipe, ends: Ends, length: int) -> None:
    data = random_bytes(length)
    arrive(ends, data)
    assert plumbing.fill(pipe, ends[0].fileno(), length) == length
    assert (pipe.held, pipe.is_full) == (length, False)
    assert taken_out(plumbing, pipe) == data
    assert pipe.held == 0


def test_no_more_is_filled_in_than_was_asked_for(plumbing: SystemPlumbing, pipe: Pipe, ends: Ends) -> None:
    arrive(ends, b"payload" + b"header")
    assert plumbing.fill(pipe, ends[0].fileno(), 7) == 7
    assert taken_out(plumbing, pipe) == b"payload"
    assert ends[0].recv(100) == b"header"


def test_what_has_arrived_is_filled_in_though_more_was_asked_for(
    plumbing: SystemPlumbing, pipe: Pipe, ends: Ends
) -> None:
    arrive(ends, b"half")
    assert plumbing.fill(pipe, ends[0].fileno(), MIB) == 4
    assert (pipe.held, pipe.is_full) == (4, False)
    arrive(ends, b" and half")
    assert plumbing.fill(pipe, ends[0].fileno(), MIB) == 9
    assert taken_out(plumbing, pipe) == b"half and half"


def test_all_the_pieces_that_have_arrived_are_filled_in_by_one_call(
    plumbing: SystemPlumbing, pipe: Pipe, ends: Ends
) -> None:
    pieces = [random_bytes(700, seed) for seed in range(30)]
    whole = b"".join(pieces)
    arrive(ends, *pieces)
    assert plumbing.fill(pipe, ends[0].fileno(), MIB) == len(whole)
    assert taken_out(plumbing, pipe) == whole


def test_an_empty_socket_gives_eagain_and_the_pipe_is_not_full(
    plumbing: SystemPlumbing, pipe: Pipe, ends: Ends
) -> None:
    assert plumbing.fill(pipe, ends[0].fileno(), MIB) == -errno.EAGAIN
    assert (pipe.held, pipe.is_full) == (0, False)


def test_a_full_pipe_gives_eagain_and_says_so_until_there_is_room(plumbing: SystemPlumbing, ends: Ends) -> None:
    pipe = opened(plumbing, 2 * PAGE)
    ours = ends[0]
    for byte in b"ab":
        arrive(ends, bytes([byte]))
        assert plumbing.fill(pipe, ours.fileno(), 1) == 1  # each takes a slot of its own
    arrive(ends, b"c")
    assert plumbing.fill(pipe, ours.fileno(), MIB) == -errno.EAGAIN
    assert (pipe.held, pipe.is_full) == (2, True)
    assert taken_out(plumbing, pipe) == b"ab"
    assert plumbing.fill(pipe, ours.fileno(), MIB) == 1
    assert (pipe.held, pipe.is_full) == (1, False)
    assert plumbing.fill(pipe, ours.fileno(), MIB) == -errno.EAGAIN
    assert not pipe.is_full  # now it is the socket
    plumbing.close_pipe(pipe)


def test_a_pipe_that_takes_only_part_says_that_it_is_full(plumbing: SystemPlumbing, ends: Ends) -> None:
    pipe = opened(plumbing, 2 * PAGE)
    data = random_bytes(100_000)  # a slot may hold more than a page, but not that much
    arrive(ends, data)
    moved = plumbing.fill(pipe, ends[0].fileno(), len(data))
    assert 0 < moved < len(data)
    assert (pipe.held, pipe.is_full) == (moved, True)
    assert taken_out(plumbing, pipe) == data[:moved]
    plumbing.close_pipe(pipe)


def test_a_pipe_of_1_mib_is_full_early_if_its_bytes_come_in_pieces_of_512(
    plumbing: SystemPlumbing, pipe: Pipe, unix: Ends
) -> None:
    """A slot for each piece: 256 of them."""
    ours, theirs = unix
    pieces = [random_bytes(512, seed) for seed in range(300)]
    count = 0
    while not pipe.is_full:
        theirs.sendall(pieces[count])
        moved = plumbing.fill(pipe, ours.fileno(), 512)
        count += moved == 512
    assert (moved, pipe.held) == (-errno.EAGAIN, count * 512)
    assert pipe.held <= MIB // 4
    assert taken_out(plumbing, pipe) == b"".join(pieces[:count])
    assert plumbing.fill(pipe, ours.fileno(), 512) == 512
    assert taken_out(plumbing, pipe) == pieces[count]


def test_a_pipe_with_room_is_never_called_full_whenever_the_bytes_come(
    plumbing: SystemPlumbing, pipe: Pipe, unix: Ends
) -> None:
    """They may come between an attempt that found nothing and the look at what is there."""
    ours, theirs = unix
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
    total = 30_000

    def trickle() -> None:
        for _ in range(total):
            theirs.sendall(b"x")

    sender = threading.Thread(target=trickle)
    sender.start()
    moved, called_full = 0, 0
    while moved < total:
        count = plumbing.fill(pipe, ours.fileno(), 1)
        called_full += pipe.is_full
        moved += max(count, 0)
        if pipe.held == 100:
            plumbing.discard(pipe)
    sender.join()
    assert called_full == 0


def test_the_end_of_the_stream_is_0(plumbing: SystemPlumbing, pipe: Pipe, ends: Ends) -> None:
    ours, theirs = ends
    arrive(ends, b"last words")
    theirs.shutdown(socket.SHUT_WR)
    assert plumbing.fill(pipe, ours.fileno(), MIB) == 10
    assert ours.recv(1, socket.MSG_PEEK) == b""
    assert plumbing.fill(pipe, ours.fileno(), MIB) == 0
    assert (pipe.held, pipe.is_full) == (10, False)
    assert plumbing.receive(ours.fileno(), [memoryview(bytearray(10))]) == 0


def test_a_reset_is_told_by_whatever_reads_first(plumbing: SystemPlumbing, pipe: Pipe) -> None:
    buffer = memoryview(bytearray(10))
    reads: list[Callable[[int], int]] = [
        lambda number: plumbing.fill(pipe, number, MIB),
        lambda number: plumbing.receive(number, [buffer]),
    ]
    for read in reads:
        ours, theirs = tcp_ends()
        ours.setblocking(False)
        reset(theirs)
        select.select([ours], [], [], WAIT_SECONDS)
        assert read(ours.fileno()) == -errno.ECONNRESET
        assert not pipe.is_full
        ours.close()


# -- draining ---------------------------------------------------------------------------------------------------------


def test_a_pipe_is_drained_as_far_as_the_socket_takes_it_and_then_on(
    plumbing: SystemPlumbing, pipe: Pipe, ends: Ends
) -> None:
    ours, theirs = ends
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
    data = random_bytes(MIB)
    filler = unix_ends()
    with filler[0], filler[1]:
        filler[0].setblocking(False)
        fill_up(plumbing, pipe, filler, data)
    got = bytearray()
    waits = 0
    while pipe.held:
        count = plumbing.drain(pipe, ours.fileno(), pipe.held, more=False)
        if count == -errno.EAGAIN:
            waits += 1
            got += theirs.recv(MIB)
        else:
            assert count > 0
    assert waits > 0
    ours.shutdown(socket.SHUT_WR)
    got += received(theirs)
    assert got == data


def test_no_more_is_drained_than_was_asked_for(plumbing: SystemPlumbing, pipe: Pipe, ends: Ends) -> None:
    arrive(ends, b"mine and another's")
    plumbing.fill(pipe, ends[0].fileno(), MIB)
    assert plumbing.drain(pipe, ends[0].fileno(), 4, more=False) == 4
    assert ends[1].recv(100) == b"mine"
    assert taken_out(plumbing, pipe) == b" and another's"


def test_an_empty_pipe_gives_nothing(plumbing: SystemPlumbing, pipe: Pipe, ends: Ends) -> None:
    assert plumbing.drain(pipe, ends[0].fileno(), MIB, more=False) == -errno.EAGAIN
    assert plumbing.read(pipe, memoryview(bytearray(1))) == -errno.EAGAIN
    assert plumbing.discard(pipe) == 0
    assert pipe.held == 0


def test_nothing_is_lost_of_a_pipe_whose_destination_has_gone(plumbing: SystemPlumbing, pipe: Pipe, ends: Ends) -> None:
    ours, theirs = ends
    arrive(ends, b"payload")
    plumbing.fill(pipe, ours.fileno(), MIB)
    theirs.close()
    while True:  # TCP takes what is sent first, and learns by it that nobody reads
        result = plumbing.send(ours.fileno(), [b"x"], more=False)
        if result < 0:
            break
    assert result in (-errno.EPIPE, -errno.ECONNRESET)
    assert plumbing.drain(pipe, ours.fileno(), 7, more=False) == -errno.EPIPE
    assert taken_out(plumbing, pipe) == b"payload"


# -- sending and receiving --------------------------------------------------------------------------------------------


def test_a_header_waits_for_the_payload_that_follows_and_leaves_with_it(
    plumbing: SystemPlumbing, pipe: Pipe, tcp: Ends
) -> None:
    ours, theirs = tcp
    arrive(tcp, b"payload, and more payload")
    plumbing.fill(pipe, ours.fileno(), MIB)
    assert plumbing.send(ours.fileno(), [b"header "], more=True) == 7
    assert waiting_in(ours, SIOCOUTQNSD) == 7
    assert plumbing.drain(pipe, ours.fileno(), 8, more=True) == 8
    assert waiting_in(ours, SIOCOUTQNSD) == 15
    assert plumbing.drain(pipe, ours.fileno(), 17, more=False) == 17
    assert waiting_in(ours, SIOCOUTQNSD) == 0
    assert theirs.recv(100) == b"header payload, and more payload"


@pytest.mark.parametrize("pieces", [[b"header"], [memoryview(b"payload")], [b"header", memoryview(b"payload")]])
def test_what_is_sent_without_more_leaves_at_once(
    plumbing: SystemPlumbing, tcp: Ends, pieces: list[bytes | memoryview]
) -> None:
    ours, theirs = tcp
    whole = b"".join(pieces)
    assert plumbing.send(ours.fileno(), pieces, more=False) == len(whole)
    assert waiting_in(ours, SIOCOUTQNSD) == 0
    assert theirs.recv(100) == whole


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("pieces", [[EVERY], [memoryview(EVERY)[100:]], [EVERY, memoryview(EVERY)[100:], b"end"]])
def test_bytes_of_any_value_and_views_into_buffers_are_sent_in_order(
    plumbing: SystemPlumbing, ends: Ends, pieces: list[bytes | memoryview], more: bool
) -> None:
    ours, theirs = ends
    whole = b"".join(pieces)
    assert plumbing.send(ours.fileno(), pieces, more=more) == len(whole)
    ours.shutdown(socket.SHUT_WR)
    assert received(theirs) == whole


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_a_socket_takes_what_it_has_room_for_and_then_gives_eagain(
    plumbing: SystemPlumbing, ends: Ends, kind: Callable[[bytes], bytes | memoryview], more: bool
) -> None:
    ours, theirs = ends
    data = random_bytes(8 * MIB)
    sent = 0
    while (count := plumbing.send(ours.fileno(), [kind(data[sent:])], more=more)) > 0:
        sent += count
    assert count == -errno.EAGAIN
    assert 0 < sent < len(data)
    ours.shutdown(socket.SHUT_WR)
    assert received(theirs) == data[:sent]


def test_what_is_received_goes_into_one_buffer_after_the_other(plumbing: SystemPlumbing, ends: Ends) -> None:
    first, second = bytearray(7), bytearray(100)
    arrive(ends, b"payload" + b"header")
    targets = [memoryview(first), memoryview(second)]
    assert plumbing.receive(ends[0].fileno(), targets) == 13
    assert (bytes(first), bytes(second[:6])) == (b"payload", b"header")
    assert plumbing.receive(ends[0].fileno(), targets) == -errno.EAGAIN


def test_every_call_says_what_is_wrong_with_a_descriptor(plumbing: SystemPlumbing, pipe: Pipe, unix: Ends) -> None:
    arrive(unix, b"payload")
    plumbing.fill(pipe, unix[0].fileno(), MIB)
    number = closed_number()
    assert plumbing.fill(pipe, number, 1) == -errno.EBADF
    assert not pipe.is_full
    assert plumbing.drain(pipe, number, 1, more=False) == -errno.EBADF
    assert plumbing.receive(number, [memoryview(bytearray(1))]) == -errno.EBADF
    for more in (False, True):
        assert plumbing.send(number, [b"x"], more=more) == -errno.EBADF
        assert plumbing.send(number, [b"x", memoryview(b"y")], more=more) == -errno.EBADF
    assert taken_out(plumbing, pipe) == b"payload"
