"""Which ring is chosen, and the one line that says why. The refusals are real: see support/refused.py."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import support.refused
from nbdshard.common.errors import UserError
from nbdshard.common.ring import open_ring
from nbdshard.common.ring.choose import OPCODES, Unusable, explain, kernel_version, open_io_uring
from support import processes
from support.loops import IO_URING_REFUSAL

NEEDS_IO_URING = pytest.mark.skipif(bool(IO_URING_REFUSAL), reason=IO_URING_REFUSAL)

REFUSALS = [
    ("EPERM", "io_uring is refused: EPERM; a seccomp profile forbids it"),
    ("ENOSYS", "io_uring is refused: ENOSYS; a seccomp profile hides it"),
    ("EMFILE", "io_uring is refused: EMFILE; too many open files"),
    ("EINVAL", "io_uring is refused: EINVAL; the kernel does not know the flags it is opened with"),
    ("ENOMEM", "io_uring is refused: ENOMEM; not enough memory for its queues, see ulimit -l and ulimit -v"),
    ("register", "io_uring is refused: EPERM; a seccomp profile forbids it"),
    ("module", "the Python module liburing is not installed"),
]


def chosen(cause: str, wish: str) -> str:
    """The line of `open_ring(wish)` in a process of its own that suffers from `cause`."""
    command = [sys.executable, str(Path(support.refused.__file__)), cause, wish]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.strip()


def host(release: str, machine: str = "x86_64") -> os.uname_result:
    return os.uname_result(("Linux", "here", release, "#1", machine))


@NEEDS_IO_URING
@pytest.mark.parametrize(("cause", "reason"), REFUSALS)
def test_epoll_is_chosen_where_io_uring_is_refused_and_the_line_says_why(cause: str, reason: str) -> None:
    assert chosen(cause, "auto") == f"ring: epoll ({reason})"


@NEEDS_IO_URING
@pytest.mark.parametrize(("cause", "reason"), REFUSALS)
def test_io_uring_by_force_is_an_error_of_one_line_where_it_is_refused(cause: str, reason: str) -> None:
    assert chosen(cause, "io_uring") == f"UserError: --ring io_uring: {reason}; use --ring epoll"


def test_epoll_by_force_asks_nothing_of_io_uring() -> None:
    assert chosen("EPERM", "epoll") == "ring: epoll (as asked for)"
    assert chosen("module", "epoll") == "ring: epoll (as asked for)"


@NEEDS_IO_URING
def test_io_uring_is_chosen_where_it_works() -> None:
    assert chosen("nothing", "auto") == "ring: io_uring"
    assert chosen("nothing", "io_uring") == "ring: io_uring (as asked for)"


def test_an_unknown_ring_is_the_users_error() -> None:
    with pytest.raises(UserError) as caught:
        open_ring("kqueue")
    assert str(caught.value) == "--ring: unknown ring 'kqueue'; it is io_uring, epoll or auto"


@pytest.mark.parametrize("release", ["5.15.0-100-generic", "4.18.0", "garbage"])
def test_a_kernel_before_6_is_too_old(release: str) -> None:
    with pytest.raises(Unusable, match=f"^io_uring of Linux {release} is too old, 6.0 is needed$"):
        open_io_uring(host(release))


def test_an_architecture_without_a_wheel_is_told_from_a_module_that_was_not_installed() -> None:
    program = (
        "import os, sys; sys.modules['liburing'] = None\n"
        "from nbdshard.common.ring.choose import *\n"
        "try: open_io_uring(os.uname_result(('Linux', 'here', '6.1.0', '#1', 'aarch64')))\n"
        "except Unusable as reason: print(reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "the Python module liburing is not built for aarch64\n"


@NEEDS_IO_URING
def test_a_kernel_that_lacks_an_opcode_is_told_with_its_name() -> None:
    with pytest.raises(Unusable, match=r"^io_uring of Linux 6\.18\.0 lacks IORING_OP_LAST$"):
        open_io_uring(host("6.18.0"), (*OPCODES, "IORING_OP_LAST"))


@pytest.mark.parametrize(
    ("number", "disabled", "filtered", "reason"),
    [
        (errno.EPERM, "2", True, "kernel.io_uring_disabled is 2"),
        (errno.EPERM, "1", False, "kernel.io_uring_disabled is 1"),
        (errno.EPERM, "0", True, "a seccomp profile forbids it"),
        (errno.EPERM, "", False, "a security module forbids it"),
        (errno.ENOSYS, "", True, "a seccomp profile hides it"),
        (errno.ENOSYS, "", False, "the kernel is built without it"),
    ],
)
def test_the_reason_names_what_to_change(number: int, disabled: str, filtered: bool, reason: str) -> None:
    assert explain(number, disabled, filtered) == reason


@pytest.mark.parametrize("wish", [pytest.param("io_uring", marks=NEEDS_IO_URING), "epoll"])
def test_a_ring_that_runs_out_of_descriptors_gives_back_those_it_has(wish: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.open(os.devnull, os.O_RDONLY)]
    while fillers[-1] < max(processes.descriptors()):  # leave no free number below the limit
        fillers.append(os.open(os.devnull, os.O_RDONLY))
    before = processes.descriptors().keys()
    errors = []
    for spare in range(6):
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + spare, limits[1]))
        try:
            ring, _ = open_ring(wish)
        except (OSError, UserError) as error:
            errors.append(str(error).lower())
        else:
            ring.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    after = processes.descriptors().keys()
    for number in fillers:
        os.close(number)
    assert 2 <= len(errors) < 6
    assert all("too many open files" in error for error in errors)
    assert after == before


def test_releases_are_compared_as_numbers() -> None:
    assert kernel_version("6.18.44-generic") == (6, 18)
    assert kernel_version("10.0") > kernel_version("6.0")
    assert kernel_version("") == (0, 0)
