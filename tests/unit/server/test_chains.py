"""Every driver, store and chain, without a server around it: random calls against a reference."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import Wanted, open_backend
from support import images
from support.backends import content_of
from support.chains import CHAINS, SIZE, Chain
from support.lots import Lots, Request

THREADS = 8
REQUESTS, REQUESTS_SLOW = 200, 40  # of each thread
EDGES = (0, 512, 4096, 65_536, 131_072, SIZE - 4096, SIZE)


@contextmanager
def opened(chain: Chain, folder: Path) -> Iterator[Backend]:
    with chain.ready(folder) as conn:
        backend = open_backend(Wanted("disk", chain.driver, conn))
        try:
            yield backend
        finally:
            backend.close()


def carry_out(backend: Backend, request: Request) -> object:
    """What Lots.done is to be told. Raises OSError."""
    if request.kind == "flush":
        backend.flush()
        return None
    where, answer = Range.of(request.start, request.length), None
    match request.kind:
        case "write":
            backend.write(where, memoryview(request.data))
        case "zero":
            backend.zero(where, may_punch=request.may_punch, fast=request.fast)
        case "trim":
            backend.trim(where)
        case "extents":
            answer = [(piece.length, flags) for piece, flags in backend.extents(where)]
        case _:
            return content_of(backend, where)
    if request.fua:
        backend.flush()
    return answer


def see_through(backend: Backend, lots: Lots, request: Request | None) -> None:
    """`request`, and what follows from it."""
    while request is not None:
        try:
            answer = carry_out(backend, request)
        except OSError as error:
            if not (request.fast and error.errno == errno.ENOTSUP):
                raise
            lots.give_back(request)
            return
        request = lots.done(request, answer)


def fresh(backend: Backend, seed: int) -> Lots:
    return Lots(SIZE, seed, can_fast=bool(backend.flags & TransmissionFlag.SEND_FAST_ZERO))


@pytest.mark.usefixtures("s3")  # what a process opens once for all object stores is open, and no leak of one test
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_calls_of_many_threads_leave_what_a_reference_holds(chain: Chain, seed: int, tmp_path: Path) -> None:
    with opened(chain, tmp_path) as backend, ThreadPoolExecutor(THREADS) as pool:
        lots = fresh(backend, seed)

        def work() -> None:
            for _ in range(REQUESTS if chain.is_quick else REQUESTS_SLOW):
                see_through(backend, lots, lots.take())

        for thread in [pool.submit(work) for _ in range(THREADS)]:
            thread.result()
        assert content_of(backend, Range(0, SIZE)) == lots.reference


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("where", [Range(0, SIZE - 1000), Range(1000, SIZE), Range(70_000, 1_000_000), Range(0, SIZE)])
def test_zeroes_that_cannot_be_fast_change_nothing(chain: Chain, where: Range, tmp_path: Path) -> None:
    data = images.random_bytes(SIZE, 7)
    with opened(chain, tmp_path) as backend:
        backend.write(Range(0, SIZE), memoryview(data))
        expected = bytearray(data)
        try:
            backend.zero(where, may_punch=True, fast=True)
            expected[where.start : where.end] = bytes(where.length)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
        assert content_of(backend, Range(0, SIZE)) == expected


def offsets() -> st.SearchStrategy[int]:
    """Near the edges of blocks and chunks, where mistakes are made."""
    near = st.builds(int.__add__, st.sampled_from(EDGES), st.integers(-2, 2))
    return st.one_of(near, st.integers(0, SIZE)).map(lambda at: min(max(at, 0), SIZE))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kind = draw(st.sampled_from(("write", "zero", "trim", "read", "extents", "flush")))
    start, end = sorted((draw(offsets()), draw(offsets())))
    start = min(start, SIZE - 1)
    length = max(end - start, 1)
    data = (images.random_bytes(length, draw(st.integers(0, 3))) if draw(st.booleans()) else bytes(length)) * (
        kind == "write"
    )
    may_punch, fast = draw(st.booleans()), kind == "zero" and draw(st.booleans())
    return Request(kind, start, length, data, may_punch=may_punch, fast=fast)


QUICK = {name: chain for name, chain in CHAINS.items() if chain.is_quick}


@pytest.mark.parametrize("chain", QUICK.values(), ids=QUICK)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(requests(), min_size=1, max_size=12))
def test_any_calls_leave_what_a_reference_holds(chain: Chain, asked: list[Request]) -> None:
    with tempfile.TemporaryDirectory() as folder, opened(chain, Path(folder)) as backend:
        lots = fresh(backend, 0)
        for request in asked:
            see_through(backend, lots, request)
        assert content_of(backend, Range(0, SIZE)) == lots.reference
