"""How many files a process may open: a limit that leaves room for nothing is told before anything is begun."""

from __future__ import annotations

import resource
import sys

from nbdshard.common.errors import UserError
from nbdshard.common.limits import DESCRIPTORS_MIN


def check_descriptors() -> None:
    """Raise the limit to DESCRIPTORS_MIN where we may. Raises UserError where it stays below.

    Libraries do worse than to raise an error: libzmq aborts. With more, connections that find none are done without.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= DESCRIPTORS_MIN:
        return
    if hard < DESCRIPTORS_MIN:
        what = f"only {hard} files may be open at a time, and a copy needs {DESCRIPTORS_MIN}"
        raise UserError(what, "this process", "raise the limit: ulimit -n 1024")
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS_MIN, hard))


def raise_descriptors() -> int:
    """Raise the limit as far as we may; what it is now."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard
