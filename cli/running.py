"""From a parsed command line to an exit code: what `nbdshard copy` and `nbdshard coordinator` have in common.

Everything a job needs is acquired here and in cli.ends, in the order of the checks, and released here however the job
ends. The first local worker is started before the scheduler and ZeroMQ are even imported (cli.jobs): both processes
need a tenth of a second to load, and a small copy is over in three.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack

from nbdshard.cli.ends import Ends
from nbdshard.cli.options import job_options, parse_operands
from nbdshard.cli.setting import Crew, Setting
from nbdshard.common import logs
from nbdshard.common.control_url import ControlUrl
from nbdshard.coordinator.launcher import Launcher, WorkerCommand
from nbdshard.coordinator.signals import SignalWatch

__all__ = ["Crew", "run_copy"]

_CONTROL_SOCKET = "control.sock"


def run_copy(args: Namespace, crew: Crew) -> int:
    """Run the copy that `args` describes; say how it ended; return the exit code.

    Raises UserError or UsageError for what is wrong before it starts, BugError for faults of ours.
    """
    # The log of a coordinator of remote workers tells who comes and goes; a local copy says one line.
    usual = logs.Level.WARNING if crew.listen is None else logs.Level.INFO
    logs.set_up("", logs.Level.DEBUG if args.verbose else usual)
    options = job_options(args)
    endpoints = parse_operands(args)
    with SignalWatch() as signals, ExitStack() as stack:
        ends = Ends(*endpoints, stack)
        launcher: Launcher | None = None
        url = crew.listen
        if url is None:
            url = ControlUrl("ipc", path=ends.directory().socket_path(_CONTROL_SOCKET))
            launcher = _launcher(args, crew.ring, url, ends)
            stack.callback(launcher.close, 0)
            launcher.start_ahead()
        from nbdshard.cli.jobs import conclude, run

        outcome, seconds = run(Setting(args, options, crew, ends, url, launcher, signals), stack)
        ends.settle(outcome)
    return conclude(outcome, seconds, signals.exit_code)


def _launcher(args: Namespace, ring: str, url: ControlUrl, ends: Ends) -> Launcher:
    command = WorkerCommand(
        url=str(url),
        ring=ring,
        verbose=args.verbose,
        inherits_stdin=ends.source.kind == "stream",
        inherits_stdout=ends.destination.kind == "stream",
    )
    return Launcher(command)
