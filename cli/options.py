"""The options of a copy, under nbdcopy's names: a script which calls nbdcopy can call `nbdshard copy`.

What `nbdshard copy` and `nbdshard coordinator` share is added by the `add_*` functions, read by the others.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
from collections.abc import Container
from enum import Enum, auto
from typing import Any, Final, get_args

import msgspec

from nbdshard.cli.grammar import COUNT, Parser, UsageError, count_between, refuse, size_where
from nbdshard.common.endpoints import Endpoint, parse_endpoint
from nbdshard.common.limits import (
    BACKOFF_SECONDS_MAX,
    CHECKPOINT_SECONDS,
    CHECKSUM_RANGE_BYTES_MAX,
    CONNECT_SECONDS,
    CONNECTIONS_DEFAULT,
    CONNECTIONS_MAX,
    HANDSHAKE_SECONDS,
    LOSS_SECONDS,
    LOSS_SECONDS_MAX,
    QUEUE_BYTES_DEFAULT,
    QUEUE_BYTES_MAX,
    RANGE_BYTES_DEFAULT,
    RANGE_BYTES_MAX,
    RANGE_BYTES_MIN,
    RATE_BYTES_MIN,
    REQUEST_BYTES_DEFAULT,
    REQUEST_BYTES_MAX,
    REQUEST_BYTES_MIN,
    REQUEST_SECONDS,
    REQUESTS_DEFAULT,
    REQUESTS_MAX,
    RETRIES,
    RETRIES_MAX,
    SPARSE_UNIT_MIN,
    TIMEOUT_SECONDS_MAX,
    TIMEOUT_SECONDS_MIN,
    WORKERS_MAX,
)
from nbdshard.common.logins import without_logins
from nbdshard.common.messages import DataPath, JobOptions
from nbdshard.common.units import size_text

RINGS: Final = ("auto", "io_uring", "epoll")
DATA_PATHS: Final = get_args(DataPath)
READING_OPTIONS: Final = frozenset(  # of a copy: what says how the source is read
    {
        "--connect-timeout",
        "--connections",
        "--handshake-timeout",
        "--loss-timeout",
        "--no-extents",
        "--queue-size",
        "--range-size",
        "--rate",
        "--reconnect-delay",
        "--request-size",
        "--request-timeout",
        "--requests",
        "--retries",
    }
)
SECONDS: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")
SECONDS_OF: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def _is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


_request_size = size_where(
    f"a power of two from {size_text(REQUEST_BYTES_MIN)} to {size_text(REQUEST_BYTES_MAX)}",
    lambda size: REQUEST_BYTES_MIN <= size <= REQUEST_BYTES_MAX and _is_power_of_two(size),
)
_sparse_unit = size_where(
    f"0 or a power of two from {size_text(SPARSE_UNIT_MIN)} to {size_text(REQUEST_BYTES_MAX)}",
    lambda size: size == 0 or (SPARSE_UNIT_MIN <= size <= REQUEST_BYTES_MAX and _is_power_of_two(size)),
)
_queue_size = size_where(
    f"a size from 0 to {size_text(QUEUE_BYTES_MAX)}",
    lambda size: size <= QUEUE_BYTES_MAX,
)
rate_limit = size_where(
    f"a number of bytes per second, {size_text(RATE_BYTES_MIN)} at least; 200M is 200 MiB/s",
    lambda rate: rate >= RATE_BYTES_MIN,
)
_range_size = size_where(
    f"a multiple of {size_text(RANGE_BYTES_MIN)}, at most {size_text(RANGE_BYTES_MAX)}",
    lambda size: RANGE_BYTES_MIN <= size <= RANGE_BYTES_MAX and size % RANGE_BYTES_MIN == 0,
)


class ProgressKind(Enum):
    """How progress is shown."""

    AUTO = auto()  # a bar if standard error is a terminal, else nothing
    BAR = auto()  # a bar; on what is no terminal, plain lines
    JSON = auto()  # one JSON object a second on standard error
    DESCRIPTOR = auto()  # lines "N/100" on a descriptor, as nbdcopy writes them


class ProgressChoice(msgspec.Struct, frozen=True):
    """What `--progress` asks for; `descriptor` only with DESCRIPTOR."""

    kind: ProgressKind
    descriptor: int | None = None


def progress_choice(text: str) -> ProgressChoice:
    """The value of `--progress=`: `bar`, `json`, or the number of a descriptor that is open for writing."""
    if text == "bar":
        return ProgressChoice(ProgressKind.BAR)
    if text == "json":
        return ProgressChoice(ProgressKind.JSON)
    if COUNT.fullmatch(text) is None:
        refuse(text, "'bar', 'json' or the number of an open descriptor")
    descriptor = int(text)
    try:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, OverflowError):
        refuse(text, "an open descriptor")
    if mode == os.O_RDONLY:
        refuse(text, "a descriptor open for writing")
    return ProgressChoice(ProgressKind.DESCRIPTOR, descriptor)


def _seconds(text: str) -> float:
    """A number of seconds, or of `m`, `h` or `d`."""
    return _seconds_within(text, 0.0, LOSS_SECONDS_MAX)


def _timeout(text: str) -> float:
    """As `_seconds`, for something that has to be answered."""
    return _seconds_within(text, TIMEOUT_SECONDS_MIN, TIMEOUT_SECONDS_MAX)


def _seconds_within(text: str, low: float, high: float) -> float:
    match = SECONDS.fullmatch(text)
    seconds = float(match[1]) * SECONDS_OF[match[2]] if match is not None else -1.0
    if not low <= seconds <= high:
        refuse(text, f"a number of seconds from {low:g} to {high:.0f}; 10m, 2h and 1d are understood too")
    return seconds


def add_copy_options(parser: argparse.ArgumentParser, only: Container[str] | None = None) -> None:
    """Add the options that say how to copy, shared by `copy` and `coordinator`.

    `only`: a job that writes nothing has these alone, by their long names; the others have their defaults.
    """
    size = "SIZE"

    def add(*names: str, **how: Any) -> None:
        long = next(name for name in names if name.startswith("--"))
        if only is None or long in only:
            parser.add_argument(*names, **how)
        else:
            is_flag = how.get("action") == "store_true"
            parser.set_defaults(**{long[2:].replace("-", "_"): False if is_flag else how.get("default")})

    add(
        "--allocated",
        action="store_true",
        help="write a fully allocated destination: no holes, no zero detection",
    )
    add(
        "-C",
        "--connections",
        metavar="N",
        type=count_between(1, CONNECTIONS_MAX),
        default=CONNECTIONS_DEFAULT,
        help=f"connections to each side, shared by all workers (default {CONNECTIONS_DEFAULT})",
    )
    add(
        "--checkpoint",
        metavar="SECONDS",
        type=_seconds,
        default=CHECKPOINT_SECONDS,
        help=f"flush what was written, and remember it, so often (default {CHECKPOINT_SECONDS:g})",
    )
    add(
        "--checksum",
        action="store_true",
        help="compute the checksum of what is copied, and print it: nbdcopy's --blkhash",
    )
    add(
        "--connect-timeout",
        metavar="SECONDS",
        type=_timeout,
        default=CONNECT_SECONDS,
        help=f"how long a connection may take to come up (default {CONNECT_SECONDS:g})",
    )
    add(
        "--destination-is-zero",
        "--target-is-zero",
        action="store_true",
        help="trust that the destination reads as zeroes, and skip zeroes",
    )
    add("--flush", action="store_true", help="flush before exit: the default, taken for nbdcopy's sake")
    add("--no-flush", action="store_true", help="do not flush: what is copied may still be in caches at exit")
    add(
        "--handshake-timeout",
        metavar="SECONDS",
        type=_timeout,
        default=HANDSHAKE_SECONDS,
        help=f"how long a server may take to offer its export (default {HANDSHAKE_SECONDS:g})",
    )
    add("--journal", metavar="FILE", help="where to remember how far the copy is (default: in the state directory)")
    add("--keep-journal", action="store_true", help="keep the journal of a copy that is complete")
    add("--resume", action="store_true", help="go on where the copy of --journal ended")
    add("--force-resume", action="store_true", help="the same, even if something is not as it was")
    add("--no-extents", action="store_true", help="do not ask the source what is sparse; read everything")
    add(
        "--data-path",
        choices=DATA_PATHS,
        default="auto",
        help="splice payload past user space, or copy it through a buffer (default auto: splice where it can be)",
    )
    add(
        "--loss-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=None,
        help=f"how long a server that was lost is waited for (default {LOSS_SECONDS:g}, or its hint); 0: fail at once",
    )
    add(
        "--queue-size",
        metavar=size,
        type=_queue_size,
        default=QUEUE_BYTES_DEFAULT,
        help=f"bytes in flight on each connection (default {size_text(QUEUE_BYTES_DEFAULT)})",
    )
    add(
        "--range-size",
        metavar=size,
        type=_range_size,
        default=None,
        help=f"bytes a worker takes at a time (default {size_text(RANGE_BYTES_DEFAULT)}, less for small exports)",
    )
    add(
        "--rate",
        metavar="LIMIT",
        type=rate_limit,
        default=None,
        help="bytes per second that all workers together read, k, M and G as in SIZE (default: as fast as it goes)",
    )
    add(
        "--reconnect-delay",
        metavar="SECONDS",
        type=_timeout,
        default=None,
        help=f"the longest pause before a lost server is tried again (default {BACKOFF_SECONDS_MAX:g}, or its hint)",
    )
    add(
        "--request-size",
        metavar=size,
        type=_request_size,
        default=None,
        help=f"bytes of one read or write, at most (default {size_text(REQUEST_BYTES_DEFAULT)}, or half of it)",
    )
    add(
        "-R",
        "--requests",
        metavar="N",
        type=count_between(1, REQUESTS_MAX),
        default=REQUESTS_DEFAULT,
        help=f"requests in flight on each connection (default {REQUESTS_DEFAULT})",
    )
    add(
        "--request-timeout",
        metavar="SECONDS",
        type=_timeout,
        default=None,
        help=f"how old a request may become, and a second more for each MiB (default {REQUEST_SECONDS:g}, or its hint)",
    )
    add(
        "--retries",
        metavar="N",
        type=count_between(0, RETRIES_MAX),
        default=RETRIES,
        help=f"how often a failed read or write is tried again (default {RETRIES})",
    )
    add(
        "--salvage",
        action="store_true",
        help="write zeroes for what the source cannot read after all tries, go on, and exit with 3",
    )
    add(
        "-S",
        "--sparse",
        metavar=size,
        type=_sparse_unit,
        default=None,
        help="unit of zeroes to find in data (default 4k, or what the destination prefers); 0: do not look",
    )
    add("--synchronous", action="store_true", help="copy in order, one worker, one request at a time")
    add("--verify", action="store_true", help="read back what was written, after the flush, and compare it")
    parser.set_defaults(mode="copy")


def add_progress_options(parser: Parser) -> None:
    """Add `-p`, `--progress` and `-v`."""
    parser.value_unless_given["--progress"] = "bar"
    parser.add_argument(
        "-p",
        dest="progress",
        action="store_const",
        const=ProgressChoice(ProgressKind.BAR),
        default=ProgressChoice(ProgressKind.AUTO),
        help="show a progress bar, also where standard error is no terminal",
    )
    parser.add_argument(
        "--progress",
        metavar="HOW",
        dest="progress",
        type=progress_choice,
        default=argparse.SUPPRESS,
        help="=bar as -p; =json one object a second; =FD lines 'N/100' on that descriptor",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say on standard error what is being done")


def add_ring_option(parser: argparse.ArgumentParser) -> None:
    """Add `--ring`."""
    parser.add_argument(
        "--ring",
        choices=RINGS,
        default="auto",
        help="I/O loop: io_uring, epoll, or what works here (default auto)",
    )


def add_worker_count(parser: argparse.ArgumentParser) -> None:
    """Add `-T`, `--threads` and `--workers`; 0 and the default mean the number of usable cores."""
    parser.add_argument(
        "-T",
        "--threads",
        "--workers",
        metavar="N",
        dest="workers",
        type=count_between(0, WORKERS_MAX),
        default=0,
        help="worker processes (default, and 0: the number of usable cores)",
    )


def add_operands(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE and DESTINATION; `parse_operands` turns them into endpoints."""
    parser.add_argument("operands", metavar="SOURCE DESTINATION", nargs="*", help=argparse.SUPPRESS)


