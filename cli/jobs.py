"""One job, once its ends are open: the channel, the display, the loop, and the last line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from nbdshard.cli.grammar import EXIT_DIFFERENT, EXIT_FAILURE, EXIT_OK, EXIT_PAUSED, EXIT_UNFENCED, EXIT_UNREADABLE
from nbdshard.cli.journaling import Start, export_command, resume_command
from nbdshard.cli.journaling import start as begin
from nbdshard.cli.options import ProgressChoice, ProgressKind, words_of
from nbdshard.cli.setting import Setting
from nbdshard.cli.standard_streams import tell
from nbdshard.common import logs
from nbdshard.common.channel import CoordinatorChannel
from nbdshard.common.limits import BACKOFF_SECONDS_MAX, BAR_DELAY_SECONDS, LOSS_SECONDS
from nbdshard.common.logins import HIDDEN
from nbdshard.common.machine import machine_id
from nbdshard.coordinator.control_socket import ControlSocket
from nbdshard.coordinator.job import Job, Outcome, Verdict
from nbdshard.coordinator.progress import DelayedDisplay, Display, JsonDisplay, NoDisplay, PercentDisplay, summary
from nbdshard.coordinator.service import Shell, run_job

Report = Callable[[Outcome, float], None]  # what to tell of a job that is complete, and took so many seconds


class Ended(msgspec.Struct, frozen=True):
    """A job that is over.

    `resume`: the command that goes on with it; `export`: the one that lists what could not be read; "" when none can.
    `source`: as the user named it. `is_output`: the copy itself is standard output. `differs`: see Start; "" also once
    the copy has been verified.
    """

    outcome: Outcome
    seconds: float
    resume: str
    export: str
    source: str
    is_output: bool
    differs: str


def run(setting: Setting, stack: ExitStack) -> Ended:
    """Listen, run the job to its end. `stack` closes what is opened here. Raises UserError and UsageError before."""
    start = time.monotonic()
    channel = CoordinatorChannel(setting.url, setting.crew.keys)
    stack.callback(channel.close)
    if setting.launcher is None:
        logs.say(f"listening on {channel.url}")
    display = _display(setting.args.progress)
    stack.callback(display.close)
    ends = setting.ends
    begun = begin(setting, stack)
    keeper = begun.keeper
    control = ControlSocket.listen(begun.uuid, time.monotonic(), journal=keeper.place if keeper is not None else "")
    if control is not None:
        stack.callback(control.close)
        logs.debug(f"job {begun.uuid}: nbdshard ctl {begun.uuid[:8]} status")
    shell = Shell(channel, setting.launcher, ends.prepare, ends.servers, display, setting.signals, keeper, control)
    outcome = run_job(_job(setting, begun), shell)
    if keeper is not None:
        keeper.end(outcome)
    resume = export = ""
    if keeper is not None and keeper.path and outcome.verdict is not Verdict.COMPLETE:
        resume = resume_command(setting.args.command_line, keeper.path, forced=setting.args.force_resume)
    elif keeper is not None and keeper.path and outcome.unreadable:
        export = export_command(keeper.path)
    outcome = msgspec.structs.replace(
        outcome,
        error=ends.in_users_words(outcome.error) + _advice(begun, outcome),
        source_peer=ends.in_users_words(outcome.source_peer),
        destination_peer=ends.in_users_words(outcome.destination_peer),
    )
    source, destination = setting.args.operands
    named, is_output = words_of(source, setting.args), destination == "-"
    differs = "" if setting.args.verify else begun.differs
    return Ended(outcome, time.monotonic() - start, resume, export, named, is_output, differs)


def _advice(begun: Start, outcome: Outcome) -> str:
    """For who resumed a copy and whose servers were there for the look at what is durable, but not for the workers."""
    if begun.durable and outcome.verdict is Verdict.FAILED and outcome.size is None:
        return "; a server that leaves with its last client (qemu-nbd without -t) must be told to stay before --resume"
    return ""


def _job(setting: Setting, begun: Start) -> Job:
    ends, args = setting.ends, setting.args
    return Job(
        uuid=begun.uuid,
        epoch=begun.epoch,
        source=ends.source,
        destinations=(ends.destination,),
        options=setting.options,
        connections=1 if ends.has_stream else setting.args.connections,  # a stream has one reader or writer
        workers=setting.crew.count,
        range_size=setting.args.range_size,
        local_workers=setting.launcher is not None,
        destination_grows=ends.destination_grows,
        machine=machine_id(),
        loss_seconds=LOSS_SECONDS if args.loss_timeout is None else args.loss_timeout,
        loss_hinted=args.loss_timeout is None,
        reconnect_seconds=BACKOFF_SECONDS_MAX if args.reconnect_delay is None else args.reconnect_delay,
        reconnect_hinted=args.reconnect_delay is None,
        expected=begun.expected,
        is_resumed=begun.epoch > 1,
        durable=begun.durable,
        unreadable=begun.unreadable,
        earlier=begun.earlier,
        verify=args.verify,
        checkpoint_seconds=args.checkpoint,
        rate=args.rate,
    )


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


def conclude(ended: Ended, interrupted_code: int, report: Report | None = None) -> int:
    """Say how it ended and how it can be resumed, and choose the exit code. `report`: None for a copy's summary."""
    code = _tell(ended, interrupted_code, report)
    if ended.differs and ended.outcome.verdict is Verdict.COMPLETE:
        logs.say(f"different: {ended.differs}; nbdshard verify SOURCE DESTINATION tells where else")
        code = EXIT_DIFFERENT
    if ended.resume:
        logs.say(f"to go on: {ended.resume}")
        if HIDDEN in ended.resume:
            logs.say(f"{HIDDEN} there takes the place of a login, which is not shown")
    if ended.export:
        logs.say(f"what could not be read is listed by: {ended.export}")
    return code


def _tell(ended: Ended, interrupted_code: int, report: Report | None) -> int:
    outcome = ended.outcome
    for name in outcome.unfenced:
        logs.warning(f"worker {name} was not heard to close its connections: it may still write to the destination")
    if outcome.verdict is Verdict.FAILED:
        logs.say(outcome.error)
        return EXIT_FAILURE
    if outcome.verdict is Verdict.PAUSED:
        logs.say(outcome.error)
    if outcome.verdict is Verdict.COMPLETE and report is not None:
        report(outcome, ended.seconds)
        return EXIT_OK
    if outcome.comparison is not None:
        from nbdshard.coordinator.verdict_lines import difference_lines

        for line in difference_lines(outcome.comparison):
            logs.say(line)
    logs.say(summary(outcome, ended.seconds))
    if outcome.verdict is Verdict.COMPLETE and outcome.checksum:
        _tell_checksum(ended)
    return {
        Verdict.COMPLETE: EXIT_UNREADABLE if outcome.unreadable else EXIT_OK,
        Verdict.DIFFERENT: EXIT_DIFFERENT,
        Verdict.STOPPED: interrupted_code,
        Verdict.PAUSED: EXIT_PAUSED,
        Verdict.UNFENCED: EXIT_UNFENCED,
    }[outcome.verdict]


def _tell_checksum(ended: Ended) -> None:
    from nbdshard.cli.checksum import line

    say = logs.say if ended.is_output else tell  # standard output holds the copy
    say(line(ended.outcome, ended.source))
