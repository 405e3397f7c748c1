"""Every test here runs on every ring; after each, no thread may be left (nor a descriptor: tests/conftest.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nbdshard.common.ring import open_ring
from nbdshard.common.ring.choose import Unusable, open_io_uring
from support.loops import Loop


def _io_uring_refusal() -> str:
    try:
        open_io_uring().close()
    except Unusable as reason:
        return str(reason)
    return ""


REFUSAL = _io_uring_refusal()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    threads = threading.active_count()
    yield
    assert threading.active_count() <= threads


@pytest.fixture(
    params=[
        pytest.param("io_uring", marks=pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL or "io_uring works")),
        "epoll",
    ]
)
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    ring, _ = open_ring(request.param)
    assert ring.name == request.param
    yield Loop(ring)
    ring.close()
