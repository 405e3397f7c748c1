"""CALL: functions on threads, beside a loop that goes on."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from nbdshard.common.limits import RING_CLOSE_SECONDS, RING_THREADS_MAX
from support.loops import SECONDS_MAX, Loop, call, close, receive, send, sync
from support.waiting import wait_for


def test_a_call_completes_with_its_value(loop: Loop) -> None:
    operation = call(lambda: {"answer": 42})
    assert loop.run(operation) == [0]
    assert operation.value == {"answer": 42}


def test_a_call_that_raises_completes_with_its_exception(loop: Loop) -> None:
    operation = call(lambda: 1 // 0)
    assert loop.run(operation) == [-1]
    assert isinstance(operation.value, ZeroDivisionError)


def test_a_call_that_ends_its_thread_does_not(loop: Loop) -> None:
    def leave() -> None:
        raise SystemExit(3)

    assert loop.run(*(call(leave) for _ in range(RING_THREADS_MAX + 1))) == [-1] * (RING_THREADS_MAX + 1)
    assert loop.run(call(lambda: None)) == [0]


def test_a_used_operation_does_not_keep_the_value_of_its_last_run(loop: Loop) -> None:
    operation = call(lambda: "value")
    loop.run(operation)
    operation.function = lambda: None
    loop.run(operation)
    assert operation.value is None


def test_many_calls_all_complete(loop: Loop) -> None:
    operations = [call(lambda index=index: index * index) for index in range(1000)]  # type: ignore[misc]
    loop.run(*operations)
    assert [operation.value for operation in operations] == [index * index for index in range(1000)]


def test_calls_run_on_other_threads_of_a_bounded_number(loop: Loop) -> None:
    names = set()
    operations = [call(lambda: names.add(threading.current_thread())) for _ in range(200)]
    loop.run(*operations)
    assert threading.main_thread() not in names
    assert len(names) <= RING_THREADS_MAX


def test_a_call_that_needs_the_interpreter_runs_while_the_loop_waits(loop: Loop) -> None:
    """A wait that kept the interpreter's lock would let this run only after the timeout of the wait."""
    operation = call(lambda: sum(index % 7 for index in range(300_000)))
    loop.submit(operation)
    assert loop.turn(SECONDS_MAX) == [operation]


def test_the_loop_goes_on_while_calls_block(loop: Loop) -> None:
    ours, theirs = loop.connection()
    echo = loop.attach(theirs)
    gate = threading.Event()
    blocked = [call(lambda: gate.wait(SECONDS_MAX)) for _ in range(RING_THREADS_MAX)]
    loop.submit(*blocked)
    buffer = bytearray(4)
    for number in range(200):
        ball = number.to_bytes(4, "big")
        assert loop.run(send(ours, ball), receive(echo, buffer)) == [4, 4]
        assert buffer == ball
    assert loop.pending == set(blocked)
    gate.set()
    loop.finish(*blocked)
    assert [operation.value for operation in blocked] == [True] * RING_THREADS_MAX


def test_cancelling_a_call_that_has_not_begun_prevents_it(loop: Loop) -> None:
    gate = threading.Event()
    ran: list[int] = []
    blocked = [call(lambda: gate.wait(SECONDS_MAX)) for _ in range(RING_THREADS_MAX)]
    waiting = call(lambda: ran.append(1))
    loop.submit(*blocked, waiting)
    loop.turn(0.01)
    loop.ring.cancel(waiting)
    assert loop.finish(waiting) == [-errno.ECANCELED]
    gate.set()
    loop.finish(*blocked)
    assert ran == []


def test_a_cancelled_call_is_returned_by_the_next_wait_at_once(loop: Loop) -> None:
    gate = threading.Event()
    blocked = [call(lambda: gate.wait(SECONDS_MAX)) for _ in range(RING_THREADS_MAX)]
    waiting = call(lambda: None)
    loop.submit(*blocked, waiting)
    loop.turn(0.01)
    loop.ring.cancel(waiting)
    started = time.monotonic()
    assert loop.turn() == [waiting]
    assert time.monotonic() - started < SECONDS_MAX / 2
    gate.set()
    loop.finish(*blocked)


def test_cancelling_a_call_that_runs_lets_it_end(loop: Loop) -> None:
    begun, gate = threading.Event(), threading.Event()
    operation = call(lambda: (begun.set(), gate.wait(SECONDS_MAX))[1])
    loop.submit(operation)
    loop.until(begun.is_set)
    loop.ring.cancel(operation)
    loop.idle()
    gate.set()
    assert loop.finish(operation) == [0]
    assert operation.value is True


def test_close_waits_for_a_call_that_uses_the_descriptor(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    begun, gate = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        gate.wait(SECONDS_MAX)
        return os.pwrite(disk.number, b"still open", 0)

    operation, ending = call(work, disk), close(disk)
    loop.submit(operation)
    loop.until(begun.is_set)
    loop.submit(ending)
    loop.idle()
    gate.set()
    loop.finish(operation, ending)
    assert (operation.result, operation.value, ending.result) == (0, 10, 0)


def test_sync_runs_beside_the_loop(loop: Loop, tmp_path: Path) -> None:
    disk = loop.file(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    assert loop.run(*(sync(disk) for _ in range(20))) == [0] * 20


def test_closing_the_ring_waits_for_a_call_that_runs(loop: Loop) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        threading.Event().wait(0.2)
        ended.set()

    loop.submit(call(work))
    loop.until(begun.is_set)
    loop.ring.close()
    assert ended.is_set()


@pytest.mark.long
def test_closing_the_ring_does_not_wait_for_ever_for_a_call_that_never_ends(loop: Loop) -> None:
    gate, threads = threading.Event(), threading.active_count()
    loop.submit(call(gate.wait))
    loop.turn(0.01)
    started = time.monotonic()
    loop.ring.close()
    assert RING_CLOSE_SECONDS <= time.monotonic() - started < RING_CLOSE_SECONDS + 5
    gate.set()
    wait_for("its thread to end", lambda: threading.active_count() == threads)
