"""The grammar of the command line: `[ CMD ARGS ... ]`, one-line errors, values within limits, exit codes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import msgspec

from nbdshard.cli.standard_streams import tell
from nbdshard.common.errors import UserError
from nbdshard.common.logins import without_logins
from nbdshard.common.units import parse_size

HELP_COLUMNS: Final = 78
COUNT: Final = re.compile(r"[0-9]{1,18}")

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_DIFFERENT: Final = 1  # as cmp, diff and qemu-img compare have it; so a comparison fails with another one
EXIT_USAGE: Final = 2
EXIT_UNREADABLE: Final = 3
EXIT_UNFENCED: Final = 4
EXIT_UNCOMPARED: Final = 5  # whether two ends are the same could not be found out
EXIT_PAUSED: Final = 75  # EX_TEMPFAIL of sysexits.h: it can be tried again
EXIT_SIGNAL: Final = 128  # plus the number of the signal, as shells say it: 130 after Ctrl-C


class UsageError(UserError):
    """The command line itself is wrong: exit code 2."""


class Words(msgspec.Struct, frozen=True):
    """A command line whose bracketed commands were taken out: `rest` holds a mark where each one stood."""

    rest: list[str]
    commands: dict[str, list[str]]  # mark -> CMD ARGS


def take_out_commands(argv: Sequence[str]) -> Words:
    """Take every `[ CMD ARGS ... ]` out of `argv`, so that the options inside are never read as ours.

    As for nbdcopy the brackets are words of their own and the first `]` ends the command. Raises UsageError
    for a bracket without its partner.
    """
    rest: list[str] = []
    commands: dict[str, list[str]] = {}
    words = iter(argv)
    for word in words:
        if word == "]":
            raise UsageError("']' without a '[' before it")
        if word != "[":
            rest.append(word)
            continue
        command: list[str] = []
        for inner in words:
            if inner == "]":
                break
            command.append(inner)
        else:
            raise UsageError("'[' without a ']' after it", advice="brackets are words of their own: [ CMD ARGS ... ]")
        mark = f"[\0{len(commands)}"  # no word of a command line can hold a NUL
        commands[mark] = command
        rest.append(mark)
    return Words(rest, commands)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as our texts, and not as the terminal: to ask for that, argparse loads shutil with all its archivers."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=HELP_COLUMNS)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with GNU getopt's manners: one-line mistakes, and operands between the options."""

    def __init__(self, prog: str, description: str, usage: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog or None,
            formatter_class=_HelpFormatter,
            add_help=False,
        )
        self.value_unless_given: dict[str, str] = {}  # options with an optional value -> what it is without
        self.add_argument("-h", "--help", action="help", help="print this help and exit")

    def print_help(self, file: object = None) -> None:
        """Print the help on standard output; argparse would not mind if that failed."""
        tell(self.format_help(), end="")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError where argparse would print its usage and exit."""
        raise UsageError(f"{without_logins(message)}; try '{self.prog} --help'")

    def parse_words(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`. In the result, `commands` maps marks among the operands to the bracketed commands."""
        words = take_out_commands(argv)
        ours, literal = words.rest, []
        if "--" in ours:
            end = ours.index("--")
            ours, literal = ours[:end], ours[end + 1 :]
        args = self.parse_intermixed_args([self._spell_out(word) for word in ours])
        args.commands = words.commands
        if literal:
            args.operands = [*args.operands, *literal]
        return args

    def _spell_out(self, word: str) -> str:
        """`--progress`, or its beginning, becomes `--progress=bar`: argparse would swallow the next word."""
        for option, value in self.value_unless_given.items():
            if len(word) > 2 and option.startswith(word):
                return f"{option}={value}"
        return word


def version_line() -> str:
    """ "nbdshard 0.1.0"; imported late because looking it up costs more than starting a copy."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"nbdshard {version('nbdshard')}"
    except PackageNotFoundError:
        return "nbdshard (not installed)"


def refuse(text: str, allowed: str) -> NoReturn:
    """Say that the value `text` is not `allowed`; argparse puts the option's name before it."""
    raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")


def count_between(lowest: int, highest: int) -> Callable[[str], int]:
    """A whole number from `lowest` to `highest`."""

    def convert(text: str) -> int:
        if COUNT.fullmatch(text) is None or not lowest <= int(text) <= highest:
            refuse(text, f"a whole number from {lowest} to {highest}")
        return int(text)

    return convert


def size_where(allowed: str, accepts: Callable[[int], bool]) -> Callable[[str], int]:
    """A size with or without a suffix which `accepts`; `allowed` says in words what that is."""

    def convert(text: str) -> int:
        try:
            size = parse_size(text)
        except UserError:
            refuse(text, allowed)
        if not accepts(size):
            refuse(text, allowed)
        return size

    return convert
