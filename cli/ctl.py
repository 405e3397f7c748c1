"""`nbdshard ctl`: tell a running copy how fast to go, to pause or to go on, or ask how it stands."""

from __future__ import annotations

import os
import re
import socket
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from nbdshard.cli.grammar import EXIT_OK, Parser, UsageError
from nbdshard.cli.options import rate_limit
from nbdshard.cli.standard_streams import tell
from nbdshard.common.errors import UserError
from nbdshard.common.limits import ANSWER_BYTES_MAX, ORDER_ANSWER_SECONDS
from nbdshard.common.logs import printable
from nbdshard.common.units import format_bytes, format_rate, format_seconds
from nbdshard.coordinator.control_paths import reachable, sockets
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.orders import ORDER_VERSION, JobStatus, Order, decode_answer, encode

USAGE: Final = "nbdshard ctl [--json] JOB status | pause | continue | rate LIMIT | rate off"
EPILOG: Final = """\
JOB is a job's uuid or its beginning, as nbdshard jobs and copy -v show it, or a journal's file. LIMIT is in bytes per
second, or a whole number with k, M or G, for all workers together. A copy that pauses keeps its connections."""
WORDS: Final = ("status", "pause", "continue", "rate")
NAMED_MAX: Final = 8  # jobs that an error message lists
_UUID_BEGINS: Final = re.compile(r"[0-9a-f-]{1,36}")


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard ctl`."""
    parser = Parser(prog, "Control a copy that runs.", USAGE, EPILOG)
    parser.add_argument("--json", action="store_true", help="print how the job stands as one JSON object")
    parser.add_argument("words", metavar="JOB WORD", nargs="*", help="the job, and what to do")
    return parser


def run(args: Namespace) -> int:
    """Have it done, and tell how the job stands then. Raises UsageError, UserError: there is no such job."""
    words: list[str] = args.words
    if not words:
        raise UsageError("which job, and what is it to do?", advice=f"the job is followed by {_listed()}")
    order = order_of(words[1:])
    path = _socket_of(words[0])
    status = ask(words[0], path, order)
    tell(msgspec.json.encode(status).decode() if args.json else line(status))
    return EXIT_OK


def order_of(words: Sequence[str]) -> Order:
    """What `words` say is to be done. Raises UsageError."""
    match words:
        case []:
            raise UsageError("what is the job to do?", advice=f"say {_listed()}")
        case ["status" | "pause" | "continue" as word]:
            return Order(ORDER_VERSION, word)
        case ["rate"]:
            raise UsageError("rate: how many bytes per second?", advice="'off' is without a limit")
        case ["rate", "off"]:
            return Order(ORDER_VERSION, "rate")
        case ["rate", text]:
            try:
                return Order(ORDER_VERSION, "rate", rate_limit(text))
            except ArgumentTypeError as error:
                raise UsageError(
                    f"rate: {error}", advice="'pause' has it wait, 'rate off' takes a limit away"
                ) from None
        case [word, *rest] if word in WORDS:
            raise UsageError(f"one word too many: {rest[-1]!r}")
        case _:
            raise UsageError(f"unknown order {words[0]!r}", advice=f"known are {_listed()}")


def _listed() -> str:
    return f"{', '.join(WORDS[:-1])} or rate LIMIT"


def _socket_of(job: str) -> str:
    """The socket of the job that `job` means. Raises UserError unless it means exactly one that runs."""
    is_file = os.path.lexists(job)
    begins = Journal.read(job).facts.uuid if is_file else job
    there = sockets(beside=[os.path.dirname(os.path.realpath(job))] if is_file else ())
    found = [uuid for uuid in there if _UUID_BEGINS.fullmatch(begins) and uuid.startswith(begins)]
    if len(found) == 1:
        return there[found[0]]
    if found:
        raise UserError("is the beginning of several running jobs' uuids", job, ", ".join(found[:NAMED_MAX]))
    if not is_file and (path := _socket_by_journal(job, there)):
        return path
    running = ", ".join(list(there)[:NAMED_MAX])
    raise UserError("no such job runs", job, f"those that run: {running}" if running else "no copy of yours runs")


def _socket_by_journal(job: str, there: Mapping[str, str]) -> str:
    """The socket of the running job whose journal will be the file `job`, which is not there yet; "": there is none."""
    wanted = os.path.abspath(job)
    for path in there.values():
        with suppress(UserError):
            if ask(job, path, Order(ORDER_VERSION, "status")).journal == wanted:
                return path
    return ""


def ask(job: str, path: str, order: Order) -> JobStatus:
    """Send `order` to the socket at `path`, and wait for the answer. Raises UserError.

    A socket that nobody listens at is what a job left behind that was killed: it is removed.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(ORDER_ANSWER_SECONDS)
        try:
            with reachable(path) as name:
                end.connect(name)
            end.send(encode(order), socket.MSG_NOSIGNAL)
            packet = end.recv(ANSWER_BYTES_MAX + 1)
        except FileNotFoundError:
            raise UserError("no such job runs", job, "it has just ended") from None
        except ConnectionRefusedError:
            with suppress(OSError):
                os.unlink(path)
            raise UserError("no such job runs", job, "it was killed; `nbdshard jobs` lists what can go on") from None
        except TimeoutError:
            raise UserError(f"the job did not answer within {ORDER_ANSWER_SECONDS:g} s", job) from None
        except OSError as error:
            raise UserError(f"the job cannot be asked: {error.strerror}", job) from None
    if not packet:
        raise UserError("the job did not answer", job, "it may have ended; try again")
    answer = decode_answer(packet)
    if answer.status is None:
        raise UserError(printable(answer.error) or "the job refused", job)
    return answer.status


def line(status: JobStatus) -> str:
    """How the job stands, for people."""
    done = format_bytes(status.bytes_done)
    if status.bytes_total is not None:
        percent = status.bytes_done * 100 // status.bytes_total if status.bytes_total else 100
        done = f"{done} of {format_bytes(status.bytes_total)} ({percent} %)"
    parts = [f"{printable(status.phase)}, {done}", format_rate(status.rate_bytes_per_second)]
    limit = status.rate_limit_bytes_per_second
    parts.append("no limit" if limit is None else f"at most {format_rate(limit)}")
    if status.eta_seconds is not None:
        parts.append(f"ETA {format_seconds(status.eta_seconds)}")
    parts.append("1 worker" if status.workers == 1 else f"{status.workers} workers")
    if status.waiting_for:
        parts.append(f"waiting for a server: {printable(status.waiting_for)}")
    return f"{printable(status.job)}  {'; '.join(parts)}"
