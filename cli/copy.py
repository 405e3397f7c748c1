"""`nbdshard copy`: a coordinator and its workers, for one copy, in one command."""

from __future__ import annotations

import argparse
from typing import Final

from nbdshard.cli.grammar import Parser, version_line
from nbdshard.cli.options import (
    add_copy_options,
    add_operands,
    add_progress_options,
    add_ring_option,
    add_worker_count,
    worker_count,
)
from nbdshard.cli.standard_streams import tell

USAGE: Final = "nbdshard copy [OPTIONS] SOURCE DESTINATION"
EPILOG: Final = """\
SOURCE and DESTINATION are each one of
  nbd://HOST[:PORT]/EXPORT   nbd+unix:///EXPORT?socket=PATH   an export of a running server
  [ CMD ARGS ... ]           a server to start; brackets are words of their own
  FILE                       a local file or block device
  -                          standard input or output
  null:                      (destination) takes everything
SIZE is in bytes, or a whole number with k, M, G or T. nbdshard(1) tells the rest."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard copy`."""
    parser = Parser(prog, "Copy SOURCE to DESTINATION with several processes.", USAGE, EPILOG)
    add_copy_options(parser)
    add_progress_options(parser)
    add_ring_option(parser)
    add_worker_count(parser)
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version and exit")
    for option in ("--short-options", "--long-options"):
        parser.add_argument(option, action=_OptionNames, nargs=0, help=argparse.SUPPRESS)
    add_operands(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the copy to its end, say how it ended, return the exit code. Raises UserError for a ring that is refused."""
    from nbdshard.cli.running import Crew, run_copy

    if args.ring == "io_uring":  # said once, here, instead of by every worker
        from nbdshard.common.ring.choose import open_ring

        open_ring(args.ring)[0].close()
    return run_copy(args, Crew(count=worker_count(args), ring=args.ring))


class _Version(argparse.Action):
    """Print the version and exit; nbdcopy has it as an option."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        tell(version_line())
        parser.exit()


class _OptionNames(argparse.Action):
    """Print the names of the options, one a line, and exit: nbdcopy's completion script asks for them so."""

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: object, _values: object, option: object = ""
    ) -> None:
        is_long = option == "--long-options"
        for name in sorted(name for action in parser._actions for name in action.option_strings):
            if name.startswith("--") == is_long and not name.endswith("-options"):
                tell(name)
        parser.exit()
