"""From a parsed command line to an exit code: what `nbdshard copy` and `nbdshard coordinator` have in common.

Everything a job needs is acquired here, in the order of the checks (nothing of the destination changes before all of
them passed), and released here, however the job ends.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

from nbdshard.cli.grammar import EXIT_FAILURE, EXIT_OK, EXIT_UNFENCED
from nbdshard.cli.options import ProgressChoice, ProgressKind, job_options, parse_operands
from nbdshard.common import logs
from nbdshard.common.channel import CoordinatorChannel
from nbdshard.common.control_url import ControlUrl
from nbdshard.common.endpoints import (
    CommandEndpoint,
    Endpoint,
    FileEndpoint,
    NbdEndpoint,
    NullEndpoint,
    StreamEndpoint,
)
from nbdshard.common.keys import CoordinatorKeys
from nbdshard.common.limits import BAR_DELAY_SECONDS
from nbdshard.common.machine import machine_id
from nbdshard.common.messages import EndpointAddress, Side
from nbdshard.coordinator import local
from nbdshard.coordinator.command_server import CommandServer
from nbdshard.coordinator.job import Job, Outcome, Verdict
from nbdshard.coordinator.launcher import Launcher, WorkerCommand
from nbdshard.coordinator.private_directory import PrivateDirectory
from nbdshard.coordinator.progress import DelayedDisplay, Display, JsonDisplay, NoDisplay, PercentDisplay, summary
from nbdshard.coordinator.service import Shell, run_job
from nbdshard.coordinator.signals import SignalWatch

_CONTROL_SOCKET = "control.sock"


@dataclass(frozen=True, slots=True)
class Crew:
    """Where the workers come from: `count` local processes, or whoever connects to `listen`."""

    count: int
    ring: str = "auto"
    listen: ControlUrl | None = None  # None: local workers over a private unix socket
    keys: CoordinatorKeys | None = None


def run_copy(args: Namespace, crew: Crew) -> int:
    """Run the copy that `args` describes; say how it ended; return the exit code.

    Raises UserError or UsageError for what is wrong before it starts, BugError for faults of ours.
    """
    logs.set_up("", logs.Level.DEBUG if args.verbose else logs.Level.WARNING)
    options = job_options(args)
    endpoints = parse_operands(args)
    with SignalWatch() as signals, ExitStack() as stack:
        ends = _Ends(*endpoints, stack)
        job = Job(
            uuid=str(uuid4()),
            epoch=1,
            source=ends.source,
            destination=ends.destination,
            options=options,
            connections=1 if ends.has_stream else args.connections,  # a stream has one reader or writer, and no copy
            workers=1 if ends.has_stream else crew.count,
            range_size=args.range_size,
            local_workers=crew.listen is None,
            destination_grows=ends.destination_grows,
            machine=machine_id(),
        )
        start = time.monotonic()
        shell = _shell(args, crew, ends, signals, stack)
        outcome = run_job(job, shell)
        seconds = time.monotonic() - start
        ends.settle(outcome)
    return _conclude(outcome, seconds, signals.exit_code)


def _shell(args: Namespace, crew: Crew, ends: _Ends, signals: SignalWatch, stack: ExitStack) -> Shell:
    url = crew.listen or ControlUrl("ipc", path=ends.directory().socket_path(_CONTROL_SOCKET))
    channel = CoordinatorChannel(url, crew.keys)
    stack.callback(channel.close)
    launcher: Launcher | None = None
    if crew.listen is None:
        command = WorkerCommand(
            url=str(channel.url),
            ring=crew.ring,
            verbose=args.verbose,
            inherits_stdin=ends.source.kind == "stream",
            inherits_stdout=ends.destination.kind == "stream",
        )
        launcher = Launcher(command)
        stack.callback(launcher.close, 0)
    else:
        logs.say(f"listening on {channel.url}")
    display = _display(args.progress)
    stack.callback(display.close)
    return Shell(channel, launcher, ends.prepare, ends.servers, display, signals)


class _Ends:
    """Both ends of the copy, opened as far as the coordinator opens them. `stack` closes what is opened."""

    def __init__(self, source: Endpoint, destination: Endpoint, stack: ExitStack) -> None:
        self._stack = stack
        self._directory: PrivateDirectory | None = None
        self._keep_destination = False
        self.servers: list[CommandServer] = []
        self._local_source = self._open_source(source)
        self._local_destination = self._open_destination(destination)
        stack.callback(self._remove_unwritten)
        # Servers last: whatever can be refused without them is refused before they run.
        self.source = self._address(source, "source", self._local_source)
        self.destination = self._address(destination, "destination", self._local_destination)

    @property
    def has_stream(self) -> bool:
        return "stream" in (self.source.kind, self.destination.kind)

    @property
    def destination_grows(self) -> bool:
        return self._local_destination is not None and self._local_destination.grows

    def directory(self) -> PrivateDirectory:
        """The job's private directory, made when first needed."""
        if self._directory is None:
            self._directory = self._stack.enter_context(PrivateDirectory())
        return self._directory

    def prepare(self, size: int) -> None:
        """Give the destination its size. Raises UserError."""
        if self._local_destination is not None:
            self._local_destination.prepare(size)

    def settle(self, outcome: Outcome) -> None:
        """Keep a destination file that this job created: it has content now, or might still get some."""
        if outcome.verdict in (Verdict.COMPLETE, Verdict.UNFENCED) or outcome.counters.total:
            self._keep_destination = True

    def _remove_unwritten(self) -> None:
        if self._local_destination is not None and not self._keep_destination:
            self._local_destination.discard()

    def _open_source(self, endpoint: Endpoint) -> local.LocalEnd | None:
        match endpoint:
            case FileEndpoint(path):
                end = local.open_source(path)
            case StreamEndpoint():
                end = local.standard_input()
            case _:
                return None
        self._stack.callback(end.close)
        return end

    def _open_destination(self, endpoint: Endpoint) -> local.LocalEnd | None:
        match endpoint:
            case FileEndpoint(path):
                end = local.open_destination(path, self._local_source)
            case StreamEndpoint():
                end = local.standard_output(self._local_source)
            case _:
                return None
        self._stack.callback(end.close)
        return end

    def _address(self, endpoint: Endpoint, side: Side, end: local.LocalEnd | None) -> EndpointAddress:
        if end is not None:
            return end.address
        match endpoint:
            case NbdEndpoint():
                return EndpointAddress(kind="nbd", address=str(endpoint.uri))
            case CommandEndpoint(argv):
                server = CommandServer(argv, side, self.directory())
                self._stack.callback(server.close)
                self.servers.append(server)
                return EndpointAddress(kind="nbd", address=server.uri)
            case NullEndpoint() | FileEndpoint() | StreamEndpoint():
                return EndpointAddress(kind="null", address="null:")


