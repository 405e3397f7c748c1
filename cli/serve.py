"""`nbdshard serve`: export files, devices and memory over NBD."""

from __future__ import annotations

import argparse
import threading
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Final

from nbdshard.cli.grammar import EXIT_OK, Parser, UsageError, count_between
from nbdshard.common import logs
from nbdshard.common.limits import SERVED_CONNECTIONS_MAX
from nbdshard.common.nbd.constants import PORT_DEFAULT

USAGE: Final = "nbdshard serve -e NAME DRIVER CONN [-e ...] [OPTIONS]"
EPILOG: Final = """\
DRIVER says how the image lies in the store: raw, byte for byte.
CONN is file:PATH for a file or block device, or memory:SIZE for a disk that is empty at first and forgotten at the
end; ?read-only=yes behind it lets nobody write.
The first export is also the one for clients that name none. SIGTERM finishes what was asked, flushes, and ends."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard serve`."""
    parser = Parser(prog, "Serve exports over NBD until a signal comes.", USAGE, EPILOG)
    parser.add_argument(
        "-e",
        "--export",
        dest="exports",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "DRIVER", "CONN"),
        help="an export; may be given several times",
    )
    parser.add_argument(
        "--tcp",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help=f"listen there; *:{PORT_DEFAULT} if nothing else is said; may be given several times",
    )
    parser.add_argument(
        "--unix",
        action="append",
        default=[],
        metavar="PATH",
        help="listen on a unix socket; may be given several times",
    )
    parser.add_argument(
        "--max-connections",
        type=count_between(1, SERVED_CONNECTIONS_MAX),
        default=SERVED_CONNECTIONS_MAX,
        metavar="N",
        help=f"clients at a time ({SERVED_CONNECTIONS_MAX})",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say on standard error what is being done")
    parser.add_argument("operands", nargs="*", help=argparse.SUPPRESS)
    return parser


def run(args: Namespace) -> int:
    """Serve until a signal comes. Raises UsageError and UserError."""
    if args.operands:
        raise UsageError(f"one word too many: {args.operands[0]!r}", advice="an export is -e NAME DRIVER CONN")
    if not args.exports:
        raise UsageError("no export is given", advice="-e NAME DRIVER CONN; see --help")
    logs.set_up("serve", logs.Level.DEBUG if args.verbose else logs.Level.WARNING)
    from nbdshard.server.chain import Wanted, open_backend
    from nbdshard.server.exports import Exported, Exports
    from nbdshard.server.service import Service, addresses, listen_tcp, listen_unix

    wanted = [Wanted(*words) for words in args.exports]
    names = [each.name for each in wanted]
    if len(set(names)) < len(names):
        raise UsageError(f"two exports are called {next(name for name in names if names.count(name) > 1)!r}")
    places = [_host_and_port(text) for text in args.tcp]
    if not places and not args.unix:
        places = [("", PORT_DEFAULT)]
    ending = threading.Event()
    exports = Exports({each.name: Exported(open_backend(each, ending=ending)) for each in wanted}, uuid.uuid4())
    listeners = [listener for place in places for listener in listen_tcp(*place)]
    made: list[Path] = []
    try:
        for path in map(Path, args.unix):
            listeners.append(listen_unix(path))
            made.append(path)
        for address in addresses(listeners):
            logs.say(f"listens on {address}")
        failed = Service(exports, listeners, args.max_connections, ending).run()
    finally:
        for path in made:
            path.unlink(missing_ok=True)
    return failed or EXIT_OK


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(PORT_DEFAULT)
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"argument --tcp: {text!r}: a port from 0 to 65535 is expected", advice="HOST:PORT")
    host = host.removeprefix("[").removesuffix("]")
    return ("" if host == "*" else host), int(port)
