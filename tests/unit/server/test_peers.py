"""Processes that are one server share out who comes."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nbdshard.server.peers import Peer, Peers


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def peers_of(stack: ExitStack, count: int) -> list[Peer]:
    peers = Peers(count)
    stack.callback(peers.close)
    return [peers.peer(index) for index in range(count)]


def client(stack: ExitStack) -> socket.socket:
    theirs, ours = socket.socketpair()
    stack.enter_context(theirs)
    return stack.enter_context(ours)


def test_each_has_as_many_as_the_others_whoever_they_come_to(stack: ExitStack) -> None:
    peers = peers_of(stack, 3)
    kept = [not peers[1].hand_on(client(stack)) for _ in range(6)]
    assert kept == [True, False, False, True, False, False]
    assert [peers[0].clients(index) for index in range(3)] == [2, 2, 2]
    for peer in (peers[0], peers[2]):
        for _ in range(2):
            sock = peer.take()
            assert sock is not None
            stack.enter_context(sock)
        assert peer.take() is None


def test_who_has_lost_some_gets_the_next(stack: ExitStack) -> None:
    one, two = peers_of(stack, 2)
    assert [one.hand_on(client(stack)) for _ in range(4)] == [False, True, False, True]
    two.ended()
    two.ended()
    assert [one.clients(index) for index in range(2)] == [2, 0]
    assert [one.hand_on(client(stack)) for _ in range(2)] == [True, True]
    assert two.hand_on(client(stack)) is False


def test_it_is_the_same_connection_that_is_handed_on(stack: ExitStack) -> None:
    one, two = peers_of(stack, 2)
    one.hand_on(client(stack))
    theirs, ours = socket.socketpair()
    stack.enter_context(theirs)
    assert one.hand_on(ours)
    assert ours.fileno() == -1
    taken = two.take()
    assert taken is not None
    with taken:
        theirs.sendall(b"x")
        assert taken.recv(1) == b"x"


def test_one_that_can_be_handed_to_nobody_is_kept(stack: ExitStack) -> None:
    peers = Peers(2)
    one = peers.peer(0)
    one.hand_on(client(stack))
    peers.close()  # as if the other had ended
    assert not one.hand_on(client(stack))
    assert one.clients(0) == 2


def test_one_for_which_there_is_no_descriptor_is_told(stack: ExitStack) -> None:
    one, two = peers_of(stack, 2)
    one.hand_on(client(stack))
    assert one.hand_on(client(stack))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    highest = max(map(int, os.listdir("/proc/self/fd")))
    held = [os.open("/dev/null", os.O_RDONLY)]
    while held[-1] <= highest:
        held.append(os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1, hard))
    with pytest.raises(OSError) as caught:
        two.take()
    for number in held:
        os.close(number)
    assert caught.value.errno == errno.EMFILE
