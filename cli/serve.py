"""`nbdshard serve`: export files, devices, memory and what stores hold over NBD."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from nbdshard.cli.grammar import Parser, UsageError, count_between
from nbdshard.cli.title import warn_of_logins
from nbdshard.common import logs
from nbdshard.common.limits import SERVED_CONNECTIONS_MAX, SERVER_PROCESSES_MAX
from nbdshard.common.logins import without_logins
from nbdshard.common.nbd.constants import PORT_DEFAULT

if TYPE_CHECKING:
    from nbdshard.server.extensions import Extensions

USAGE: Final = "nbdshard serve [-e NAME DRIVER CONN ...] [--config FILE] [OPTIONS]"
EPILOG: Final = """\
DRIVER says how the image lies in the store: raw, byte for byte, or sharded, in
chunks. CONN is file:PATH for a file, a block device or a directory of chunks,
memory:SIZE for a disk that is forgotten at the end, nbd:URI for another server,
or s3:http://HOST:PORT/BUCKET/PREFIX, gs: or az: for an object store; layers
(cache:, cow:, retry: and others) may stand before it, and ?NAME=VALUE behind
it, as in cache:file:/exports/disk/?size=100G. nbdshard(1) lists all of them.
The first export is also the one for clients that name none. SIGTERM finishes
what was asked, flushes, and ends; a second one ends it at once."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard serve`."""
    parser = Parser(prog, "Serve exports over NBD until a signal comes.", USAGE, EPILOG)
    add = parser.add_argument
    words = ("NAME", "DRIVER", "CONN")
    several = "; may be given several times"
    add(
        "-e",
        "--export",
        dest="exports",
        nargs=3,
        action="append",
        default=[],
        metavar=words,
        help="an export" + several,
    )
    add(
        "-r",
        "--read-only",
        action="append",
        default=[],
        metavar="NAME",
        help="nobody may write to that export" + several,
    )
    add("--config", metavar="FILE", help="exports and settings in TOML; options win, exports add up")
    add("--credentials", metavar="FILE", help="what stores are given, in lines NAME=VALUE; else the environment")
    add(
        "--tcp",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help=f"listen there; *:{PORT_DEFAULT} if nothing else is said{several}",
    )
    add("--unix", action="append", default=[], metavar="PATH", help="listen on a unix socket" + several)
    add(
        "--max-connections",
        type=count_between(1, SERVED_CONNECTIONS_MAX),
        metavar="N",
        help=f"clients at a time ({SERVED_CONNECTIONS_MAX}, or what the limit of open files allows)",
    )
    add(
        "--processes",
        type=count_between(1, SERVER_PROCESSES_MAX),
        metavar="N",
        help="processes that serve together (1); for raw files only",
    )
    add("--pid-file", metavar="FILE", help="write the process id there once clients are let in")
    add("-v", "--verbose", action="store_true", help="say on standard error what is being done")
    add("operands", nargs="*", help=argparse.SUPPRESS)
    return parser


def run(args: Namespace, extensions: Extensions | None = None) -> int:
    """Serve until a signal comes. Raises UsageError and UserError. `extensions`: see cli/extended.py."""
    if args.operands:
        what = f"one word too many: {without_logins(args.operands[0])!r}"
        raise UsageError(what, advice="an export is -e NAME DRIVER CONN")
    logs.set_up("serve", logs.Level.DEBUG if args.verbose else logs.Level.WARNING)
    warn_of_logins(args.command_line)
    from nbdshard.cli.serve_settings import settings_of
    from nbdshard.cli.serving import serve

    settings = settings_of(args)
    return serve(settings if extensions is None else replace(settings, extensions=extensions))
