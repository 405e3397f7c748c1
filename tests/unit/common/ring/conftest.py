"""Every test here runs on every ring; after each, no thread may be left (nor a descriptor: tests/conftest.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nbdshard.common.ring import Ring, open_ring
from support.loops import IO_URING_REFUSAL, Loop


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    threads = threading.active_count()
    yield
    assert threading.active_count() <= threads


def _open(name: str) -> Ring:
    if name == "impatient":
        from support.impatient import ImpatientRing

        return ImpatientRing()
    ring, _ = open_ring(name)
    assert ring.name == name
    return ring


IF_ALLOWED = pytest.mark.skipif(bool(IO_URING_REFUSAL), reason=IO_URING_REFUSAL)


@pytest.fixture(
    params=[pytest.param("io_uring", marks=IF_ALLOWED), pytest.param("impatient", marks=IF_ALLOWED), "epoll"]
)
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    """`impatient` is io_uring where the ring itself has to wait for sockets."""
    ring = _open(request.param)
    yield Loop(ring)
    ring.close()
