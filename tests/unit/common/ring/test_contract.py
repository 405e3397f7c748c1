"""What `submit` and `attach` refuse, how buffers are held, and how many operations there may be."""

from __future__ import annotations

import array
import errno
import gc
import os
import select
import socket
import threading
import weakref
from pathlib import Path

import pytest

from nbdshard.common.errors import BugError
from nbdshard.common.limits import RING_OPERATIONS_MAX
from nbdshard.common.ring import Descriptor, Kind, Operation, open_ring
from support.loops import Loop, call, close, poll, read, receive, send, write


class Tracked(bytearray):
    """A buffer whose end can be seen."""

    __slots__ = ("__weakref__",)


def test_buffers_cannot_be_resized_from_submit_to_completion(loop: Loop) -> None:
    ours, theirs = loop.connection()
    buffer = bytearray(10)
    view = memoryview(buffer)
    operation = Operation(Kind.RECEIVE, ours, buffers=[view])
    loop.submit(operation)
    operation.buffers = []  # even a careless owner
    view.release()
    for _ in range(2):
        with pytest.raises(BufferError):
            buffer.append(0)
        loop.idle()
    theirs.sendall(b"0123456789")
    assert loop.finish(operation) == [10]
    assert buffer == b"0123456789"
    buffer.append(0)
    theirs.close()


def test_buffers_are_held_until_completion_and_no_longer(loop: Loop) -> None:
    ours, theirs = loop.connection()
    for _ in range(100):
        buffer = Tracked(1000)
        life = weakref.ref(buffer)
        loop.submit(Operation(Kind.RECEIVE, ours, buffers=[memoryview(buffer)[10:20], memoryview(buffer)[30:]]))
        del buffer
        loop.turn(0.001)
        assert life() is not None
        theirs.sendall(b"x")
        loop.until(lambda: not loop.pending)
        gc.collect(0)
        assert life() is None
    theirs.close()


def test_the_ring_holds_an_operation_that_its_owner_dropped(loop: Loop) -> None:
    ours, theirs = loop.connection()
    loop.ring.submit(send(ours, b"kept ", bytes(bytearray(b"alive"))))
    gc.collect()
    (operation,) = loop.ring.wait(20)
    assert operation.result == 10
    assert theirs.recv(100) == b"kept alive"
    theirs.close()


def test_buffers_of_any_format_count_in_bytes(loop: Loop) -> None:
    ours, theirs = loop.connection()
    numbers = array.array("I", [0, 0])
    theirs.sendall(b"\1\0\0\0\2\0\0\0")
    assert loop.run(Operation(Kind.RECEIVE, ours, buffers=[memoryview(numbers)])) == [8]
    assert numbers.tolist() == [1, 2]
    assert loop.run(Operation(Kind.SEND, ours, buffers=[memoryview(numbers)])) == [8]
    assert theirs.recv(100) == b"\1\0\0\0\2\0\0\0"
    theirs.close()


def refused(loop: Loop, operation: Operation, match: str) -> None:
    before = operation.descriptor.pending if operation.descriptor else 0
    with pytest.raises(BugError, match=match):
        loop.ring.submit(operation)
    assert not operation.pending
    assert (operation.descriptor.pending if operation.descriptor else 0) == before


