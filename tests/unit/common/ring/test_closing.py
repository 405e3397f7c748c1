"""CLOSE and cancel: how operations and descriptors end, and that nothing of them reaches their successors."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.ring import Descriptor, Operation
from support.loops import SECONDS_MAX, Loop, call, close, poll, read, receive, send


def at_number(loop: Loop, number: int) -> tuple[Descriptor, socket.socket]:
    """A new connection whose attached end has the descriptor `number`, which must be free."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(SECONDS_MAX)
    ours.setblocking(False)
    if ours.fileno() != number:
        os.dup2(ours.fileno(), number, inheritable=False)
        ours.close()
    else:
        ours.detach()
    return loop.ring.attach(number, is_socket=True), theirs


def fill(loop: Loop, descriptor: Descriptor) -> Operation:
    """Send until a SEND has to wait; that one."""
    operation = send(descriptor, b"old" * 100_000)
    while not operation.pending:
        loop.submit(operation)
        loop.turn(0.05)
    return operation


def test_close_gives_the_peer_its_end_at_once_although_a_receive_waits(loop: Loop) -> None:
    ours, theirs = loop.connection()
    waiting, ending = receive(ours, bytearray(100)), close(ours)
    loop.submit(waiting)
    loop.idle()
    loop.submit(ending)
    loop.finish(waiting, ending)
    assert theirs.recv(1) == b""
    assert waiting.result in (0, -errno.ECANCELED)
    assert ending.result == 0
    assert ours.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours.number)
    theirs.close()


def test_close_of_a_tcp_connection_gives_the_peer_its_end(loop: Loop) -> None:
    ours, theirs = loop.tcp()
    loop.submit(receive(ours, bytearray(100)))
    assert loop.run(close(ours)) == [0]
    assert theirs.recv(1) == b""
    theirs.close()


def test_close_with_everything_pending_completes_it_all_and_itself_last(loop: Loop) -> None:
    ours, theirs = loop.connection()
    outgoing = fill(loop, ours)
    incoming, watching = receive(ours, bytearray(10)), poll(ours, select.POLLIN)
    loop.submit(incoming, watching)
    loop.idle()
    ending = close(ours)
    loop.submit(ending)
    done: list[Operation] = []
    while loop.pending:
        done += loop.turn()
    assert done[-1] is ending
    assert set(done) == {outgoing, incoming, watching, ending}
    assert outgoing.result in (-errno.ECANCELED, -errno.EPIPE)
    theirs.close()


def test_sends_prepared_before_a_close_are_sent_as_far_as_they_fit_or_discarded(loop: Loop) -> None:
    ours, theirs = loop.connection()
    outgoing, ending = send(ours, b"goodbye"), close(ours)
    loop.submit(outgoing, ending)
    loop.finish(outgoing, ending)
    assert outgoing.result == 7
    assert theirs.recv(100) == b"goodbye"
    assert theirs.recv(100) == b""
    theirs.close()


def test_what_was_prepared_for_a_number_never_reaches_its_next_owner(loop: Loop) -> None:
    """Tried without generations: bytes submitted after the close went into the NEW connection."""
    ours, theirs = loop.connection()
    number = ours.number
    late = fill(loop, ours)
    loop.submit(close(ours))
    loop.until(lambda: ours.closed)
    assert not late.pending
    theirs.close()
    new, peer = at_number(loop, number)
    loop.idle()
    assert loop.run(send(new, b"new")) == [3]
    assert peer.recv(100) == b"new"
    with pytest.raises(BugError, match="closing or closed"):
        loop.ring.submit(send(ours, b"old"))
    peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.recv(100)
    peer.close()


def test_a_number_used_a_hundred_times_mixes_nothing_up(loop: Loop) -> None:
    descriptor, theirs = loop.connection()
    number = descriptor.number
    operation = receive(descriptor, bytearray(100))
    for life in range(100):
        buffer = bytearray(100)
        loop.submit(receive(descriptor, buffer) if life % 2 else operation)
        if life % 3:
            loop.turn(0.001)
        loop.submit(close(descriptor))
        loop.until(lambda descriptor=descriptor: descriptor.closed)  # type: ignore[misc]
        theirs.close()
        descriptor, theirs = at_number(loop, number)
        text = f"life {life}".encode()
        operation = receive(descriptor, buffer)
        loop.submit(operation)
        theirs.sendall(text)
        assert loop.finish(operation) == [len(text)]
        assert buffer.startswith(text)
        operation.buffers = [memoryview(bytearray(100))]
    theirs.close()


def test_another_process_that_shares_the_socket_does_not_keep_the_peer_from_its_end(loop: Loop) -> None:
    ours, theirs = loop.connection()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[ours.number]
    )
    try:
        loop.submit(receive(ours, bytearray(1)))
        loop.idle()
        assert loop.run(close(ours)) == [0]
        assert theirs.recv(1) == b""
        new, peer = at_number(loop, ours.number)
        waiting, watching = receive(new, bytearray(10)), poll(new, select.POLLPRI)
        loop.submit(waiting, watching)
        loop.idle()
        theirs.close()  # news for the old connection, which the other process still holds
        loop.idle()
        peer.sendall(b"mine")
        assert loop.finish(waiting) == [4]
        peer.close()
    finally:
        holder.communicate(timeout=SECONDS_MAX)
        theirs.close()


def test_close_of_an_unconnected_socket_and_of_a_reset_one_works(loop: Loop) -> None:
    assert loop.run(close(loop.attach(socket.socket()))) == [0]
    ours, theirs = loop.connection()
    theirs.close()
    assert loop.run(close(ours)) == [0]


