"""`nbdshard keygen`: make the two files by which a coordinator and its workers know each other."""

from __future__ import annotations

from argparse import Namespace
from typing import Final

from nbdshard.cli.grammar import EXIT_OK, Parser
from nbdshard.cli.standard_streams import tell

USAGE: Final = "nbdshard keygen [--dir DIR] NAME"
EPILOG: Final = """\
Writes NAME.key, the secret, which stays on its machine, and NAME.pub, which the other side wants:
  nbdshard coordinator --key coordinator.key --allow DIR-OF-WORKERS'-PUB-FILES ...
  nbdshard worker --key worker.key --coordinator-key coordinator.pub ...
Files that exist are never overwritten."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard keygen`."""
    parser = Parser(prog, "Make a pair of keys for the control channel.", USAGE, EPILOG)
    parser.add_argument(
        "--dir", metavar="DIR", default=".", help="where to write them (default: the current directory)"
    )
    parser.add_argument("name", metavar="NAME", help="what to call the files")
    return parser


def run(args: Namespace) -> int:
    """Write the files and say where they are. Raises UserError when one is there already or cannot be written."""
    from nbdshard.common.keys import KeyPair, write_key_files

    pair = KeyPair.generate()
    secret, public = write_key_files(args.dir, args.name, pair)
    tell(f"{secret}: the secret key; keep it here and private")
    tell(f"{public}: the public key {pair.public}; give it to the other side")
    return EXIT_OK
