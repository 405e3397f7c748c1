"""What ps(1) shows of a process that was forked: by itself it would go by the name and the words of its parent."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

from nbdshard.common import logs
from nbdshard.common.logins import without_logins

_ARG_START: Final = 48  # the fields of /proc/self/stat, as proc(5) counts them
_ARG_END: Final = 49
_FIRST_AFTER_NAME: Final = 3  # the second field is the name, which may itself hold blanks and parentheses


def hide_logins(words: Sequence[str]) -> bool:
    """Take passwords out of the command line `words` that ps(1) shows of us; whether there were any."""
    shown = [without_logins(word) for word in words]
    if shown == list(words):
        return False
    show_as("nbdshard", ["nbdshard", *shown])
    return True


def warn_of_logins(words: Sequence[str]) -> None:
    """Hide passwords in the command line `words`, and warn of those that were there."""
    if hide_logins(words):
        logs.warning("a password on the command line is there for others to see; --credentials FILE is not")


def show_as(name: str, words: Sequence[str]) -> None:
    """Have the process listed as `name` (15 characters of it) with the command line `words`.

    The kernel shows the command line from where the process found it when it began: `words` take that place, and are
    cut at its end. Where /proc does not say where that is, nothing is changed.
    """
    try:
        with open("/proc/self/comm", "wb") as comm:
            comm.write(name.encode())
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return
    start, end = (int(fields[number - _FIRST_AFTER_NAME]) for number in (_ARG_START, _ARG_END))
    room = end - start
    if start == 0 or room <= 0:  # not shown to us
        return
    text = "\0".join(words).encode("utf-8", "surrogateescape")[: room - 1]
    ctypes.memmove(start, text.ljust(room, b"\0"), room)
