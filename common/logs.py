"""The log: one line an event, to standard error. Small on purpose: the logging package costs a copy 6 ms of
its start.

A line is `nbdshard ROLE: text`. Under systemd (JOURNAL_STREAM names our standard error) it carries the level
in the journal's own prefix (`<4>`). Text that comes from peers is made printable here, so that nobody can
forge a line.
"""

from __future__ import annotations

import os
import select
from enum import IntEnum

from nbdshard.common.limits import LOG_LINE_CHARACTERS_MAX, LOG_WRITE_SECONDS


class Level(IntEnum):
    """syslog(3)'s levels, of which we use four."""

    ERROR = 3
    WARNING = 4
    INFO = 6
    DEBUG = 7


_STDERR = 2
_prefix = "nbdshard: "
_shown = Level.WARNING
_to_journal = False


def set_up(role: str, shown: Level) -> None:
    """Name the process in every line ("coordinator", "worker 1a2b3c4d", or "") and choose what is shown."""
    global _prefix, _shown, _to_journal
    _prefix = f"nbdshard {role}: " if role else "nbdshard: "
    _shown = shown
    _to_journal = _stderr_is_journal()


def error(text: str) -> None:
    _write(Level.ERROR, text)


def warning(text: str) -> None:
    _write(Level.WARNING, text)


def info(text: str) -> None:
    _write(Level.INFO, text)


def say(text: str) -> None:
    """Tell the user something that was asked for, whatever level is shown."""
    _line(Level.INFO, text)


def debug(text: str) -> None:
    _write(Level.DEBUG, text)


def printable(text: str) -> str:
    """`text` on one line: control characters, line ends included, are written as escapes; cut at a bound."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    if len(text) > LOG_LINE_CHARACTERS_MAX:
        return text[:LOG_LINE_CHARACTERS_MAX] + "..."
    return text


def write_in_time(descriptor: int, line: bytes, patience_seconds: float) -> bool:
    """Write a line shorter than PIPE_BUF unless its reader makes no room for it in time; whether it was written.

    A pipe that nobody reads must not hold up the work. Never raises.
    """
    try:
        return takes_more(descriptor, patience_seconds) and os.write(descriptor, line) == len(line)
    except OSError:  # the reader has gone
        return False


def takes_more(descriptor: int, patience_seconds: float = 0.0) -> bool:
    """Whether something can be written to `descriptor` at once, or within `patience_seconds`. Never raises."""
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    try:
        ready = poller.poll(patience_seconds * 1000)
    except OSError:
        return False
    return bool(ready) and bool(ready[0][1] & select.POLLOUT)


def _write(level: Level, text: str) -> None:
    if level <= _shown:
        _line(level, text)


def _line(level: Level, text: str) -> None:
    journal = f"<{int(level)}>" if _to_journal else ""
    line = f"{journal}{_prefix}{printable(text)}\n".encode("utf-8", "backslashreplace")
    write_in_time(_STDERR, line, LOG_WRITE_SECONDS)  # one write(2) a line: lines of several processes do not mix


def _stderr_is_journal() -> bool:
    """Whether systemd connected our standard error to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    if not stream:
        return False
    try:
        facts = os.fstat(_STDERR)
    except OSError:
        return False
    return stream == f"{facts.st_dev}:{facts.st_ino}"