def test_close_of_many_descriptors_at_once_completes_all(loop: Loop) -> None:
    connections = [loop.connection() for _ in range(100)]
    waiting = [receive(ours, bytearray(1)) for ours, _ in connections]
    loop.submit(*waiting)
    loop.idle()
    assert loop.run(*(close(ours) for ours, _ in connections)) == [0] * 100
    assert not loop.pending
    for _, theirs in connections:
        assert theirs.recv(1) == b""
        theirs.close()


def test_nothing_may_be_submitted_after_a_close(loop: Loop) -> None:
    ours, theirs = loop.connection()
    ending = close(ours)
    loop.submit(ending)
    for operation in (send(ours, b"x"), receive(ours, bytearray(1)), close(ours), call(lambda: None, ours)):
        with pytest.raises(BugError, match="closing or closed"):
            loop.ring.submit(operation)
        assert not operation.pending
    loop.finish(ending)
    theirs.close()


@pytest.mark.parametrize("turns", [0, 1], ids=["before it was started", "after it was started"])
def test_a_cancelled_receive_completes_once_and_takes_no_bytes(loop: Loop, turns: int) -> None:
    ours, theirs = loop.connection()
    operation = receive(ours, bytearray(10))
    loop.submit(operation)
    for _ in range(turns):
        loop.turn(0.01)
    loop.ring.cancel(operation)
    loop.ring.cancel(operation)
    assert loop.finish(operation) == [-errno.ECANCELED]
    theirs.sendall(b"later")
    buffer = bytearray(10)
    assert loop.run(receive(ours, buffer)) == [5]
    assert buffer[:5] == b"later"
    theirs.close()


@pytest.mark.parametrize("turns", [0, 1], ids=["before it was started", "after it was started"])
def test_a_cancelled_poll_completes_once(loop: Loop, turns: int) -> None:
    ours, theirs = loop.connection()
    operation = poll(ours, select.POLLIN)
    loop.submit(operation)
    for _ in range(turns):
        loop.turn(0.01)
    loop.ring.cancel(operation)
    assert loop.finish(operation) == [-errno.ECANCELED]
    theirs.sendall(b"x")
    loop.idle()
    theirs.close()


def test_a_cancelled_send_that_waits_for_room_moves_nothing(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operation = fill(loop, ours)
    loop.ring.cancel(operation)
    assert loop.finish(operation) == [-errno.ECANCELED]
    theirs.close()


def test_an_operation_used_again_is_not_ended_by_the_cancellation_of_its_earlier_run(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operation = receive(ours, bytearray(1))
    for _ in range(30):
        loop.submit(operation)
        loop.turn(0)
        loop.ring.cancel(operation)
        theirs.sendall(b"x")  # so that it may complete in spite of it
        loop.finish(operation)
        if operation.result < 0:
            assert loop.run(operation) == [1]
        else:
            loop.submit(operation)
            loop.idle()
            theirs.sendall(b"y")
            assert loop.finish(operation) == [1]
    theirs.close()


def test_a_cancellation_is_kept_even_if_the_operation_is_just_about_to_try_again(loop: Loop) -> None:
    """Two descriptors of one socket are woken by one byte; the one that comes too late must not wait again."""
    ours, theirs = loop.connection()
    copy = loop.ring.attach(os.dup(ours.number), is_socket=True)
    pair = [receive(ours, bytearray(1)), receive(copy, bytearray(1))]
    for turn in range(20):
        loop.submit(*(operation for operation in pair if not operation.pending))
        loop.idle()
        cancelled, other = pair[turn % 2], pair[1 - turn % 2]
        theirs.sendall(b"x")
        loop.ring.cancel(cancelled)
        loop.finish(cancelled)
        if cancelled.result == 1:
            assert other.pending
        else:
            assert cancelled.result == -errno.ECANCELED
            assert loop.finish(other) == [1]
    theirs.close()


def test_cancelling_what_is_not_pending_does_nothing(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operation = receive(ours, bytearray(1))
    loop.ring.cancel(operation)
    loop.idle()
    theirs.sendall(b"x")
    assert loop.run(operation) == [1]
    theirs.close()


def test_a_close_cannot_be_cancelled(loop: Loop) -> None:
    ours, theirs = loop.connection()
    ending = close(ours)
    loop.submit(ending)
    loop.ring.cancel(ending)
    assert loop.finish(ending) == [0]
    theirs.close()


def test_closing_the_ring_closes_what_it_has_and_tells_the_peers(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disk = loop.file(tmp_path / "disk", os.O_RDONLY)
    ours, theirs = loop.connection()
    other, others_peer = loop.connection()
    waiting, sending = receive(ours, bytearray(10)), fill(loop, other)
    loop.submit(waiting)
    loop.idle()
    prepared = [read(disk, 0, bytearray(1 << 20)), poll(ours, select.POLLIN), close(disk)]
    loop.submit(*prepared)
    loop.ring.close()
    loop.ring.close()
    assert theirs.recv(1) == b""
    while others_peer.recv(1 << 20):
        pass
    assert not any(operation.pending for operation in [waiting, sending, *prepared])
    assert all(descriptor.closed for descriptor in (disk, ours, other))
    for use in (lambda: loop.ring.submit(call(int)), lambda: loop.ring.wait(0), lambda: loop.ring.submit(waiting)):
        with pytest.raises(BugError):
            use()
    theirs.close()
    others_peer.close()
