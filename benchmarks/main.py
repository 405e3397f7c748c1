"""`make bench`: measure nbdshard beside nbdcopy and qemu-img, and write the page.

The exit code is 0 whatever the numbers are; 1 when nothing could be measured, 130 when it was interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from benchmarks import machine, report, results
from benchmarks.campaign import NAMES, Campaign, Plan
from benchmarks.charts import charts
from benchmarks.ends import SHARED_MEMORY
from nbdshard.common.errors import UserError
from nbdshard.common.units import format_seconds, parse_size

TOP: Final = Path(__file__).parents[1]
DOCS: Final = TOP / "docs"
CACHE: Final = TOP / ".cache/benchmarks"
NOTES: Final = DOCS / "benchmarks-notes.md"
WHOLE: Final = CACHE / "results.json"
PART: Final = CACHE / "part.json"  # a quick run, or one of some rows, does not take the place of a whole one
PAGE: Final = "benchmarks.md"

ROUNDS: Final = 5
SECONDS: Final = 885.0  # of the 15 minutes a run may take
QUICK_ROUNDS: Final = 2
QUICK_SECONDS: Final = 100.0  # of 2 minutes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Ends the program if it is wrong."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, under 2 minutes")
    parser.add_argument(
        "--rows", type=_names, default=NAMES, metavar="NAME,...", help=f"only these of {', '.join(NAMES)}"
    )
    parser.add_argument("--rounds", type=int, help=f"timed rounds of each row ({ROUNDS}; {QUICK_ROUNDS} if quick)")
    parser.add_argument(
        "--seconds", type=float, help=f"how long all of it may take ({SECONDS:g}; {QUICK_SECONDS:g} if quick)"
    )
    parser.add_argument("--size-max", type=_size, metavar="SIZE", help="no copy longer than this: for trying it out")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the page goes (docs for all rows at full size, else .cache)"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="where the raw results go (.cache/benchmarks)")
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: write the page of the last whole run again"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and say where."""
    options = parse(arguments)
    _end_like_ctrl_c()
    plan = Plan(options.rows, options.quick, options.rounds, options.seconds, options.size_max)
    try:
        if options.render:
            found = _last(options.results or WHOLE)
        else:
            found = _measured(plan)
            path = options.results or (WHOLE if is_whole(found) else PART)
            path.parent.mkdir(parents=True, exist_ok=True)
            results.save(found, path)
    except KeyboardInterrupt:
        _say("interrupted: nothing is written")
        return 130
    except UserError as error:
        _say(str(error))
        return 1
    folder = options.output or (DOCS if is_whole(found) else CACHE)
    write(found, folder)
    _say(f"{_shown(folder / PAGE)} is written")
    return 0


def is_whole(found: results.Results) -> bool:
    """Whether the results are those of a full run, which the project's page is made of."""
    names = [row.name for row in found.rows]
    full_size = all(row.size == report.TASKS[row.name].size for row in found.rows)
    parts = (found.scaling, found.requests, found.leases, found.scheduler)
    return not found.quick and names == list(report.TASKS) and full_size and all(parts)


def write(found: results.Results, folder: Path) -> None:
    """Write the page and its charts into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = NOTES.read_text() if NOTES.exists() else ""
    (folder / PAGE).write_text(report.page(found, notes))
    for name, picture in charts(found).items():
        (folder / name).write_text(picture)


def _measured(plan: Plan) -> results.Results:
    missing = machine.missing_program()
    if missing:
        raise UserError(missing)
    if not SHARED_MEMORY.is_dir():
        raise UserError("is not there: files are put in shared memory", str(SHARED_MEMORY))
    _say(f"this takes up to {format_seconds(plan.seconds)}; keep the machine quiet")
    return Campaign(plan, _say).run()


def _last(path: Path) -> results.Results:
    try:
        return results.load(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", _shown(path), "run make bench first") from None
    except msgspec.ValidationError as error:
        raise UserError(f"is of another version: {error}", _shown(path), "run make bench again") from None


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return names


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _end_like_ctrl_c() -> None:
    """Have SIGTERM end the servers and remove the files too."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)  # also where a shell started us with it ignored


def _shown(path: Path) -> str:
    return str(path.relative_to(TOP)) if path.is_relative_to(TOP) else str(path)


def _say(line: str) -> None:
    print(f"benchmarks: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
