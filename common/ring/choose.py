"""Which ring, and why: decided once when a process starts, told in one line."""

from __future__ import annotations

import errno
import os
import re

from nbdshard.common.errors import UserError
from nbdshard.common.ring.interface import Ring

KERNEL_MIN = (6, 0)  # IORING_SETUP_SINGLE_ISSUER, and cancellation as we need it

OPCODES = (
    "IORING_OP_READV",
    "IORING_OP_WRITEV",
    "IORING_OP_FSYNC",
    "IORING_OP_SPLICE",
    "IORING_OP_POLL_ADD",
    "IORING_OP_ASYNC_CANCEL",
)


class Unusable(Exception):
    """io_uring cannot be used here; the message says why."""


def open_ring(wish: str = "auto") -> tuple[Ring, str]:
    """The ring the user wished for ("auto", "io_uring", "epoll"), and the line for the log.

    Raises UserError if io_uring was wished for and cannot be had, or the wish is none of the three.
    """
    from nbdshard.common.ring.epoll import EpollRing

    if wish == "epoll":
        return EpollRing(), "ring: epoll (as asked for)"
    if wish not in ("auto", "io_uring"):
        raise UserError(f"unknown ring {wish!r}", "--ring", "it is io_uring, epoll or auto")
    try:
        ring = open_io_uring()
    except Unusable as reason:
        if wish == "io_uring":
            raise UserError(str(reason), "--ring io_uring", "use --ring epoll") from None
        return EpollRing(), f"ring: epoll ({reason})"
    return ring, "ring: io_uring (as asked for)" if wish == "io_uring" else "ring: io_uring"


def open_io_uring(host: os.uname_result | None = None, opcodes: tuple[str, ...] = OPCODES) -> Ring:
    """An io_uring ring whose kernel has all of `opcodes`, or Unusable. `host`: what os.uname() says of this one."""
    host = host or os.uname()
    if kernel_version(host.release) < KERNEL_MIN:
        raise Unusable(f"io_uring of Linux {host.release} is too old, {'.'.join(map(str, KERNEL_MIN))} is needed")
    try:
        from nbdshard.common.ring.uring import UringRing
    except ModuleNotFoundError:
        if host.machine != "x86_64":
            raise Unusable(f"the Python module liburing is not built for {host.machine}") from None
        raise Unusable("the Python module liburing is not installed") from None
    except ImportError as error:
        raise Unusable(f"the Python module liburing cannot be imported: {error}") from None
    try:
        ring = UringRing()
    except OSError as error:
        number = error.errno or 0
        why = explain(number, _first_line("/proc/sys/kernel/io_uring_disabled"), _is_filtered())
        raise Unusable(f"io_uring is refused: {errno.errorcode.get(number, number)}; {why}") from None
    missing = ring.missing_opcodes(opcodes)
    if missing:
        ring.close()
        raise Unusable(f"io_uring of Linux {host.release} lacks {', '.join(missing)}")
    return ring


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 18) of "6.18.44-generic"; (0, 0) if it does not begin like that."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def explain(number: int, disabled: str, filtered: bool) -> str:
    """What makes io_uring_setup(2) fail with errno `number`.

    `disabled` is the value of kernel.io_uring_disabled ("" if there is none), `filtered`: this process runs under a
    seccomp filter.
    """
    match number:
        case errno.EPERM if disabled not in ("", "0"):
            return f"kernel.io_uring_disabled is {disabled}"
        case errno.EPERM:
            return "a seccomp profile forbids it" if filtered else "a security module forbids it"
        case errno.ENOSYS:
            return "a seccomp profile hides it" if filtered else "the kernel is built without it"
        case errno.ENOMEM:
            return "not enough memory for its queues, see ulimit -l and ulimit -v"
        case errno.EINVAL:
            return "the kernel does not know the flags it is opened with"
    return os.strerror(number).lower()


def _is_filtered() -> bool:
    """Whether a seccomp filter is on this process (proc(5), "Seccomp": 2)."""
    try:
        with open("/proc/self/status") as status:
            return any(line.split() == ["Seccomp:", "2"] for line in status)
    except OSError:
        return False


def _first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return ""
