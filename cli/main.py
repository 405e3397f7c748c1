"""The command `nbdshard`: finds the subcommand, imports only that, makes a line and a code of every outcome.

A subcommand is a module with `build_parser(prog)` and `run(args) -> int`. What it raises ends here:

======================================  =====================================================  =====
raised                                  printed on standard error                              code
======================================  =====================================================  =====
UsageError                              nbdshard: the line                                     2
any other NbdshardError but a BugError  nbdshard: the line                                     1 +
KeyboardInterrupt                       nbdshard: interrupted                                  130 *
BrokenPipeError (standard output)       nothing: who read it has gone                          141
BugError, and anything else             nbdshard: internal error: ... and how to see more      1 +
======================================  =====================================================  =====

(+) 5 of `nbdshard verify`, whose 1 means that two ends differ
(*) or 128 plus the number of another signal that asked for an end.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn, Protocol, cast

from nbdshard.cli.grammar import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_SIGNAL,
    EXIT_UNCOMPARED,
    EXIT_USAGE,
    Parser,
    UsageError,
    version_line,
)
from nbdshard.cli.standard_streams import flush_output, prepare, silence_output, tell
from nbdshard.common.errors import BugError, NbdshardError
from nbdshard.common.limits import NEW_OBJECTS_MAX
from nbdshard.common.logs import printable

EXIT_BROKEN_PIPE: Final = EXIT_SIGNAL + signal.SIGPIPE
DEBUG_VARIABLE: Final = "NBDSHARD_DEBUG"

SUBCOMMANDS: Final = {
    "copy": ("nbdshard.cli.copy", "copy an export, file, device or stream to another"),
    "coordinator": ("nbdshard.cli.coordinator", "run a copy whose workers may be on several machines"),
    "worker": ("nbdshard.cli.worker", "work for a coordinator"),
    "verify": ("nbdshard.cli.verify", "compare two exports or files, and say where they differ"),
    "serve": ("nbdshard.cli.serve", "export files, devices and memory over NBD"),
    "volume": ("nbdshard.cli.volume", "make, resize, delete and list volumes of nbdshard serve"),
    "info": ("nbdshard.cli.info", "show what a server says about an export"),
    "map": ("nbdshard.cli.map", "show which parts of an export are data, holes and zeroes"),
    "checksum": ("nbdshard.cli.checksum", "print the checksum of an export or a file"),
    "ctl": ("nbdshard.cli.ctl", "slow down, pause, go on with or ask about a copy that runs"),
    "jobs": ("nbdshard.cli.journals", "list copies that can be resumed, and how far they got"),
    "keygen": ("nbdshard.cli.keygen", "make the keys by which a coordinator and its workers know each other"),
}

HELP: Final = "\n".join(
    [
        "usage: nbdshard SUBCOMMAND [OPTIONS] ...",
        "",
        "Copy block devices between NBD servers with many processes at once.",
        "",
        *(f"  {name:<12} {what}" for name, (_, what) in SUBCOMMANDS.items()),
        "",
        "nbdshard SUBCOMMAND --help lists the options of one; nbdshard(1) tells the rest.",
        "nbdshard --version prints the version.",
    ]
)


class Subcommand(Protocol):
    """What a subcommand's module offers."""

    def build_parser(self, prog: str) -> ArgumentParser:
        """The parser of its options; `Parser` of cli.grammar where operands may be `[ CMD ]`."""

    def run(self, args: Namespace) -> int:
        """Do it; the exit code. With a `Parser`, `args.commands` holds the bracketed commands."""


def load(name: str) -> Subcommand:
    """The module of subcommand `name`, imported now."""
    return cast(Subcommand, importlib.import_module(SUBCOMMANDS[name][0]))


def main(argv: Sequence[str] | None = None, load: Callable[[str], Subcommand] = load) -> int:
    """Run the command line `argv` (without the program's name) and return the exit code. `load` finds a subcommand."""
    prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    failure = EXIT_UNCOMPARED if words[:1] == ["verify"] else EXIT_FAILURE
    try:
        code = _dispatch(words, load)
        flush_output()
    except UsageError as error:
        return _say(str(error), EXIT_USAGE)
    except BugError as error:
        return _internal_error(error, failure)
    except NbdshardError as error:
        return _say(str(error), failure)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)  # of common.signals.Interrupted
        return _say("interrupted", EXIT_SIGNAL + number)
    except BrokenPipeError:
        silence_output()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        return _internal_error(error, failure)
    return code


def _dispatch(argv: list[str], load: Callable[[str], Subcommand]) -> int:
    if not argv:
        raise UsageError("no subcommand; try 'nbdshard --help'")
    name, words = argv[0], argv[1:]
    if name in ("-h", "--help", "help"):
        tell(HELP)
        return EXIT_OK
    if name in ("-V", "--version"):
        tell(version_line())
        return EXIT_OK
    if name not in SUBCOMMANDS:
        what = "option" if name.startswith("-") else "subcommand"
        raise UsageError(f"unknown {what} {name!r}", advice=f"known are {', '.join(SUBCOMMANDS)}")
    subcommand = load(name)
    parser = subcommand.build_parser(f"nbdshard {name}")
    try:
        args = parser.parse_words(words) if isinstance(parser, Parser) else parser.parse_args(words)
        args.command_line = argv
    except SystemExit as exit_:  # --help and its like
        return exit_.code if isinstance(exit_.code, int) else EXIT_OK
    if getattr(args, "commands", None):  # a server of ours may be given a password
        from nbdshard.cli.title import hide_logins

        hide_logins(argv)
    return subcommand.run(args)


def _say(line: str, code: int) -> int:
    """Print one line, whatever a peer managed to put into it, and return `code`."""
    try:
        print(f"nbdshard: {printable(line)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # standard error is closed: the code has to say it
        pass
    return code


def _internal_error(error: Exception, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        traceback.print_exception(error)
    what = str(error) or "no text"
    hint = f"run with {DEBUG_VARIABLE}=1 for the traceback"
    return _say(f"internal error: {type(error).__name__}: {what} ({hint})", code)


def command() -> NoReturn:
    """Be the command: do what the command line says, and end.

    The interpreter is not taken apart first, object by object; and while it is being filled it does not look for
    garbage, of which there is none, each time 700 objects more are there. Both would add a sixth to a small copy.
    """
    gc.set_threshold(NEW_OBJECTS_MAX)
    code = main()
    with suppress(OSError, ValueError):  # what could not be written was told already
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