def add_reading_options(parser: Parser) -> None:
    """What a command takes that reads its operands by workers of its own, and tells at the end what it found."""
    add_copy_options(parser, only=READING_OPTIONS)
    add_progress_options(parser)
    add_ring_option(parser)
    add_worker_count(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_operands(parser)


def parse_operands(args: argparse.Namespace) -> tuple[Endpoint, Endpoint]:
    """SOURCE and DESTINATION. Raises UsageError unless there are two, UserError for what is wrong in them."""
    operands: list[str] = args.operands
    commands: dict[str, list[str]] = args.commands
    if len(operands) < 2:
        missing = "the destination is" if operands else "source and destination are"
        raise UsageError(f"{missing} missing", advice="see --help for what can stand there")
    if len(operands) > 2:
        extra = words_of(operands[2], args)
        raise UsageError(f"one word too many: {extra!r}", advice="a copy has one source and one destination")
    source, destination = (commands.get(word, word) for word in operands)
    return parse_endpoint(source, "source"), parse_endpoint(destination, "destination")


def job_options(args: argparse.Namespace) -> JobOptions:
    """The options a worker needs. A queue smaller than one request is raised to it."""
    if args.flush and args.no_flush:
        raise UsageError("--flush and --no-flush contradict each other")
    if args.checksum and args.data_path == "splice":
        raise UsageError("--checksum and --data-path=splice contradict each other: all data has to be looked at")
    if args.checksum and (args.range_size or 0) > CHECKSUM_RANGE_BYTES_MAX:
        most = size_text(CHECKSUM_RANGE_BYTES_MAX)
        raise UsageError(f"--range-size is {size_text(args.range_size)}: with --checksum it is at most {most}")
    if args.verify and args.no_flush:
        raise UsageError("--verify and --no-flush contradict each other: what is read back may never reach the disk")
    if args.verify and args.salvage:
        raise UsageError("--verify and --salvage contradict each other: what cannot be read cannot be compared")
    request_size = args.request_size or REQUEST_BYTES_DEFAULT
    return JobOptions(
        request_size=request_size,
        request_size_varies=args.request_size is None,
        requests=1 if args.synchronous else args.requests,
        queue_size=max(args.queue_size, request_size),
        sparse_unit=0 if args.allocated else args.sparse,
        allocated=args.allocated,
        destination_is_zero=args.destination_is_zero,
        extents=not args.no_extents,
        synchronous=args.synchronous,
        flush=not args.no_flush,
        data_path=args.data_path,
        connect_seconds=args.connect_timeout,
        handshake_seconds=args.handshake_timeout,
        request_seconds=REQUEST_SECONDS if args.request_timeout is None else args.request_timeout,
        request_hinted=args.request_timeout is None,
        attempts=args.retries + 1,
        salvage=args.salvage,
        checksum=args.checksum,
        mode=args.mode,
    )


def worker_count(args: argparse.Namespace) -> int:
    """How many local workers to start."""
    if args.synchronous:
        return 1
    return args.workers or len(os.sched_getaffinity(0))


def parse_one_operand(args: argparse.Namespace, what: str) -> Endpoint:
    """The only operand of `info` and `map`. Raises UsageError unless there is one, UserError if it is wrong."""
    operands: list[str] = args.operands
    if not operands:
        raise UsageError(f"{what} is missing", advice="see --help")
    if len(operands) > 1:
        raise UsageError(f"one word too many: {words_of(operands[1], args)!r}")
    if operands[0] in args.commands:
        advice = "give the URI of a server that runs"
        raise UsageError("a command is for nbdshard copy", words_of(operands[0], args), advice)
    return parse_endpoint(operands[0], "source")


def words_of(operand: str, args: argparse.Namespace) -> str:
    """How messages and journals show an operand: a bracketed command with its brackets, and without passwords."""
    if operand not in args.commands:
        return operand
    return f"[ {' '.join(without_logins(word) for word in args.commands[operand])} ]"
