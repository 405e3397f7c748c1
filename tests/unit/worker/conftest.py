"""The kernel's own pipes, for every test of what goes through them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdshard.worker.pipes import Pipe
from nbdshard.worker.plumbing import SystemPlumbing
from support.pipes import opened


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
