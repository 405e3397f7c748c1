"""How long `wait` waits, and what ends it early."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from support.loops import SECONDS_MAX, Loop, call, receive, send

DELAY_SECONDS = 0.05  # until something happens that is to find the loop waiting


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Calls a function on SIGUSR1, until the test is over."""
    earlier = signal.getsignal(signal.SIGUSR1)

    def install(function: Callable[[], None]) -> None:
        def handler(_number: int, _frame: FrameType | None) -> None:
            function()

        signal.signal(signal.SIGUSR1, handler)

    yield install
    signal.signal(signal.SIGUSR1, earlier)


def later(function: Callable[[], None]) -> threading.Thread:
    timer = threading.Timer(DELAY_SECONDS, function)
    timer.start()
    return timer


def seconds_of(function: Callable[[], object]) -> float:
    started = time.monotonic()
    function()
    return time.monotonic() - started


def test_wait_without_anything_to_do_lasts_its_timeout(loop: Loop) -> None:
    assert 0.1 <= seconds_of(lambda: loop.turn(0.1)) < SECONDS_MAX / 2


def test_wait_of_zero_and_of_less_returns_at_once(loop: Loop) -> None:
    assert seconds_of(lambda: loop.turn(0)) < SECONDS_MAX / 2
    assert seconds_of(lambda: loop.turn(-5.0)) < SECONDS_MAX / 2


def test_wait_of_zero_returns_what_is_complete(loop: Loop) -> None:
    ours, theirs = loop.connection()
    theirs.sendall(b"x")
    operation = receive(ours, bytearray(1))
    loop.submit(operation)
    assert loop.turn(0) == [operation]
    theirs.close()


def test_wait_returns_everything_that_is_complete_at_once(loop: Loop) -> None:
    connections = [loop.connection() for _ in range(100)]
    for _, theirs in connections:
        theirs.sendall(b"x")
    operations = [receive(ours, bytearray(1)) for ours, _ in connections]
    loop.submit(*operations)
    assert set(loop.turn()) == set(operations)
    for _, theirs in connections:
        theirs.close()


def test_an_operation_may_be_submitted_again_as_soon_as_it_has_completed(loop: Loop) -> None:
    ours, theirs = loop.connection()
    buffer = bytearray(1)
    operation = receive(ours, buffer)
    theirs.sendall(bytes(range(256)))
    received = bytearray()
    for _ in range(256):
        loop.run(operation)
        received += buffer
    assert received == bytes(range(256))
    theirs.close()


def test_wake_from_another_thread_ends_a_wait(loop: Loop) -> None:
    timer = later(loop.ring.wake)
    assert seconds_of(lambda: loop.turn()) < SECONDS_MAX / 2
    timer.join()


def test_wake_before_a_wait_ends_that_wait_and_not_the_one_after(loop: Loop) -> None:
    for _ in range(100_000):  # more than a pipe holds
        loop.ring.wake()
    assert seconds_of(lambda: loop.turn()) < SECONDS_MAX / 2
    assert seconds_of(lambda: loop.turn(0.1)) >= 0.1


def test_wake_from_a_signal_handler_ends_a_wait(loop: Loop, on_signal: Callable[[Callable[[], None]], None]) -> None:
    handled: list[int] = []
    on_signal(lambda: (handled.append(1), loop.ring.wake())[1])
    timer = later(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert seconds_of(lambda: loop.turn()) < SECONDS_MAX / 2
    timer.join()
    assert handled == [1]


def test_a_signal_ends_a_wait_even_if_its_handler_does_nothing(
    loop: Loop, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    on_signal(lambda: None)
    timer = later(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert seconds_of(lambda: loop.turn()) < SECONDS_MAX / 2
    timer.join()


def test_a_signal_that_came_just_before_a_wait_is_not_slept_through(
    loop: Loop, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    on_signal(lambda: None)
    signal.raise_signal(signal.SIGUSR1)
    assert seconds_of(lambda: loop.turn()) < SECONDS_MAX / 2


def test_a_handler_that_raises_loses_no_completion(loop: Loop, on_signal: Callable[[Callable[[], None]], None]) -> None:
    ours, theirs = loop.connection()

    def interrupt() -> None:
        raise KeyboardInterrupt

    on_signal(interrupt)
    operation = receive(ours, bytearray(1))
    loop.submit(operation)
    timer = threading.Timer(DELAY_SECONDS, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    def wait() -> None:
        timer.start()  # in here: on a busy machine the signal comes before the wait, and would end the whole run
        loop.turn()

    with pytest.raises(KeyboardInterrupt):
        wait()
    timer.join()
    theirs.sendall(b"x")
    assert loop.finish(operation) == [1]
    theirs.close()


def test_a_storm_of_signals_disturbs_no_transfer(loop: Loop, on_signal: Callable[[Callable[[], None]], None]) -> None:
    handled: list[int] = []
    on_signal(lambda: handled.append(1))
    stop = threading.Event()

    def storm() -> None:
        while not stop.wait(0.0005):
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        left, right = loop.connection()
        target = loop.attach(right)
        payload = os.urandom(16 << 20)
        received = bytearray(len(payload))
        outgoing, incoming, sent, got = send(left, payload), receive(target, received), 0, 0
        loop.submit(outgoing, incoming)
        while got < len(payload):
            for operation in loop.turn():
                assert operation.result > 0
                if operation is outgoing:
                    sent += operation.result
                    outgoing.buffers = [memoryview(payload)[sent:]]
                else:
                    got += operation.result
                    incoming.buffers = [memoryview(received)[got:]]
                if operation.buffers[0]:
                    loop.submit(operation)
    finally:
        stop.set()
        thread.join()
    assert received == payload
    assert handled


def test_completions_of_threads_end_a_wait(loop: Loop) -> None:
    ours, theirs = loop.connection()
    loop.submit(receive(ours, bytearray(1)))
    operation = call(lambda: "done")
    assert seconds_of(lambda: loop.run(operation)) < SECONDS_MAX / 2
    theirs.close()
