"""POLL: readiness of anything that has a descriptor."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from support.loops import SECONDS_MAX, Loop, call, close, poll, receive, send

IN, OUT, HUP, ERR = select.POLLIN, select.POLLOUT, select.POLLHUP, select.POLLERR


def test_poll_gives_what_of_its_mask_is_true_already(loop: Loop) -> None:
    ours, theirs = loop.connection()
    assert loop.run(poll(ours, OUT)) == [OUT]
    theirs.sendall(b"x")
    assert loop.run(poll(ours, IN)) == [IN]
    assert loop.run(poll(ours, IN | OUT)) == [IN | OUT]
    theirs.close()


def test_poll_waits_until_its_mask_comes_true_and_not_for_more(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operation = poll(ours, IN)
    loop.submit(operation)
    loop.idle()
    theirs.sendall(b"x")
    assert loop.finish(operation) == [IN]
    loop.idle()
    assert loop.run(operation) == [IN]  # still true: nobody has read
    theirs.close()


def test_a_poll_does_not_complete_for_what_is_not_in_its_mask(loop: Loop) -> None:
    ours, theirs = loop.connection()
    for_input, again = poll(ours, IN), poll(ours, OUT)
    loop.submit(for_input)
    for _ in range(20):
        assert loop.run(again) == [OUT]
    assert for_input.pending
    theirs.sendall(b"x")
    assert loop.finish(for_input) == [IN]
    theirs.close()


def test_poll_reports_the_peers_end(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operation = poll(ours, IN)
    loop.submit(operation)
    loop.idle()
    theirs.close()
    assert loop.finish(operation)[0] & (IN | HUP)


def test_several_polls_a_receive_and_a_send_share_one_socket(loop: Loop) -> None:
    ours, theirs = loop.connection()
    outgoing = send(ours, bytes(1 << 20))
    while not outgoing.pending:
        loop.submit(outgoing)
        loop.turn(0.05)
    buffer = bytearray(1)
    waiting = [poll(ours, IN), poll(ours, IN), poll(ours, OUT), receive(ours, buffer)]
    loop.submit(*waiting)
    loop.idle()
    theirs.sendall(b"x")
    loop.finish(waiting[0], waiting[1], waiting[3])
    assert buffer == b"x"
    assert outgoing.pending
    assert waiting[2].pending
    theirs.recv(8 << 20)
    loop.finish(outgoing)
    theirs.recv(8 << 20)
    assert loop.finish(waiting[2]) == [OUT]
    theirs.close()


def test_poll_tells_when_a_connecting_socket_is_connected(loop: Loop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.socket()
        ours.setblocking(False)
        assert ours.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        descriptor = loop.attach(ours)
        assert loop.run(poll(descriptor, OUT)) == [OUT]
        theirs, _ = listener.accept()
        theirs.sendall(b"welcome")
        assert loop.run(receive(descriptor, bytearray(100))) == [7]
        theirs.close()


def test_poll_tells_when_a_connecting_socket_is_refused(loop: Loop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    ours = socket.socket()
    ours.setblocking(False)
    assert ours.connect_ex(address) == errno.EINPROGRESS
    descriptor = loop.attach(ours)
    (events,) = loop.run(poll(descriptor, OUT))
    assert events & (ERR | HUP)
    assert loop.run(send(descriptor, b"x"))[0] in (-errno.ECONNREFUSED, -errno.EPIPE)


def test_poll_works_on_both_ends_of_a_pipe(loop: Loop) -> None:
    reading, writing = os.pipe()
    source = loop.ring.attach(reading, is_socket=False)
    target = loop.ring.attach(writing, is_socket=False)
    readable = poll(source, IN)
    loop.submit(readable)
    assert loop.run(poll(target, OUT)) == [OUT]
    loop.idle()
    os.write(writing, b"x")
    assert loop.finish(readable) == [IN]
    loop.run(close(target))
    assert loop.run(poll(source, IN)) == [IN | HUP]


def test_a_regular_file_is_always_ready(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    assert loop.run(poll(disk, IN)) == [IN]
    assert loop.run(poll(disk, OUT)) == [OUT]


def test_another_process_of_the_loop_sees_readiness_made_by_a_thread(loop: Loop) -> None:
    ours, theirs = loop.connection()
    watching, sending = poll(ours, IN), call(lambda: theirs.send(b"x"))
    loop.submit(watching, sending)
    assert loop.finish(watching, sending) == [IN, 0]
    theirs.close()


@pytest.fixture
def channel() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours, context.socket(zmq.PAIR) as theirs:
        ours.linger = theirs.linger = 0
        ours.bind("inproc://channel")
        theirs.connect("inproc://channel")
        yield ours, theirs


def test_a_zeromq_socket_is_watched_by_its_descriptor(
    loop: Loop, channel: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]
) -> None:
    ours, theirs = channel
    descriptor = loop.ring.attach(os.dup(ours.fileno()), is_socket=False)
    received: list[bytes] = []
    for number in range(100):
        while not ours.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            operation = poll(descriptor, IN)
            loop.submit(operation)
            if number == len(received):
                theirs.send(b"%d" % number)
            loop.finish(operation)
        received.append(ours.recv(zmq.NOBLOCK))
    assert received == [b"%d" % number for number in range(100)]


def test_zeromqs_descriptor_tells_of_edges_so_its_events_must_be_asked_again(
    loop: Loop, channel: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]
) -> None:
    """Two messages, one edge: after the first was received only ZMQ_EVENTS tells of the second."""
    ours, theirs = channel
    descriptor = loop.ring.attach(os.dup(ours.fileno()), is_socket=False)
    theirs.send(b"first")
    theirs.send(b"second")
    assert loop.run(poll(descriptor, IN)) == [IN]
    assert ours.getsockopt(zmq.EVENTS) & zmq.POLLIN
    assert ours.recv(zmq.NOBLOCK) == b"first"
    operation = poll(descriptor, IN)
    loop.submit(operation)
    loop.idle()
    assert ours.getsockopt(zmq.EVENTS) & zmq.POLLIN
    assert ours.recv(zmq.NOBLOCK) == b"second"
    assert not ours.getsockopt(zmq.EVENTS) & zmq.POLLIN  # only now ZeroMQ arms the next edge
    theirs.send(b"third")
    assert loop.finish(operation) == [IN]
    assert ours.getsockopt(zmq.EVENTS) & zmq.POLLIN
    assert ours.recv(zmq.NOBLOCK) == b"third"


def test_closing_our_copy_of_zeromqs_descriptor_leaves_zeromq_working(
    loop: Loop, channel: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]
) -> None:
    ours, theirs = channel
    descriptor = loop.ring.attach(os.dup(ours.fileno()), is_socket=False)
    assert not ours.getsockopt(zmq.EVENTS) & zmq.POLLIN  # takes the edge that binding made
    loop.submit(poll(descriptor, IN))
    loop.idle()
    assert loop.run(close(descriptor)) == [0]
    theirs.send(b"still here")
    assert ours.poll(int(SECONDS_MAX * 1000)) == zmq.POLLIN
    assert ours.recv() == b"still here"
