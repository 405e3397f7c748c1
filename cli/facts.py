"""What a journal remembers of its job. Loaded when one is made, in the middle of a copy: it imports little."""

from __future__ import annotations

import os
import stat

from nbdshard.cli.ends import Ends
from nbdshard.cli.options import words_of
from nbdshard.cli.setting import Setting
from nbdshard.common.machine import machine_id
from nbdshard.common.messages import EndpointAddress, EndpointDescription, Side
from nbdshard.common.nbd.uri import parse_uri
from nbdshard.coordinator.device_identity import device_identity
from nbdshard.coordinator.journal_facts import JobFacts, JournaledEnd, LocalFile, ResultOptions


def facts_of(
    setting: Setting, uuid: str, source: EndpointDescription, destination: EndpointDescription, size: int
) -> JobFacts:
    """What the journal of a new job remembers of it."""
    ends, args = setting.ends, setting.args

    def journaled(side: Side, operand: str, address: EndpointAddress, description: EndpointDescription) -> JournaledEnd:
        export = parse_uri(address.address).export_name if address.kind == "nbd" else ""
        named = words_of(operand, args)
        return JournaledEnd(named, address, description, export, local_file(ends, side))

    return JobFacts(
        uuid,
        size,
        journaled("source", args.operands[0], ends.source, source),
        [journaled("destination", args.operands[1], ends.destination, destination)],
        ResultOptions.of(setting.options),
    )


def local_file(ends: Ends, side: Side) -> LocalFile | None:
    """As it was opened: by the time of the first checkpoint it may have been written to, renamed or removed."""
    facts = ends.found(side)
    if facts is None:
        return None
    number = facts.st_rdev if stat.S_ISBLK(facts.st_mode) else 0
    identity = device_identity(number) if number else ""
    return LocalFile(facts.st_dev, facts.st_ino, facts.st_mtime_ns, machine_id(), number, identity)


def difference(side: Side, then: LocalFile, now: LocalFile) -> str:
    """In what the file or device `now` is not that of `then`, in words; "": it may be."""
    if then.number and now.number:
        named = then.identity and now.identity
        if then.identity != now.identity if named else then.number != now.number:
            return f"the {side} is another device than when the copy began: {_called(now)}, not {_called(then)}"
        return ""
    same_system = then.device == now.device or then.boot != now.boot
    if then.number or now.number or then.inode != now.inode or not same_system:
        return f"the {side} is another file than when the copy began"
    if side == "source" and then.mtime_ns != now.mtime_ns:
        return "the source was changed since the copy began"
    return ""


def is_same_device(then: LocalFile | None, now: LocalFile | None) -> bool:
    """Whether both are one block device for sure, by whatever name."""
    return then is not None and now is not None and bool(then.identity) and then.identity == now.identity


def _called(device: LocalFile) -> str:
    number = f"{os.major(device.number)}:{os.minor(device.number)}"
    return f"{device.identity} ({number})" if device.identity else f"{number} (which has no identity)"