def test_an_operation_is_refused_while_it_is_pending(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operation = receive(ours, bytearray(1))
    loop.submit(operation)
    with pytest.raises(BugError, match="while it is pending"):
        loop.ring.submit(operation)
    theirs.sendall(b"x")
    assert loop.finish(operation) == [1]
    loop.idle()
    theirs.close()


def test_a_second_receive_or_send_on_a_stream_is_refused_while_one_is_pending(loop: Loop) -> None:
    ours, theirs = loop.connection()
    loop.submit(receive(ours, bytearray(1)), send(ours, b"x"))
    refused(loop, receive(ours, bytearray(1)), "RECEIVE for .* has one pending")
    refused(loop, send(ours, b"x"), "SEND for .* has one pending")
    theirs.sendall(b"x")
    loop.until(lambda: not loop.pending)
    assert loop.run(send(ours, b"x")) == [1]
    theirs.close()


def test_operations_that_make_no_sense_are_refused(loop: Loop, tmp_path: Path) -> None:
    ours, theirs = loop.connection()
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    refused(loop, receive(ours), "of no bytes")
    refused(loop, receive(ours, bytearray()), "of no bytes")
    refused(loop, send(ours, b"", b""), "of no bytes")
    refused(loop, Operation(Kind.RECEIVE, ours, buffers=[b"constant"]), "read-only buffer")
    refused(loop, Operation(Kind.READ, disk, buffers=[memoryview(b"constant")]), "read-only buffer")
    refused(loop, Operation(Kind.SEND, ours, buffers=[memoryview(b"with gaps")[::2]]), "with gaps")
    refused(loop, read(disk, -1, bytearray(1)), "at offset -1")
    refused(loop, write(disk, 1 << 63, b"x"), "at offset")
    refused(loop, Operation(Kind.SYNC), "without a descriptor")
    refused(loop, Operation(Kind.CALL), "without a function")
    refused(loop, Operation(Kind.CALL, disk), "without a function")
    refused(loop, receive(Descriptor(ours.number, True), bytearray(1)), "does not have")
    loop.idle()
    theirs.close()


def test_what_belongs_to_another_ring_is_refused(loop: Loop) -> None:
    other, _ = open_ring("epoll")
    ours, theirs = loop.connection()
    with pytest.raises(BugError, match="does not have"):
        other.submit(receive(ours, bytearray(1)))
    operation = receive(ours, bytearray(1))
    loop.submit(operation)
    with pytest.raises(BugError, match="pending on another ring"):
        other.cancel(operation)
    other.close()
    theirs.close()


def test_attach_refuses_what_is_attached_not_open_or_not_a_socket(loop: Loop, tmp_path: Path) -> None:
    ours, theirs = loop.connection()
    with pytest.raises(BugError, match="attached already"):
        loop.ring.attach(ours.number, is_socket=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.ring.attach(10_000, is_socket=False)
    number = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    with pytest.raises(BugError, match="not a socket"):
        loop.ring.attach(number, is_socket=True)
    os.close(number)
    theirs.close()


def test_a_blocking_socket_of_ours_is_refused(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(BugError, match="blocking"):
        loop.ring.attach(ours.fileno(), is_socket=True)


def test_as_many_operations_as_the_bound_says_are_in_flight_and_complete_once(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operations = [poll(ours, select.POLLIN) for _ in range(RING_OPERATIONS_MAX)]
    loop.submit(*operations[:5000])
    loop.idle()
    loop.submit(*operations[5000:])
    loop.idle()
    refused(loop, poll(ours, select.POLLIN), "allowed in flight")
    loop.run(close(loop.file(os.devnull, os.O_RDONLY)))  # which is always possible
    theirs.sendall(b"x")
    assert loop.finish(*operations) == [select.POLLIN] * RING_OPERATIONS_MAX
    loop.idle()
    theirs.close()


def test_as_many_operations_as_the_bound_says_can_be_cancelled_at_once(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operations = [poll(ours, select.POLLIN) for _ in range(RING_OPERATIONS_MAX)]
    loop.submit(*operations)
    loop.idle()
    for operation in operations:
        loop.ring.cancel(operation)
        loop.ring.cancel(operation)
    assert loop.finish(*operations) == [-errno.ECANCELED] * RING_OPERATIONS_MAX
    loop.idle()
    theirs.close()


def test_a_close_cancels_as_many_operations_as_there_may_be(loop: Loop) -> None:
    ours, theirs = loop.connection()
    operations = [poll(ours, select.POLLIN) for _ in range(RING_OPERATIONS_MAX - 1)]
    ending = close(ours)
    loop.submit(*operations)
    loop.idle()
    loop.submit(ending)
    loop.finish(ending)
    assert not loop.pending
    theirs.close()


def test_a_ring_works_in_a_thread_that_is_not_the_main_one(loop: Loop) -> None:
    results: list[object] = []

    def own_ring() -> None:
        ring, _ = open_ring(loop.ring.name)
        inner = Loop(ring)
        ours, theirs = inner.connection()
        theirs.sendall(b"x")
        operation = call(lambda: "value")
        results.extend(inner.run(receive(ours, bytearray(1)), operation))
        results.append(operation.value)
        theirs.close()
        ring.close()

    thread = threading.Thread(target=own_ring)
    thread.start()
    thread.join()
    assert results == [1, 0, "value"]
