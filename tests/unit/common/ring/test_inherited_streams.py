"""RECEIVE and SEND on what a user may give as standard input and output: pipes and terminals, blocking or not.

They may be shared with other processes, so their flags must stay as they are, and no operation may stop the loop.
"""

from __future__ import annotations

import errno
import os
import tty
from collections.abc import Iterator

import pytest

from nbdshard.common.ring import Descriptor
from support.loops import Loop, close, receive, send

MODES = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])


def pipe(loop: Loop, blocking: bool) -> tuple[Descriptor, Descriptor]:
    reading, writing = os.pipe()
    os.set_blocking(reading, blocking)
    os.set_blocking(writing, blocking)
    return loop.ring.attach(reading, is_socket=False), loop.ring.attach(writing, is_socket=False)


@pytest.fixture(params=[True, False], ids=["blocking", "non-blocking"])
def terminal(loop: Loop, request: pytest.FixtureRequest) -> Iterator[tuple[Descriptor, int]]:
    """Our side attached, and the number of the side a person would sit at."""
    person, ours = os.openpty()
    tty.setraw(ours)
    os.set_blocking(ours, request.param)
    yield loop.ring.attach(ours, is_socket=False), person
    os.close(person)


@MODES
def test_a_receive_waits_for_a_pipe_without_stopping_the_loop(loop: Loop, blocking: bool) -> None:
    source, target = pipe(loop, blocking)
    buffer = bytearray(100)
    operation = receive(source, buffer)
    loop.submit(operation)
    loop.idle()
    assert loop.run(send(target, b"through ", b"the pipe")) == [16]
    assert loop.finish(operation) == [16]
    assert buffer[:16] == b"through the pipe"
    loop.submit(operation)
    loop.idle()
    loop.run(close(target))
    assert loop.finish(operation) == [0]
    assert os.get_blocking(source.number) is blocking


@MODES
def test_a_send_to_a_full_pipe_waits_without_stopping_the_loop(loop: Loop, blocking: bool) -> None:
    source, target = pipe(loop, blocking)
    payload = os.urandom(1 << 20)
    received, buffer = bytearray(), bytearray(70_000)
    sent = 0
    outgoing = send(target, payload)
    loop.submit(outgoing)
    for _ in range(1000):  # nobody reads: it must come to wait
        if outgoing in loop.turn(0.01):
            sent += outgoing.result
            outgoing.buffers = [memoryview(payload)[sent:]]
            loop.submit(outgoing)
        else:
            break
    assert outgoing.pending
    assert 0 < sent < len(payload)
    incoming = receive(source, buffer)
    loop.submit(incoming)
    while len(received) < len(payload):
        for operation in loop.turn():
            assert operation.result > 0
            if operation is incoming:
                received += buffer[: operation.result]
                loop.submit(incoming)
            else:
                sent += operation.result
                outgoing.buffers = [memoryview(payload)[sent:]]
                if sent < len(payload):
                    loop.submit(outgoing)
    assert received == payload
    assert os.get_blocking(target.number) is blocking


@MODES
def test_close_ends_what_waits_for_a_pipe(loop: Loop, blocking: bool) -> None:
    source, target = pipe(loop, blocking)
    incoming = receive(source, bytearray(10))
    loop.submit(incoming)
    loop.idle()
    loop.run(close(source))
    assert incoming.result == -errno.ECANCELED
    assert loop.run(send(target, b"x")) == [-errno.EPIPE]


def test_a_receive_waits_for_a_terminal_without_stopping_the_loop(loop: Loop, terminal: tuple[Descriptor, int]) -> None:
    ours, person = terminal
    buffer = bytearray(100)
    operation = receive(ours, buffer)
    for line in (b"one\n", b"two\n", b"three\n"):
        loop.submit(operation)
        loop.idle()
        os.write(person, line)
        assert loop.finish(operation) == [len(line)]
        assert buffer.startswith(line)


def test_a_send_reaches_a_terminal(loop: Loop, terminal: tuple[Descriptor, int]) -> None:
    ours, person = terminal
    (count,) = loop.run(send(ours, b"hello", b" there"))
    assert count > 0
    assert b"hello there".startswith(os.read(person, 100))


def test_a_receive_from_a_terminal_can_be_cancelled(loop: Loop, terminal: tuple[Descriptor, int]) -> None:
    ours, person = terminal
    operation = receive(ours, bytearray(10))
    loop.submit(operation)
    loop.idle()
    loop.ring.cancel(operation)
    assert loop.finish(operation) == [-errno.ECANCELED]
    os.write(person, b"x")
    assert loop.run(operation) == [1]


def test_close_ends_a_receive_that_waits_for_a_terminal(loop: Loop, terminal: tuple[Descriptor, int]) -> None:
    ours, _ = terminal
    operation, ending = receive(ours, bytearray(10)), close(ours)
    loop.submit(operation)
    loop.idle()
    loop.submit(ending)
    assert loop.finish(operation, ending) == [-errno.ECANCELED, 0]


def test_two_receives_woken_by_the_same_bytes_get_them_once_and_the_other_waits_on(
    loop: Loop, terminal: tuple[Descriptor, int]
) -> None:
    """Where the file knows no attempt without waiting, the kernel tells the one that came too late EAGAIN."""
    ours, person = terminal
    if os.get_blocking(ours.number):
        os.set_blocking(ours.number, False)  # a blocking one may stop whoever comes too late: see epoll's text
    copy = loop.ring.attach(os.dup(ours.number), is_socket=False)
    first, second = receive(ours, bytearray(10)), receive(copy, bytearray(10))
    loop.submit(first, second)
    loop.idle()
    for _ in range(5):
        os.write(person, b"x")
        loop.until(lambda: len(loop.pending) == 1)
        loop.idle()
        (left,) = loop.pending
        got = second if left is first else first
        assert got.result == 1
        loop.submit(got)
    loop.ring.cancel(first)
    loop.ring.cancel(second)
    assert loop.finish(first, second) == [-errno.ECANCELED] * 2
