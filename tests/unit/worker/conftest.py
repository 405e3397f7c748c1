"""The kernel's own pipes, for every test of what goes through them; and links between real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support.link_bench import LinkBench, link_bench
from support.pipes import opened
from support.sides import RINGS


@pytest.fixture
def plumbing() -> Iterator[SystemPlumbing]:
    one = SystemPlumbing()
    yield one
    one.close()


@pytest.fixture
def pipe(plumbing: SystemPlumbing) -> Iterator[Pipe]:
    """A pipe of 1 MiB."""
    one = opened(plumbing)
    yield one
    plumbing.close_pipe(one)


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bench(ring: str) -> Iterator[LinkBench]:
    with link_bench(ring) as one:
        yield one


@pytest.fixture(params=[False, True], ids=["unix", "tcp"])
def tcp(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)
