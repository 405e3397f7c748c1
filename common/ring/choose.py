"""Which ring, and why: decided once when a process starts, told in one line."""

from __future__ import annotations

import os
import re
from errno import EINVAL, ENOMEM, ENOSYS, EPERM, errorcode

from nbdshard.common.errors import UserError
from nbdshard.common.ring.interface import Ring

KERNEL_MIN = (6, 0)  # IORING_SETUP_SINGLE_ISSUER, and cancellation as we need it

# errno of io_uring_setup(2) -> what forbids it, for a line that begins "io_uring is refused: NAME".
REASONS = {
    EPERM: "a seccomp profile or kernel.io_uring_disabled forbids it",
    ENOSYS: "the kernel is built without it, or a seccomp profile hides it",
    ENOMEM: "not enough memory for its queues, see ulimit -l and ulimit -v",
    EINVAL: "the kernel is too old for the flags it is opened with",
}


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


def open_io_uring(host: os.uname_result | None = None) -> Ring:
    """An io_uring ring, or Unusable. `host` is os.uname()'s answer, as far as it decides."""
    host = host or os.uname()
    if kernel_version(host.release) < KERNEL_MIN:
        raise Unusable(f"io_uring of Linux {host.release} is too old, {'.'.join(map(str, KERNEL_MIN))} is needed")
    try:
        from nbdshard.common.ring.uring import UringRing
    except ImportError as error:
        if host.machine != "x86_64":
            raise Unusable(f"the Python module liburing is not built for {host.machine}") from None
        raise Unusable(f"the Python module liburing cannot be imported: {error}") from None
    try:
        ring = UringRing()
    except OSError as error:
        number = error.errno or 0
        reason = REASONS.get(number, os.strerror(number))
        raise Unusable(f"io_uring is refused: {errorcode.get(number, number)}; {reason}") from None
    missing = ring.missing_opcodes()
    if missing:
        ring.close()
        raise Unusable(f"io_uring of Linux {host.release} lacks {', '.join(missing)}")
    return ring


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 18) of "6.18.44-generic"; (0, 0) if it does not begin like that."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)
