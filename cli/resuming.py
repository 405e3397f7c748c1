"""Resuming a copy: whether the journal is about this copy, and both sides hold what it says. Loaded for that only."""

from __future__ import annotations

import os
import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Final, Protocol

from nbdshard.cli.facts import difference, is_same_device, local_file
from nbdshard.cli.journaling import Start
from nbdshard.cli.options import words_of
from nbdshard.cli.setting import Setting
from nbdshard.common import logs
from nbdshard.common.blocking import BlockingClient
from nbdshard.common.errors import NbdshardError, RequestError, UserError
from nbdshard.common.limits import RESUME_SAMPLE_BYTES, RESUME_SAMPLES
from nbdshard.common.messages import EndpointAddress, Side
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JobFacts, ResultOptions
from nbdshard.coordinator.keeping import Keeper

SIDES: Final[tuple[Side, Side]] = ("source", "destination")
ADVICE: Final = "--force-resume goes on all the same"
# What the fields of ResultOptions are on the command line. One that sets others comes before them.
OPTIONS: Final = {
    "checksum": "--checksum",
    "allocated": "--allocated",
    "destination_is_zero": "--destination-is-zero",
    "extents": "--no-extents",
    "flush": "--no-flush",
    "sparse_unit": "--sparse",
}


def resumed(setting: Setting, stack: ExitStack) -> Start:
    """Open the journal of an earlier run and check it. `stack` closes it.

    Raises UserError: there is no such journal, or it is in use, damaged, that of another copy, or not true any more.
    """
    args = setting.args
    journal = Journal.open(args.journal)
    stack.callback(journal.close)
    facts, durable, unreadable = journal.facts, tuple(journal.durable), tuple(journal.unreadable)
    _check_digests(args, facts)
    held = stack.enter_context(ExitStack())
    differs = ""
    checks = (partial(_check_facts, setting, facts), partial(_check_samples, setting, durable, unreadable, held))
    for check in checks:
        try:
            check()
        except NbdshardError as error:
            if not args.force_resume:
                raise
            what = UserError(error.what, error.where) if isinstance(error, UserError) else error  # the advice is taken
            logs.warning(f"{what}; resumed all the same")
            differs = differs or (error.what if isinstance(error, Different) else "")
    keeper = Keeper(
        lambda: args.journal,
        lambda *_: facts,
        journal=journal,
        keeps=args.keep_journal,
        has_leaves=args.checksum,
        let_go=held.close,
    )
    keeper.resume()
    expected = None if args.force_resume else (facts.source.description, facts.destinations[0].description)
    return Start(facts.uuid, keeper, journal.epoch, durable, unreadable, journal, expected, differs)


def _check_digests(args: Namespace, facts: JobFacts) -> None:
    """Raise UserError unless the journal has digests of what is durable where they are wanted, and only there.

    No --force-resume helps: they would be missing for what is copied already, or from now on.
    """
    if args.checksum and not facts.options.checksum:
        advice = "go on without --checksum, and have `nbdshard checksum` read the destination in the end"
        raise UserError("the copy began without --checksum: the journal has no digests", args.journal, advice)
    if facts.options.checksum and not args.checksum:
        raise UserError("the copy began with --checksum", args.journal, "go on with it, too")


def _check_facts(setting: Setting, facts: JobFacts) -> None:
    """Raise UserError where the command line, or a local file, is not what the journal is about."""
    ends, path = setting.ends, setting.args.journal
    now = zip(SIDES, (ends.source, ends.destination), setting.args.operands, strict=True)
    for (side, address, operand), then in zip(now, (facts.source, facts.destinations[0]), strict=True):
        named = words_of(operand, setting.args)
        is_command = operand in setting.args.commands
        local = local_file(ends, side)
        is_other = named != then.named if is_command else address.address != then.address.address
        if is_other and not is_same_device(then.local, local):
            raise UserError(f"the journal is about another {side}: {then.named} instead of {named}", path, ADVICE)
        if local is not None and then.local is not None and (what := difference(side, then.local, local)):
            raise UserError(what, address.address, ADVICE)
    options = ResultOptions.of(setting.options)
    for name in OPTIONS:
        was, is_now = getattr(facts.options, name), getattr(options, name)
        if was != is_now:
            what = f"the copy began {_with_option(name, was)}, and is to go on {_with_option(name, is_now)}"
            raise UserError(what, path, ADVICE)


