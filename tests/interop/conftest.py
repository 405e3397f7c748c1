"""For all interop tests: each runs on both rings unless it names one itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.served import SERVED_SIZE, Served, serving
from support.sides import RINGS


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    """Both implementations of the ring, in turn."""
    return str(request.param)


@pytest.fixture(params=["file", "memory", "sharded"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """An export of zeroes on each kind of backend that needs nothing else."""
    driver, conn = {
        "file": ("raw", f"file:{images.empty_image(tmp_path / 'image', SERVED_SIZE)}"),
        "memory": ("raw", f"memory:{SERVED_SIZE}"),
        "sharded": ("sharded", f"file:{tmp_path}/?size={SERVED_SIZE}&chunk=64K"),
    }[request.param]
    with serving(conn, "--tcp", "127.0.0.1:0", driver=driver) as found:
        yield found


@pytest.fixture
def memory() -> Iterator[Served]:
    """An export in memory, by TCP, too."""
    with serving("memory:64M", "--tcp", "127.0.0.1:0", "--verbose") as found:
        yield found
