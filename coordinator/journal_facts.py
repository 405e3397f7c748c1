"""What a journal knows about its job from the start, and the words it keeps that in. Pure.

The facts are written once, as JSON, so that sqlite3(1) shows them to a person. Decoding rejects what is unknown,
missing or of a wrong type with a line that names the path (`$.source.named`). A new field needs a default, or a new
FORMAT_VERSION (coordinator/journal_schema.py).
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, TypeAlias

import msgspec

from nbdshard.common.messages import (
    Count,
    EndpointAddress,
    EndpointDescription,
    JobOptions,
    JustOne,
    Record,
    Text,
)

Unsigned: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]  # inode numbers go up to 64 bits


class JournalState(Enum):
    """How the job stands, as far as it was able to say."""

    RUNNING = "running"  # or it died without a word, when nobody holds the journal
    PAUSED = "paused"  # it gave up for now: to be resumed
    COMPLETE = "complete"
    FAILED = "failed"  # it gave up; what is durable still is


class LocalFile(Record, frozen=True):
    """Which file or device a local end was when the job began (stat(2)).

    Of a file that is the inode, and while the machine runs the file system's number, which is given anew at the next
    start. Of a device it is what it calls itself: the inode is that of its node in /dev, and made anew as well.
    """

    device: Unsigned
    inode: Unsigned
    mtime_ns: int  # tells of a source that was written to; a destination's changes with the copy
    boot: Text = ""  # the machine as it ran then (common.machine)
    number: Unsigned = 0  # of a block device (st_rdev); 0: a file
    identity: Text = ""  # of a block device (coordinator.device_identity); "": it has none


class JournaledEnd(Record, frozen=True):
    """One side of the copy."""

    named: Text  # as the user named it, words of a `[ CMD ]` included: what a resumed copy must be given again
    address: EndpointAddress
    description: EndpointDescription  # peer, size, flags, block sizes
    export: Text = ""  # of an NBD server
    local: LocalFile | None = None  # of kind "file"


class ResultOptions(Record, frozen=True):
    """The options that change what ends up at the destination, or here: a resumed copy must have the same."""

    sparse_unit: Count | None = None
    allocated: bool = False
    destination_is_zero: bool = False
    extents: bool = True
    flush: bool = True
    checksum: bool = False  # digests of what is durable are kept

    @classmethod
    def of(cls, options: JobOptions) -> ResultOptions:
        return cls(**{name: getattr(options, name) for name in cls.__struct_fields__})


class JobFacts(Record, frozen=True):
    """The job. `size` in bytes: streams, whose size nobody knows, cannot be resumed and have no journal."""

    uuid: Text
    size: Count
    source: JournaledEnd
    destinations: Annotated[list[JournaledEnd], JustOne]
    options: ResultOptions


def encode_facts(facts: JobFacts) -> str:
    """ASCII only: bytes of a name that are no UTF-8 go as escaped surrogates (os.fsdecode)."""
    return json.dumps(msgspec.to_builtins(facts), separators=(",", ":"))


def decode_facts(text: str) -> JobFacts:
    """The facts in `text`. Raises ValueError with one line that names the path of what is wrong."""
    try:
        return msgspec.convert(json.loads(text), JobFacts, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(str(error)) from None
