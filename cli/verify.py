"""`nbdshard verify`: whether two ends hold the same, found out by the workers of a copy that only read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from nbdshard.cli.grammar import (
    EXIT_DIFFERENT,
    EXIT_OK,
    EXIT_PAUSED,
    EXIT_UNCOMPARED,
    Parser,
    UsageError,
)
from nbdshard.cli.options import add_reading_options, worker_count
from nbdshard.cli.standard_streams import tell

if TYPE_CHECKING:
    from nbdshard.cli.jobs import Ended

USAGE: Final = "nbdshard verify [OPTIONS] SOURCE DESTINATION"
EPILOG: Final = """\
SOURCE and DESTINATION are each the URI of an NBD export, a local file or block
device, or [ CMD ARGS ... ] (a server to start). Neither is written to.
Where one is longer, the rest of it must be zeroes.
The exit code is 0 where they are identical, 1 where they differ, and 5 where
that could not be found out. nbdshard(1) tells the rest."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard verify`."""
    parser = Parser(prog, "Compare two NBD exports or files with several processes.", USAGE, EPILOG)
    add_reading_options(parser)
    parser.set_defaults(mode="compare", no_flush=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare the two ends to the last byte, and tell where they differ. Raises UsageError and UserError."""
    for operand in args.operands:
        if operand in ("-", "null:"):
            raise UsageError(f"{operand!r} cannot be compared", advice="both ends are read, each at any place")
    from nbdshard.cli.running import Crew, run_copy

    def conclude(ended: Ended, interrupted_code: int) -> int:
        return _conclude(args, ended, interrupted_code)

    return run_copy(args, Crew(count=worker_count(args), ring=args.ring), conclude)


def _conclude(args: argparse.Namespace, ended: Ended, interrupted_code: int) -> int:
    from nbdshard.common import logs
    from nbdshard.coordinator.job import Verdict
    from nbdshard.coordinator.verdict_lines import as_json, comparison_summary, difference_lines, size_line

    outcome, found = ended.outcome, ended.outcome.comparison
    code = {
        Verdict.COMPLETE: EXIT_OK,
        Verdict.DIFFERENT: EXIT_DIFFERENT,
        Verdict.STOPPED: interrupted_code,
        Verdict.PAUSED: EXIT_PAUSED,
    }.get(outcome.verdict, EXIT_UNCOMPARED)
    if found is not None and args.json and code in (EXIT_OK, EXIT_DIFFERENT):
        import json

        tell(json.dumps(as_json(outcome, ended.seconds)))
        return code
    if found is not None and not args.json:
        for line in difference_lines(found):
            tell(line)
    if code not in (EXIT_OK, EXIT_DIFFERENT, interrupted_code):
        logs.say(outcome.error)
    if line := size_line(outcome):
        logs.say(line)
    if outcome.verdict is not Verdict.FAILED:
        logs.say(comparison_summary(outcome, ended.seconds))
    return code