def _display(choice: ProgressChoice) -> Display:
    """The display that was asked for; on a terminal a bar unasked, for copies that take a while."""
    now = time.monotonic()
    match choice.kind:
        case ProgressKind.AUTO:
            return DelayedDisplay(now, BAR_DELAY_SECONDS, _bar) if sys.stderr.isatty() else NoDisplay()
        case ProgressKind.BAR:
            return _bar(now)
        case ProgressKind.JSON:
            return JsonDisplay(now)
        case ProgressKind.DESCRIPTOR:
            return NoDisplay() if choice.descriptor is None else PercentDisplay(choice.descriptor)


def _bar(start: float) -> Display:
    from nbdshard.coordinator.bar import BarDisplay  # rich takes longer to import than a small copy takes

    return BarDisplay(start)


def _conclude(outcome: Outcome, seconds: float, interrupted_code: int) -> int:
    """Say how it ended, and choose the exit code."""
    for name in outcome.unfenced:
        logs.warning(f"worker {name} was not heard to close its connections: it may still write to the destination")
    if outcome.verdict is Verdict.FAILED:
        logs.say(outcome.error)
        return EXIT_FAILURE
    logs.say(summary(outcome, seconds))
    return {
        Verdict.COMPLETE: EXIT_OK,
        Verdict.STOPPED: interrupted_code,
        Verdict.UNFENCED: EXIT_UNFENCED,
    }[outcome.verdict]
