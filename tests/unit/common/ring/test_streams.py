"""RECEIVE and SEND on sockets."""

from __future__ import annotations

import errno
import os
import socket
import struct

from support.loops import Loop, close, receive, send


def test_receive_gives_what_has_arrived_even_if_it_is_less_than_asked_for(loop: Loop) -> None:
    ours, theirs = loop.connection()
    buffer = bytearray(8)
    theirs.sendall(b"abc")
    assert loop.run(receive(ours, buffer)) == [3]
    assert buffer == b"abc\0\0\0\0\0"
    theirs.close()


def test_receive_waits_until_something_arrives(loop: Loop) -> None:
    ours, theirs = loop.connection()
    buffer = bytearray(8)
    operation = receive(ours, buffer)
    loop.submit(operation)
    loop.idle()
    theirs.sendall(b"late")
    assert loop.finish(operation) == [4]
    assert buffer[:4] == b"late"
    theirs.close()


def test_receive_scatters_over_its_buffers_in_order(loop: Loop) -> None:
    ours, theirs = loop.connection()
    first, second, third = bytearray(3), bytearray(4), bytearray(5)
    theirs.sendall(b"0123456789")
    assert loop.run(receive(ours, first, memoryview(second)[1:3], third)) == [10]
    assert (first, second, third) == (b"012", b"\x0034\0", b"56789")
    theirs.close()


def test_send_gathers_its_buffers_in_order(loop: Loop) -> None:
    ours, theirs = loop.connection()
    assert loop.run(send(ours, b"head", b"", memoryview(b"--body--")[2:6])) == [8]
    assert theirs.recv(100) == b"headbody"
    theirs.close()


def test_send_to_a_slow_reader_is_short_and_the_next_waits_for_room(loop: Loop) -> None:
    ours, theirs = loop.connection()
    payload = os.urandom(4 << 20)
    (first,) = loop.run(send(ours, payload))
    assert 0 < first < len(payload)
    sent = first
    operation = send(ours, memoryview(payload)[sent:])
    loop.submit(operation)
    received = bytearray()
    while len(received) < len(payload):
        theirs.setblocking(False)
        try:
            received += theirs.recv(1 << 20)
        except BlockingIOError:
            pass
        if operation in loop.turn(0.01):
            sent += operation.result
            if sent < len(payload):
                operation.buffers = [memoryview(payload)[sent:]]
                loop.submit(operation)
    assert received == payload
    theirs.close()


def test_receive_of_more_buffers_than_one_call_may_have_fills_the_first_of_them(loop: Loop) -> None:
    ours, theirs = loop.connection()
    buffer = bytearray(1500)
    theirs.sendall(bytes(1500))
    pieces = [memoryview(buffer)[index : index + 1] for index in range(1500)]
    assert loop.run(receive(ours, *pieces)) == [1024]
    theirs.close()


def test_receive_after_the_peers_end_gives_zero_again_and_again(loop: Loop) -> None:
    ours, theirs = loop.connection()
    theirs.sendall(b"last")
    theirs.close()
    assert loop.run(receive(ours, bytearray(10))) == [4]
    assert loop.run(receive(ours, bytearray(10))) == [0]
    assert loop.run(receive(ours, bytearray(10))) == [0]


def test_the_peers_end_completes_a_receive_that_waits(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operation = receive(ours, bytearray(10))
    loop.submit(operation)
    loop.idle()
    theirs.close()
    assert loop.finish(operation) == [0]


def test_send_to_a_peer_that_has_gone_gives_epipe_and_no_signal(loop: Loop) -> None:
    ours, theirs = loop.connection()
    theirs.close()
    assert loop.run(send(ours, b"anyone?")) == [-errno.EPIPE]


def test_a_reset_completes_a_receive_with_econnreset(loop: Loop) -> None:
    ours, theirs = loop.tcp()
    operation = receive(ours, bytearray(10))
    loop.submit(operation)
    loop.idle()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    assert loop.finish(operation) == [-errno.ECONNRESET]


def test_a_reset_completes_a_send_that_waits_for_room(loop: Loop) -> None:
    ours, theirs = loop.tcp()
    operation = send(ours, bytes(1 << 20))
    for _ in range(200):  # until both kernel buffers are full
        loop.submit(operation)
        loop.turn(0.05)
        if operation.pending:
            break
    assert operation.pending
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    loop.finish(operation)
    # The rest of a short count, or the reset itself if nothing fitted any more.
    assert operation.result in (-errno.ECONNRESET, -errno.EPIPE)


def test_both_directions_of_one_socket_wait_at_the_same_time(loop: Loop) -> None:
    ours, theirs = loop.connection()
    buffer = bytearray(4)
    incoming, outgoing = receive(ours, buffer), send(ours, bytes(1 << 20))
    while True:  # fill it
        loop.submit(outgoing)
        loop.turn(0.05)
        if outgoing.pending:
            break
    loop.submit(incoming)
    loop.idle()
    theirs.sendall(b"ping")
    assert loop.finish(incoming) == [4]
    assert outgoing.pending
    theirs.recv(4 << 20)
    (count,) = loop.finish(outgoing)
    assert count > 0
    theirs.close()


def test_a_listening_and_a_connecting_socket_work_through_close(loop: Loop) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    ours = loop.attach(listener)
    assert loop.run(close(ours)) == [0]
    with socket.socket() as probe:
        assert probe.connect_ex(address) == errno.ECONNREFUSED