def _with_option(name: str, value: int | bool | None) -> str:
    """`value` of the field `name` of ResultOptions, in the words of the command line."""
    word = OPTIONS[name]
    if isinstance(value, bool):
        return f"{'with' if value != word.startswith('--no-') else 'without'} {word}"
    return f"without {word}" if value is None else f"with {word}={value}"


# -- samples of what is durable ----------------------------------------------------------------------------------------


class Reader(Protocol):
    """One end, to read from."""

    def read(self, where: Range) -> bytes: ...
    def close(self) -> None: ...


class Different(UserError):
    """The two sides differ where they should not."""


class Unreadable(UserError):
    """`reader` refuses to read; it may do so at one place only."""

    def __init__(self, reader: Reader, where: Range, reason: str, peer: str) -> None:
        super().__init__(f"cannot be read at offset {where.start}: {reason}", peer)
        self.reader = reader


class _FileReader:
    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", path) from None

    def read(self, where: Range) -> bytes:
        try:
            return os.pread(self._descriptor, where.length, where.start)
        except OSError as error:
            raise Unreadable(self, where, error.strerror or str(error), self._path) from None

    def close(self) -> None:
        os.close(self._descriptor)


def _check_samples(setting: Setting, durable: Sequence[Range], unreadable: Sequence[Range], held: ExitStack) -> None:
    """Read some of what should be durable from both sides, but not what the source could not read the last time.

    A server may leave with its last client. So where others are admitted beside us (CAN_MULTI_CONN), `held`
    keeps the connection until the workers have theirs. Raises UserError where they differ or cannot be read.
    """
    ends, args = setting.ends, setting.args
    readable = RangeSet(durable)
    for piece in unreadable:
        readable.remove(piece)
    durable = list(readable)
    if not durable:
        return
    if any(operand in args.commands for operand in args.operands):
        logs.info("what is durable is not compared: a server of `[ CMD ]` may serve one client only")
        return
    with ExitStack() as stack:
        readers = [_reader(address, stack, held) for address in (ends.source, ends.destination)]
        for where in _samples(durable):
            try:
                source, destination = (_read(reader, where) for reader in readers)
            except Unreadable as error:
                if not args.salvage or error.reader is not readers[0]:
                    raise
                logs.info(f"{error}: it is not compared")
                continue
            if source != destination:
                what = f"source and destination differ in {where}, which the journal calls durable"
                raise Different(what, args.journal, "begin the copy anew, without --resume")


def _reader(address: EndpointAddress, stack: ExitStack, held: ExitStack) -> Reader:
    if address.kind == "file":
        return stack.enter_context(closing(_FileReader(address.address)))
    client = BlockingClient.open(parse_uri(address.address), address.address)
    admits_more = TransmissionFlag.CAN_MULTI_CONN in client.export.flags and _admits_another(address)
    if admits_more:
        held.callback(client.close, waits=False)  # in the middle of the copy, which is not to wait for it
    else:
        stack.callback(client.close)
    return client


def _admits_another(address: EndpointAddress) -> bool:
    """Whether the server has room for one client more: some advertise what they then refuse."""
    try:
        BlockingClient.open(parse_uri(address.address), address.address).close()
    except NbdshardError:
        return False
    return True


def _read(reader: Reader, where: Range) -> bytes:
    if not isinstance(reader, BlockingClient):
        return reader.read(where)
    if where.end > reader.export.size:
        what = f"its size is {reader.export.size} bytes, but the bytes up to {where.end} are said to be copied already"
        raise UserError(what, reader.peer, ADVICE)
    unit = reader.export.block_sizes.minimum
    start, end = where.start - where.start % unit, min(where.end + -where.end % unit, reader.export.size)
    try:
        return reader.read(Range(start, end))[where.start - start :][: where.length]
    except RequestError as error:
        raise Unreadable(reader, where, str(error), reader.peer) from None


def _samples(durable: Sequence[Range]) -> Iterator[Range]:
    """RESUME_SAMPLES places, spread over all durable bytes alike."""
    total = sum(piece.length for piece in durable)
    for offset in sorted(random.sample(range(total), min(RESUME_SAMPLES, total))):
        for piece in durable:
            if offset < piece.length:
                start = piece.start + offset
                yield Range(start, min(start + RESUME_SAMPLE_BYTES, piece.end))
                break
            offset -= piece.length
