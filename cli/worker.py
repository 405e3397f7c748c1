"""`nbdshard worker`: work for a coordinator, here or on another machine."""

from __future__ import annotations

import argparse
import os
import signal
from argparse import Namespace
from typing import TYPE_CHECKING, Final

from nbdshard.cli.grammar import EXIT_OK, Parser, UsageError
from nbdshard.cli.options import add_ring_option
from nbdshard.common import logs
from nbdshard.common.control_url import parse_control_url
from nbdshard.common.errors import UserError

if TYPE_CHECKING:
    from nbdshard.common.keys import WorkerKeys

USAGE: Final = "nbdshard worker --connect URL [--key FILE --coordinator-key FILE] [OPTIONS]"
EPILOG: Final = """\
URL is where the coordinator listens: tcp://HOST:PORT or ipc:///PATH. Over a network it wants to know this
worker's key, and shows its own; nbdshard keygen makes both."""

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_NAME_DIGITS: Final = 32


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard worker`."""
    parser = Parser(prog, "Copy ranges for a coordinator until it says stop.", USAGE, EPILOG)
    parser.add_argument("--connect", metavar="URL", required=True, help="where the coordinator listens")
    parser.add_argument("--key", metavar="FILE", help="this worker's secret key (NAME.key)")
    parser.add_argument("--coordinator-key", metavar="FILE", help="the coordinator's public key (NAME.pub)")
    add_ring_option(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="say on standard error what is being done")
    # What a coordinator starts its local workers with:
    parser.add_argument("--name", type=_name, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def run(args: Namespace) -> int:
    """Work until told to stop. Raises UserError when the coordinator cannot be reached or turns this worker away."""
    if args.parent is not None:
        die_with_parent(args.parent)
    parse_control_url(args.connect)
    keys = _keys(args)
    role = f"worker {args.name[:8]}" if args.name else "worker"
    logs.set_up(role, logs.Level.DEBUG if args.verbose else logs.Level.WARNING)
    from nbdshard.common.descriptors import check_descriptors
    from nbdshard.worker.run import run_worker

    check_descriptors()
    return run_worker(args.connect, ring=args.ring, name=args.name or "", keys=keys) or EXIT_OK


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it, `parent`, dies of whatever cause.

    A coordinator that is killed cannot stop its workers. Raises UserError if it is gone already.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise UserError(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise UserError(f"the coordinator, process {parent}, has ended")


def _keys(args: Namespace) -> WorkerKeys | None:
    if args.key is None and args.coordinator_key is None:
        return None
    if args.key is None or args.coordinator_key is None:
        missing = "--key" if args.key is None else "--coordinator-key"
        raise UsageError(f"{missing} is missing", advice="--key and --coordinator-key go together")
    from nbdshard.common.keys import WorkerKeys, load_key_pair, load_public_key

    return WorkerKeys(load_key_pair(args.key), load_public_key(args.coordinator_key))


def _name(text: str) -> str:
    if len(text) != _NAME_DIGITS or not all(digit in "0123456789abcdef" for digit in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not {_NAME_DIGITS} hexadecimal digits")
    return text
