"""`nbdshard coordinator`: run a copy whose workers connect from wherever they were started."""

from __future__ import annotations

from argparse import Namespace
from typing import Final

from nbdshard.cli.grammar import Parser, UsageError, count_between
from nbdshard.cli.options import add_copy_options, add_operands, add_progress_options
from nbdshard.common.control_url import ControlUrl, parse_control_url
from nbdshard.common.errors import UserError
from nbdshard.common.keys import CoordinatorKeys, load_allow_list, load_key_pair
from nbdshard.common.limits import WORKERS_MAX

USAGE: Final = "nbdshard coordinator [OPTIONS] --listen URL SOURCE DESTINATION"
EPILOG: Final = """\
Workers join and leave as they like while the copy runs: nbdshard worker --connect URL. SOURCE and DESTINATION
are as for nbdshard copy, without '-'; workers on other machines take only nbd://HOST URIs of both.
URL is tcp://HOST:PORT (port 0: any free one, '*': every interface) or ipc:///PATH."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard coordinator`: those of a copy, and where to listen for whom."""
    parser = Parser(prog, "Copy SOURCE to DESTINATION with workers on several machines.", USAGE, EPILOG)
    parser.add_argument("--listen", metavar="URL", required=True, help="where workers connect")
    parser.add_argument("--key", metavar="FILE", help="this coordinator's secret key (NAME.key)")
    parser.add_argument("--allow", metavar="PATH", help="public keys of workers: a file, or a directory of .pub files")
    parser.add_argument(
        "--insecure", action="store_true", help="listen on a network without keys: whoever connects can take part"
    )
    parser.add_argument(
        "-T",
        "--threads",
        "--workers",
        metavar="N",
        dest="workers",
        type=count_between(1, WORKERS_MAX),
        help="workers that share the connections; more than that stand by (default: one for each connection)",
    )
    add_copy_options(parser)
    add_progress_options(parser)
    add_operands(parser)
    return parser


def run(args: Namespace) -> int:
    """Run the copy; the exit code is that of `nbdshard copy`. Raises UserError for a network without keys."""
    url = parse_control_url(args.listen)
    keys = _keys(args, url)
    if "-" in args.operands:
        raise UserError("workers of other processes cannot share '-'", advice="use nbdshard copy, or name a file")
    from nbdshard.cli.running import Crew, run_copy

    return run_copy(args, Crew(args.workers or args.connections, listen=url, keys=keys))


def _keys(args: Namespace, url: ControlUrl) -> CoordinatorKeys | None:
    if (args.key is None) != (args.allow is None):
        missing = "--key" if args.key is None else "--allow"
        raise UsageError(f"{missing} is missing", advice="--key and --allow go together")
    if args.key is not None:
        if args.insecure:
            raise UsageError("--insecure contradicts --key and --allow")
        return CoordinatorKeys(load_key_pair(args.key), load_allow_list(args.allow))
    if not url.is_private() and not args.insecure:
        advice = "give --key and --allow (nbdshard keygen makes keys), or --insecure to go without"
        raise UserError("a coordinator that others can reach over a network wants keys", str(url), advice)
    return None
