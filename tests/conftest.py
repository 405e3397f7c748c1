"""For all tests: seeds are printed, and a test that leaks a child process or a descriptor fails."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support import processes
from support.waiting import wait_for

if TYPE_CHECKING:
    from support.s3 import S3

SEED_VARIABLE = "NBDSHARD_SEED"
LEAK_SECONDS = 30
TEMPORARY_FOLDER_VARIABLE = "PYTEST_DEBUG_TEMPROOT"  # where pytest makes each test's tmp_path


def pytest_configure() -> None:
    """Make the tests the same wherever they are started."""
    _keep_off_memory()
    _hear_signals()
    _keep_differences_short()


def _keep_off_memory() -> None:
    """tmp_path must be on a disk: a tmpfs cannot zero ranges, drop its page cache or refuse a size as disks do."""
    if _file_system(tempfile.gettempdir()) == "tmpfs" and _file_system("/var/tmp") != "tmpfs":
        os.environ.setdefault(TEMPORARY_FOLDER_VARIABLE, "/var/tmp")


def _hear_signals() -> None:
    """What a shell starts in the background ignores SIGINT, what nohup(1) starts SIGHUP, and so does all that this
    starts itself: no test of Ctrl-C or of a terminal that goes away would pass.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _keep_differences_short() -> None:
    """Where these are set pytest shows all of a difference: of a megabyte that takes it longer than any test may."""
    for variable in ("CI", "BUILD_NUMBER"):
        os.environ.pop(variable, None)


def _file_system(folder: str) -> str:
    """The type of the file system that holds `folder`, as /proc/self/mountinfo names it (proc(5)); "" if unknown."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for mount in Path("/proc/self/mountinfo").read_text().splitlines():
        if mount.split()[2] == number:
            return mount.partition(" - ")[2].split()[0]
    return ""


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
    """Cycles may hold what a test has dropped, and threads that end meanwhile leave more of them: collect those before
    blaming anyone.
    """
    for _ in range(LEAK_SECONDS):
        if not leaked():
            return
        gc.collect()
        with contextlib.suppress(TimeoutError):
            wait_for(f"leaked {what} to go", lambda: not leaked(), 1.0)
    if leaked():
        pytest.fail(f"leaked {what}: {leaked()}")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A store in memory, for all tests of a run: each has a prefix of its own in it."""
    from support.s3 import moto, warmed  # which imports what other tests do not need

    with moto() as found:
        yield warmed(found)


@pytest.fixture(scope="session")
def swift_s3() -> Iterator[S3]:
    """A store that keeps things on a disk and is no toy, for all tests of a run."""
    from support.s3 import warmed
    from support.swift import is_installed, swift

    if not is_installed():
        pytest.skip("Swift is not set up: `make swift` does that, and `make test`")
    with swift() as found:
        yield warmed(found)
