"""Standard input, output and error, as we were given them: closed ones made harmless, failing writes told in a line."""

from __future__ import annotations

import io
import os
import sys
from typing import Final

from nbdshard.common.errors import UserError

STDOUT: Final = 1
STDERR: Final = 2
# A closed descriptor becomes one that cannot be used for its purpose, so that `-` and output still fail as if it were
# closed; only what is said on standard error goes nowhere.
_FILLINGS: Final = ((0, os.O_WRONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_WRONLY))


def prepare() -> None:
    """Put /dev/null in the place of closed standard streams. To be called before anything is opened.

    Otherwise the next file opened gets such a number: a log line would end up in the middle of the destination.
    """
    for descriptor, flags in _FILLINGS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest free number: this one
    # Python has None in the place of a stream that was closed when it started.
    if sys.stdout is None:
        sys.stdout = open(STDOUT, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (open as long as the process)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write is no reason to fail
    if sys.stderr is None:
        sys.stderr = open(STDERR, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def tell(text: str, end: str = "\n") -> None:
    """Print `text` on standard output. Raises BrokenPipeError, or UserError if it cannot be written."""
    try:
        print(text, end=end)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_be_written(error) from None


def flush_output() -> None:
    """Have everything told be written. Raises BrokenPipeError, or UserError if it cannot be."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_be_written(error) from None


def silence_output() -> None:
    """Standard output is of no use any more: let the interpreter's own last flush go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    os.close(nowhere)


def _cannot_be_written(error: OSError) -> UserError:
    silence_output()
    return UserError(f"cannot be written: {error.strerror}", "standard output")
