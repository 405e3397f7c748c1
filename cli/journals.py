"""`nbdshard jobs`: the copies that have a journal, and one of them as a mapfile of GNU ddrescue."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Final

from nbdshard.cli.grammar import EXIT_FAILURE, EXIT_OK, Parser, UsageError
from nbdshard.cli.standard_streams import tell
from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.units import format_bytes
from nbdshard.coordinator.journal import Journal, Snapshot
from nbdshard.coordinator.journal_facts import JournalState
from nbdshard.coordinator.journal_paths import journals
from nbdshard.coordinator.mapfile import mapfile

USAGE: Final = "nbdshard jobs [--json] [JOURNAL ...] | nbdshard jobs export JOB [--format ddrescue]"
EPILOG: Final = """\
Lists the journals of the state directory, or those named. JOB is a journal's file, or a job's uuid or its beginning.
export prints the job as a mapfile of ddrescue: what is durable is finished, what could not be read is bad, the rest not
tried."""
FORMATS: Final = ("ddrescue",)


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard jobs`."""
    parser = Parser(prog, "List the copies that have a journal, and how far they got.", USAGE, EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--format", choices=FORMATS, default="ddrescue", help="what export prints (default ddrescue)")
    parser.add_argument("words", metavar="JOURNAL", nargs="*", help="a journal's file; or: export JOB")
    return parser


def run(args: Namespace) -> int:
    """List or export. Journals that cannot be read are told on standard error, and make the exit code 1."""
    words: list[str] = args.words
    if words and words[0] == "export":
        if len(words) != 2:
            raise UsageError("export takes one JOB", advice="see --help")
        found = _find(words[1])
        tell(mapfile(found.facts, found.durable, found.unreadable).rstrip("\n"))
        return EXIT_OK
    logs.set_up("", logs.Level.WARNING)
    code = EXIT_OK
    snapshots = []
    for path in words or journals():
        try:
            snapshots.append(Journal.read(path))
        except UserError as error:
            logs.say(str(error))
            code = EXIT_FAILURE
    if args.json:
        tell(json.dumps([_as_json(each) for each in snapshots], indent=2))
    else:
        for each in snapshots:
            tell("\n".join(_as_lines(each)))
    return code


def _find(job: str) -> Snapshot:
    """The journal that `job` means. Raises UserError unless it means exactly one."""
    if os.path.lexists(job):
        return Journal.read(job)
    paths = [path for path in journals() if os.path.basename(path).startswith(job)]
    if len(paths) != 1:
        what = "is the beginning of no job's uuid" if not paths else "is the beginning of several jobs' uuids"
        raise UserError(f"{what}, and no file", job, "`nbdshard jobs` lists those there are")
    return Journal.read(paths[0])


def state_of(found: Snapshot) -> str:
    """How the job stands. One that says it is running, but that nobody holds, died."""
    if found.holder is None and found.state is JournalState.RUNNING:
        return "interrupted"
    return found.state.value


def _as_lines(found: Snapshot) -> Iterator[str]:
    facts, size = found.facts, found.facts.size
    percent = found.durable_bytes * 100 // size if size else 100
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.changed_ns / 1e9))
    yield f"{facts.uuid}  {state_of(found)}, {percent} % durable"
    yield f"  {facts.source.named} -> {', '.join(end.named for end in facts.destinations)}"
    yield f"  {format_bytes(found.durable_bytes)} of {format_bytes(size)}, run {found.epoch}, last changed {changed}"
    if found.unreadable:
        yield f"  {format_bytes(found.unreadable_bytes)} unreadable in {len(found.unreadable)} places"
    yield f"  {os.path.abspath(found.path)}"


def _as_json(found: Snapshot) -> dict[str, object]:
    return {
        "job": found.facts.uuid,
        "state": state_of(found),
        "journal": os.path.abspath(found.path),
        "source": found.facts.source.named,
        "destinations": [end.named for end in found.facts.destinations],
        "bytes_total": found.facts.size,
        "bytes_durable": found.durable_bytes,
        "bytes_unreadable": found.unreadable_bytes,
        "run": found.epoch,
        "holder_pid": found.holder,
        "created_ns": found.created_ns,
        "changed_ns": found.changed_ns,
    }
