"""What a journal remembers of its job. Loaded when one is made, in the middle of a copy: it imports little."""

from __future__ import annotations

from nbdshard.cli.ends import Ends
from nbdshard.cli.options import words_of
from nbdshard.cli.setting import Setting
from nbdshard.common.messages import EndpointAddress, EndpointDescription, Side
from nbdshard.common.nbd.uri import parse_uri
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
    return LocalFile(facts.st_dev, facts.st_ino, facts.st_mtime_ns) if facts is not None else None
