"""`nbdshard serve` with drivers, layers, options and commands of one's own: for programs that extend the server.

::

    sys.exit(serve_extended(Extensions(layers={**LAYERS, "mine": MINE})))
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from nbdshard.cli import serve
from nbdshard.cli.grammar import Parser
from nbdshard.cli.main import main
from nbdshard.server.extensions import Extensions


def serve_extended(extensions: Extensions, words: Sequence[str] | None = None) -> int:
    """What `nbdshard serve WORDS` does, with `extensions`; the exit code. `words`: those of the command line."""
    return main(["serve", *(sys.argv[1:] if words is None else words)], lambda _: _Extended(extensions))


class _Extended:
    def __init__(self, extensions: Extensions) -> None:
        self._extensions = extensions

    def build_parser(self, prog: str) -> Parser:
        return serve.build_parser(prog)

    def run(self, args: Namespace) -> int:
        return serve.run(args, self._extensions)
