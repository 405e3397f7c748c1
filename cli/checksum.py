"""`nbdshard checksum`: what an image's checksum is. A copy to `null:`, by several processes, that looks at its data."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Final

from nbdshard.cli.grammar import Parser, UsageError
from nbdshard.cli.options import add_reading_options, words_of, worker_count
from nbdshard.cli.standard_streams import tell
from nbdshard.common.logs import printable

if TYPE_CHECKING:
    from nbdshard.cli.jobs import Ended
    from nbdshard.coordinator.job import Outcome

USAGE: Final = "nbdshard checksum [OPTIONS] SOURCE"
EPILOG: Final = """\
SOURCE is the URI of an NBD export, a local file or block device, [ CMD ARGS ... ] (a server to start), or - where
standard input is a file.
The checksum is the blkhash that nbdcopy --blkhash prints: SHA-256 over the SHA-256 digests of all blocks of 64 KiB and
the size. What is known to be zeroes is not read. nbdshard(1) tells how anybody can compute it."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard checksum`."""
    parser = Parser(prog, "Print the checksum of an NBD export or a local file.", USAGE, EPILOG)
    add_reading_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the checksum; the exit code is that of a copy. Raises UsageError and UserError."""
    if len(args.operands) != 1:
        what = f"one word too many: {words_of(args.operands[1], args)!r}" if args.operands else "the source is missing"
        raise UsageError(what, advice="a checksum is that of one image; see --help")
    (source,) = args.operands
    name = words_of(source, args)
    args.operands = [source, "null:"]
    args.checksum = True
    from nbdshard.cli.running import Crew, run_copy

    def report(outcome: Outcome, seconds: float) -> None:
        tell(json.dumps(describe(outcome, name, seconds)) if args.json else line(outcome, name))

    def conclude(ended: Ended, interrupted_code: int) -> int:
        from nbdshard.cli.jobs import conclude

        return conclude(ended, interrupted_code, report)

    return run_copy(args, Crew(count=worker_count(args), ring=args.ring), conclude)


def line(outcome: Outcome, name: str) -> str:
    """As sha256sum prints it."""
    return f"{outcome.checksum}  {printable(name)}"


def describe(outcome: Outcome, name: str, seconds: float) -> dict[str, object]:
    """What `--json` prints."""
    from nbdshard.common.blkhash import ALGORITHM

    counters = outcome.counters
    return {
        "source": name,
        "algorithm": ALGORITHM,
        "checksum": outcome.checksum,
        "size": outcome.size,
        "bytes_read": counters.copied,
        "bytes_zero": counters.zeroed,
        "elapsed_seconds": round(seconds, 3),
    }
