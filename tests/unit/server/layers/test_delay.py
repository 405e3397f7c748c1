"""server/layers/delay.py"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import Wanted, open_backend

BLOCK = Range(0, 4096)


class Clock(threading.Event):
    """Notes what is waited for; `meeting` parties have to wait at once before one of them goes on."""

    def __init__(self, meeting: int = 1) -> None:
        super().__init__()
        self.waits: list[float | None] = []
        self._meeting = threading.Barrier(meeting)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        self._meeting.wait(30)
        return False


def delayed(parameters: str, ending: threading.Event) -> Backend:
    return open_backend(Wanted("disk", "raw", f"delay:memory:1M?{parameters}"), ending=ending)


def test_each_operation_waits_as_long_as_it_was_told_to() -> None:
    clock = Clock()
    backend = delayed("delay=1s&delay-read=200ms&delay-flush=0s", clock)
    backend.write(BLOCK, memoryview(bytes(4096)))
    backend.zero(BLOCK, may_punch=True, fast=False)
    backend.trim(BLOCK)
    backend.cache(BLOCK)
    backend.extents(BLOCK)
    assert clock.waits == [1.0] * 5
    backend.read(BLOCK)
    backend.flush()
    assert clock.waits[5:] == [0.2]


def test_what_was_not_named_does_not_wait() -> None:
    clock = Clock()
    backend = delayed("delay-write=1s", clock)
    backend.read(BLOCK)
    assert not clock.waits


def test_requests_wait_side_by_side() -> None:
    clock = Clock(meeting=8)
    backend = delayed("delay=1s", clock)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(backend.read, [BLOCK] * 8))  # one after another they would never meet
    assert len(clock.waits) == 8


def test_nothing_waits_once_the_server_ends() -> None:
    ending = threading.Event()
    ending.set()
    delayed("delay=600s", ending).read(BLOCK)


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ("delay=601s", "delay=601s: at most 600s are waited"),
        ("delay-read=5", "'5' is not a span of time"),
        ("read-only=no", "memory:1M: delay: nothing is to wait; delay=100ms, say"),
    ],
)
def test_a_delay_that_cannot_be_meant_is_refused(parameters: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        delayed(parameters, threading.Event())
