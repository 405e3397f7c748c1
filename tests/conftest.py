"""For all tests: seeds are printed, and a test that leaks a child process or a descriptor fails."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest

from support import processes
from support.waiting import wait_for

SEED_VARIABLE = "NBDSHARD_SEED"
LEAK_SECONDS = 5.0


def pytest_report_header() -> str:
    return f"seed: {seed_of_run()} ({SEED_VARIABLE} chooses another)"


def seed_of_run() -> int:
    """The seed of everything random in this run."""
    return int(os.environ.get(SEED_VARIABLE, "1"))


@pytest.fixture
def seed() -> int:
    """The run's seed; printed, so a failure shows it."""
    number = seed_of_run()
    print(f"seed {number}")
    return number


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Children and descriptors after the test are those from before it."""
    own = os.getpid()
    children, descriptors = set(processes.children(own)), processes.descriptors()
    yield
    _await_gone("children", lambda: _new_children(own, children))
    _await_gone("descriptors", lambda: _new_descriptors(descriptors))


def _new_children(own: int, before: set[int]) -> dict[int, str]:
    return {pid: processes.command_line(pid) for pid in set(processes.children(own)) - before}


def _new_descriptors(before: dict[int, str]) -> dict[int, str]:
    """Descriptors that were not open before; a listing's own descriptor is gone by the time it is looked at."""
    now = {number: target for number, target in processes.descriptors().items() if number not in before}
    return {number: target for number, target in now.items() if os.path.exists(f"/proc/self/fd/{number}")}


def _await_gone(what: str, leaked: Callable[[], dict[int, str]]) -> None:
    """Cycles may hold what a test has dropped: collect them before blaming anyone."""
    if not leaked():
        return
    gc.collect()
    try:
        wait_for(f"leaked {what} to go", lambda: not leaked(), LEAK_SECONDS)
    except TimeoutError:
        pytest.fail(f"leaked {what}: {leaked()}")
