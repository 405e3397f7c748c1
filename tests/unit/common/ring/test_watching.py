"""WATCH: a socket whose owner makes the system calls is told when there is something to do, again and again."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.ring import Descriptor, Kind, Operation
from support.loops import SECONDS_MAX, Loop, call, close, poll, receive, send
from support.waiting import wait_for

IN, OUT, RDHUP, HUP, ERR = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP, select.EPOLLHUP, select.EPOLLERR
TURNS = 3
TURN_SECONDS = 0.01


class Watcher:
    """A WATCH, and what it was told. Every other completion goes to `others`."""

    def __init__(self, loop: Loop, descriptor: Descriptor, mask: int = IN | RDHUP) -> None:
        self.ring = loop.ring
        self.operation = Operation(Kind.WATCH, descriptor, mask=mask)
        self.told: list[int] = []
        self.others: list[Operation] = []
        self.ring.submit(self.operation)

    def turn(self, seconds: float = TURN_SECONDS) -> None:
        """One wait."""
        done = self.ring.wait(seconds)
        assert done.count(self.operation) <= 1
        for operation in done:
            if operation is self.operation:
                self.told.append(operation.result)
            else:
                self.others.append(operation)

    def next(self) -> int:
        """What it is told next."""
        before = len(self.told)
        self.until("the watch to be told", lambda: len(self.told) > before)
        assert len(self.told) == before + 1
        return self.told[-1]

    def until(self, what: str, condition: Callable[[], object]) -> None:
        def reached() -> object:
            self.turn()
            return condition()

        wait_for(what, reached)

    def hears_nothing(self) -> None:
        """For a few turns, in which the kernel has the time to tell of anything there is."""
        before = list(self.told)
        for _ in range(TURNS):
            self.turn()
        assert self.told == before

    def change(self, mask: int) -> None:
        self.ring.change_watch(self.operation, mask)


@pytest.fixture(params=["unix", "tcp"])
def ends(request: pytest.FixtureRequest, loop: Loop) -> Iterator[tuple[Descriptor, socket.socket]]:
    """Our descriptor and the peer's socket."""
    ours, theirs = loop.connection() if request.param == "unix" else loop.tcp()
    with theirs:
        yield ours, theirs


Ends = tuple[Descriptor, socket.socket]


def take(descriptor: Descriptor, count: int = 1 << 20) -> bytes:
    """What has arrived."""
    return os.read(descriptor.number, count)


def fill(descriptor: Descriptor) -> int:
    """Send until the socket takes no more; how much it took."""
    sent = 0
    try:
        while True:
            sent += os.write(descriptor.number, bytes(1 << 20))
    except BlockingIOError:
        return sent


# -- edges ------------------------------------------------------------------------------------------------------------


def test_a_watch_is_told_each_time_something_arrives_and_not_in_between(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours)
    watcher.hears_nothing()
    for number in range(5):
        theirs.sendall(b"%d" % number)
        assert watcher.next() == IN
        watcher.hears_nothing()  # though nobody has read
    assert take(ours) == b"01234"
    watcher.hears_nothing()
    theirs.sendall(b"x")
    assert watcher.next() == IN
    assert watcher.operation.pending


