"""From a parsed command line to an exit code: what `nbdshard copy` and `nbdshard coordinator` have in common.

Everything a job needs is acquired here and in cli.ends, in the order of the checks, and released here however the job
ends. The first local worker is forked before the scheduler is even imported (cli.jobs), and so are spares for a copy
that turns out to be large: what both sides need is loaded once, what only one of them needs is loaded at the same time.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from nbdshard.cli.ends import Ends
from nbdshard.cli.options import job_options, parse_operands
from nbdshard.cli.setting import Crew, Setting
from nbdshard.common import channel as _channel  # noqa: F401 (both processes need it: loaded once, before the fork)
from nbdshard.common import logs
from nbdshard.common.control_url import ControlUrl
from nbdshard.common.descriptors import check_descriptors
from nbdshard.common.signals import SignalWatch
from nbdshard.coordinator.launcher import Launcher, WorkerCommand

if TYPE_CHECKING:
    from nbdshard.cli.jobs import Ended

Conclude: TypeAlias = "Callable[[Ended, int], int]"

__all__ = ["Crew", "run_copy"]

_CONTROL_SOCKET = "control.sock"


def run_copy(args: Namespace, crew: Crew, conclude: Conclude | None = None) -> int:
    """Run the copy that `args` describes; say how it ended; return the exit code.

    `conclude`: says how it ended, in the place of a copy's lines, and has the exit code of an interrupted one given.
    Raises UserError or UsageError for what is wrong before it starts, BugError for faults of ours.
    """
    # The log of a coordinator of remote workers tells who comes and goes; a local copy says one line.
    usual = logs.Level.WARNING if crew.listen is None else logs.Level.INFO
    logs.set_up("", logs.Level.DEBUG if args.verbose else usual)
    options = job_options(args)
    endpoints = parse_operands(args)
    check_descriptors()
    with SignalWatch() as signals, ExitStack() as stack:
        ends = Ends(*endpoints, stack, resumes=args.resume or args.force_resume, writes=args.mode == "copy")
        if ends.has_stream:  # it has one reader or writer
            crew = msgspec.structs.replace(crew, count=1)
        launcher: Launcher | None = None
        url = crew.listen
        if url is None:
            url = ControlUrl("ipc", path=ends.directory().socket_path(_CONTROL_SOCKET))
            launcher = _launcher(args, crew.ring, url, ends)
            stack.callback(launcher.close, 0)
            launcher.start_ahead(_be_worker, spares=crew.count - 1)
        from nbdshard.cli.jobs import conclude as conclude_copy
        from nbdshard.cli.jobs import run

        ended = run(Setting(args, options, crew, ends, url, launcher, signals), stack)
        ends.settle(ended.outcome, is_resumable=bool(ended.resume))
    return (conclude or conclude_copy)(ended, signals.exit_code)


def _be_worker(words: Sequence[str]) -> int:
    """The whole life of a worker that was forked: what a process started with these words does."""
    from nbdshard.cli.main import main
    from nbdshard.cli.title import show_as

    show_as("nbdshard worker", ["nbdshard", *words])
    return main(words)


def _launcher(args: Namespace, ring: str, url: ControlUrl, ends: Ends) -> Launcher:
    command = WorkerCommand(
        url=str(url),
        ring=ring,
        verbose=args.verbose,
        inherits_stdin=ends.source.kind == "stream",
        inherits_stdout=ends.destination.kind == "stream",
    )
    return Launcher(command)
