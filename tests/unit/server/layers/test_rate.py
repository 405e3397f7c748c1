"""server/layers/rate.py"""

from __future__ import annotations

import threading

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.limits import RATE_BURST_SECONDS
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.layers.rate import Throttle

MIB = 1 << 20
PIECE = Range(0, 256 << 10)


def test_bytes_may_be_moved_at_the_rate_they_come_at() -> None:
    throttle = Throttle(MIB, now=100.0)
    assert [throttle.take(MIB, now=100.0) for _ in range(3)] == pytest.approx([101.0, 102.0, 103.0])
    assert throttle.take(MIB, now=103.1) == pytest.approx(104.0)


def test_what_was_not_used_is_kept_up_to_a_burst() -> None:
    throttle = Throttle(MIB, now=0.0)
    burst = int(MIB * RATE_BURST_SECONDS)
    assert throttle.take(burst, now=1000.0) == 1000.0
    assert throttle.take(MIB, now=1000.0) == pytest.approx(1001.0)


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    throttle = Throttle(MIB, now=0.0)
    assert throttle.take(10 * MIB, now=0.0) == pytest.approx(10.0)
    assert throttle.take(1, now=0.0) > 10.0


class Pauses(threading.Event):
    """Notes what is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return False


def limited(parameters: str, ending: threading.Event) -> Backend:
    return open_backend(Wanted("disk", "raw", f"rate:memory:1M?{parameters}"), ending=ending)


def write(backend: Backend) -> None:
    backend.write(PIECE, memoryview(bytes(PIECE.length)))


def test_reads_and_writes_share_a_rate() -> None:
    pauses = Pauses()
    backend = limited("rate=64k", pauses)
    backend.read(PIECE)
    write(backend)
    first, second = pauses.seconds
    assert second > first + 3  # the time that the read takes, less what has passed since


@pytest.mark.parametrize(("parameter", "waits"), [("rate-read", ["read"]), ("rate-write", ["write"])])
def test_a_rate_of_one_kind_leaves_the_other_alone(parameter: str, waits: list[str]) -> None:
    found = []
    for name, call in (("read", lambda backend: backend.read(PIECE)), ("write", write)):
        pauses = Pauses()
        call(limited(f"{parameter}=64k", pauses))
        found += [name] * bool(pauses.seconds)
    assert found == waits


def test_zeroes_trims_and_flushes_do_not_count() -> None:
    pauses = Pauses()
    backend = limited("rate=64k", pauses)
    backend.zero(PIECE, may_punch=True, fast=True)
    backend.trim(PIECE)
    backend.flush()
    assert not pauses.seconds


def test_nothing_waits_once_the_server_ends() -> None:
    ending = threading.Event()
    ending.set()
    backend = limited("rate=64k", ending)
    for _ in range(1000):
        backend.read(PIECE)


@pytest.mark.parametrize(
    ("parameters", "what"),
    [("", "rate: no rate is given"), ("?rate=1k", "rate=1k: at least 64k"), ("?rate=fast", "'fast' is not a size")],
)
def test_a_rate_that_cannot_be_meant_is_refused(parameters: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        open_backend(Wanted("disk", "raw", f"rate:memory:1M{parameters}"))