def test_what_is_true_when_the_watch_begins_is_told_once(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    theirs.sendall(b"early")
    watcher = Watcher(loop, ours, IN | OUT)
    assert watcher.next() & OUT
    watcher.until("the bytes to be told of", lambda: watcher.told[-1] == IN | OUT)
    watcher.hears_nothing()


def test_what_is_not_in_the_mask_is_not_told(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours, OUT)
    assert watcher.next() == OUT
    theirs.sendall(b"x")
    before = len(watcher.told)
    for _ in range(TURNS):
        watcher.turn()
    assert all(events == OUT for events in watcher.told[before:])


def test_a_mask_that_changes_tells_once_more_what_is_true(loop: Loop, ends: Ends) -> None:
    ours, _ = ends
    watcher = Watcher(loop, ours, IN)
    watcher.hears_nothing()
    watcher.change(IN | OUT)
    assert watcher.next() == OUT
    watcher.hears_nothing()
    watcher.change(IN)
    watcher.hears_nothing()
    watcher.change(IN | OUT)
    watcher.change(IN | OUT)
    assert watcher.next() == OUT
    watcher.hears_nothing()


def test_a_mask_may_change_before_the_watch_has_begun(loop: Loop, ends: Ends) -> None:
    watcher = Watcher(loop, ends[0], IN)
    watcher.change(OUT)
    assert watcher.next() == OUT


def test_a_full_socket_is_told_of_when_the_peer_has_read(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours, IN)
    sent = fill(ours)
    watcher.change(IN | OUT)
    watcher.hears_nothing()
    got = 0
    while got < sent:
        got += len(theirs.recv(1 << 20))
    assert watcher.next() == OUT
    assert os.write(ours.number, b"x") == 1


def test_the_peers_end_is_told_together_with_its_last_bytes(loop: Loop) -> None:
    """Whoever stops reading when the bytes are there would never hear of the end: it makes no edge of its own."""
    ours, theirs = loop.connection()
    watcher = Watcher(loop, ours)
    theirs.sendall(b"last words")
    theirs.close()
    events = watcher.next()
    assert events & IN and events & RDHUP
    watcher.hears_nothing()
    assert take(ours) == b"last words"
    watcher.hears_nothing()
    assert take(ours) == b""


def test_the_peers_end_is_told_although_nothing_else_is_watched_for(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours, RDHUP)
    watcher.hears_nothing()
    theirs.shutdown(socket.SHUT_WR)
    assert watcher.next() & RDHUP


def test_a_connection_that_fails_is_told_of_whatever_the_mask(loop: Loop) -> None:
    ours, theirs = loop.tcp()
    watcher = Watcher(loop, ours, OUT)
    assert watcher.next() == OUT
    os.write(ours.number, b"unread by the peer")
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    theirs.close()
    watcher.until("the reset", lambda: watcher.told[-1] & (ERR | HUP))
    with pytest.raises(ConnectionResetError):
        take(ours)


def test_a_watch_stays_one_operation_however_often_it_is_told(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours)
    for _ in range(100):
        theirs.sendall(b"x")
        assert watcher.next() == IN
        assert take(ours) == b"x"
        assert (loop.ring.in_flight, ours.pending, watcher.operation.pending) == (1, 1, True)
    assert watcher.others == []


def test_many_sockets_are_watched_at_a_time(loop: Loop) -> None:
    pairs = [loop.connection() for _ in range(100)]
    watchers = [Watcher(loop, ours) for ours, _ in pairs]
    told: set[Operation] = set()
    for _, theirs in pairs:
        theirs.sendall(b"x")

    def all_told() -> bool:
        told.update(loop.ring.wait(TURN_SECONDS))
        return len(told) == len(watchers)

    wait_for("every watch to be told", all_told)
    assert told == {watcher.operation for watcher in watchers}
    for ours, theirs in pairs:
        assert take(ours) == b"x"
        theirs.close()


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_watch_ends_once_and_hears_nothing_more(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours)
    watcher.hears_nothing()
    loop.ring.cancel(watcher.operation)
    assert watcher.next() == -errno.ECANCELED
    assert not watcher.operation.pending
    theirs.sendall(b"x")
    watcher.hears_nothing()
    loop.ring.cancel(watcher.operation)  # which is nothing any more
    watcher.hears_nothing()
    assert (loop.ring.in_flight, ours.pending) == (0, 0)


def test_a_cancelled_watch_is_returned_by_the_next_wait_at_once(loop: Loop, ends: Ends) -> None:
    ours, _ = ends
    watcher = Watcher(loop, ours)
    watcher.hears_nothing()
    loop.ring.cancel(watcher.operation)
    started = time.monotonic()
    assert loop.ring.wait(SECONDS_MAX) == [watcher.operation]
    assert time.monotonic() - started < SECONDS_MAX / 2


def test_a_watch_cancelled_before_it_began_was_never_told_anything(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    theirs.sendall(b"x")
    watcher = Watcher(loop, ours)
    loop.ring.cancel(watcher.operation)
    assert watcher.next() == -errno.ECANCELED
    watcher.hears_nothing()
    assert watcher.told == [-errno.ECANCELED]


def test_after_a_watch_its_socket_is_for_receive_and_send_again(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    for _ in range(3):
        watcher = Watcher(loop, ours)
        theirs.sendall(b"x")
        assert watcher.next() == IN
        assert take(ours) == b"x"
        loop.ring.cancel(watcher.operation)
        assert watcher.next() == -errno.ECANCELED
        buffer = bytearray(5)
        receiving = receive(ours, buffer)
        loop.submit(receiving)
        loop.idle()  # it has to wait for its bytes
        theirs.sendall(b"hello")
        assert loop.finish(receiving) == [5]
        assert loop.run(send(ours, b"yes")) == [3]
        assert theirs.recv(10) == b"yes"


def test_close_ends_a_watch_and_the_peer_sees_the_end(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours)
    watcher.hears_nothing()
    closing = close(ours)
    loop.ring.submit(closing)
    watcher.until("the CLOSE", lambda: watcher.others)
    assert [closing] == watcher.others
    assert (closing.result, watcher.told, watcher.operation.pending) == (0, [-errno.ECANCELED], False)
    assert theirs.recv(1) == b""
    assert ours.closed
    watcher.hears_nothing()


def test_close_ends_a_watch_that_has_something_to_tell(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours)
    watcher.hears_nothing()
    theirs.sendall(b"x")
    closing = close(ours)
    loop.ring.submit(closing)
    watcher.until("the CLOSE", lambda: watcher.others)
    assert watcher.told[-1] == -errno.ECANCELED
    assert not watcher.operation.pending


def test_a_new_socket_with_an_old_number_hears_nothing_of_the_old_one(loop: Loop) -> None:
    """Even if somebody else still has the old one open: close(2) alone would leave it in the epoll instance."""
    ours, theirs = loop.connection()
    shared = os.dup(ours.number)
    watcher = Watcher(loop, ours)
    theirs.sendall(b"x")
    assert watcher.next() == IN
    number = ours.number
    loop.ring.submit(close(ours))
    watcher.until("the CLOSE", lambda: watcher.others)
    new_end, new_peer = socket.socketpair()
    if new_end.fileno() != number:
        os.dup2(new_end.fileno(), number)
        new_end.close()
        new_end = socket.socket(fileno=number)
    new = Watcher(loop, loop.attach(new_end))
    theirs.close()  # an edge of the old one
    new.hears_nothing()
    assert new.others == []
    new_peer.sendall(b"y")
    assert new.next() == IN
    os.close(shared)
    new_peer.close()


def test_closing_the_ring_ends_a_watch(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours)
    watcher.hears_nothing()
    loop.ring.close()
    assert not watcher.operation.pending
    assert theirs.recv(1) == b""


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(loop: Loop, operation: Operation, match: str) -> None:
    descriptor = operation.descriptor
    before = descriptor.pending if descriptor is not None else 0
    with pytest.raises(BugError, match=match):
        loop.ring.submit(operation)
    assert not operation.pending
    assert (descriptor.pending if descriptor is not None else 0) == before


def watch(descriptor: Descriptor | None) -> Operation:
    return Operation(Kind.WATCH, descriptor, mask=IN)


def test_nothing_but_close_may_be_asked_of_a_watched_socket(loop: Loop, ends: Ends) -> None:
    ours, _ = ends
    watcher = Watcher(loop, ours)
    for begun in (False, True):
        for operation in (watch(ours), receive(ours, bytearray(1)), send(ours, b"x"), poll(ours, IN)):
            refused(loop, operation, f"{operation.kind.name} for descriptor .* which is watched")
        if not begun:
            watcher.hears_nothing()
    loop.ring.submit(close(ours))
    watcher.until("the CLOSE", lambda: watcher.others)


def test_a_socket_with_something_pending_cannot_be_watched(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    for operation in (receive(ours, bytearray(1)), poll(ours, IN)):
        loop.submit(operation)
        refused(loop, watch(ours), "WATCH of descriptor .* has something pending")
        theirs.sendall(b"x")
        loop.finish(operation)
    assert take(ours) == b"x"
    watcher = Watcher(loop, ours)
    theirs.sendall(b"x")
    assert watcher.next() == IN


def test_only_a_socket_is_watched(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    refused(loop, watch(disk), "WATCH of descriptor .* is no socket")
    reading, writing = os.pipe()
    refused(loop, watch(loop.ring.attach(reading, is_socket=False)), "is no socket")
    refused(loop, watch(None), "without a descriptor")
    os.close(writing)


def test_a_watch_is_refused_on_a_descriptor_that_closes(loop: Loop, ends: Ends) -> None:
    loop.submit(close(ends[0]))
    refused(loop, watch(ends[0]), "which is closing or closed")


def test_only_a_pending_watch_is_changed(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    operation = poll(ours, IN)
    loop.submit(operation)
    for wrong in (watch(ours), operation):
        with pytest.raises(BugError, match="changing a watch that is not pending"):
            loop.ring.change_watch(wrong, IN)
    theirs.sendall(b"x")
    loop.finish(operation)
    watcher = Watcher(loop, ours)
    loop.ring.cancel(watcher.operation)
    assert watcher.next() == -errno.ECANCELED
    with pytest.raises(BugError, match="changing a watch that is not pending"):
        watcher.change(IN)


# -- with others on the ring ------------------------------------------------------------------------------------------


def test_operations_that_are_done_at_once_do_not_starve_a_watch(loop: Loop, ends: Ends) -> None:
    """In every turn one is done, so no turn has to wait."""
    ours, theirs = ends
    busy, other = loop.connection()
    watcher = Watcher(loop, ours)
    ready = poll(busy, OUT)
    loop.ring.submit(ready)
    watcher.turn()
    theirs.sendall(b"x")

    def is_told() -> bool:
        if not ready.pending:
            loop.ring.submit(ready)
        watcher.turn()
        return bool(watcher.told)

    wait_for("the watch to be told", is_told, poll=0.0)
    assert len(watcher.others) > 1
    other.close()


def test_a_watch_that_has_much_to_tell_does_not_starve_operations(loop: Loop, ends: Ends) -> None:
    ours, theirs = ends
    watcher = Watcher(loop, ours, IN | OUT)
    on_a_thread = call(lambda: None)
    busy, other = loop.connection()
    receiving = receive(busy, bytearray(1))
    loop.ring.submit(on_a_thread)
    loop.ring.submit(receiving)
    other.sendall(b"x")

    def are_done() -> bool:
        theirs.sendall(b"x")
        watcher.turn()
        take(ours)
        return not (on_a_thread.pending or receiving.pending)

    wait_for("the operations", are_done, poll=0.0)
    assert set(watcher.others) == {on_a_thread, receiving}
    other.close()


def test_waking_a_ring_that_watches_wakes_it(loop: Loop, ends: Ends) -> None:
    watcher = Watcher(loop, ends[0])
    watcher.hears_nothing()
    loop.ring.wake()
    assert loop.ring.wait(20.0) == []
