"""The control protocol: every message between a coordinator and its workers, and how it is packed.

A closed, versioned set. Each message is one msgpack map in one ZeroMQ frame; the key `t` names the type. Decoding
rejects unknown types, unknown or missing fields and wrong types with a line that names the path (`$.range.start`).
docs/control-protocol.md tells the conversation as a whole.

Every message after `Hello` carries the job's uuid and the coordinator's epoch, those about a range the lease id too;
the receiver drops what belongs to another job, epoch or lease. Ranges and sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgpack
import msgspec

from nbdshard.common.errors import ProtocolError
from nbdshard.common.limits import (
    CONNECT_SECONDS,
    DIFFERENCES_MAX,
    DIGEST_RUN_BYTES,
    HANDSHAKE_SECONDS,
    LEAF_BYTES,
    LEAF_BYTES_PER_MESSAGE,
    MESSAGE_BYTES_MAX,
    REQUEST_SECONDS,
    RETRIES,
    RETRIES_MAX,
    TEXT_BYTES_MAX,
    UNREADABLE_PER_LEASE_MAX,
)
from nbdshard.common.nbd.hints import NO_HINTS, Hints
from nbdshard.common.ranges import Range

PROTOCOL_VERSION = 4
_NAMES = "surrogateescape"  # as os.fsdecode: the system's names are bytes

Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=TEXT_BYTES_MAX)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=86_400.0)]
Moment: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]  # seconds on the clock of one worker, and of no one else
Side: TypeAlias = Literal["source", "destination"]
DataPath: TypeAlias = Literal["auto", "splice", "buffer"]  # how payload gets from one side to the other
# What is done with a lease: its bytes are copied; or those of two ends compared; or those that were copied read back.
Mode: TypeAlias = Literal["copy", "compare", "read-back"]
# A job has a list of destinations; this version takes exactly one.
JustOne = msgspec.Meta(min_length=1, max_length=1)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message."""


class EndpointAddress(Record, frozen=True):
    """Where one end of the copy is, in the form a worker opens.

    `kind` "nbd": `address` is an NBD URI. "file": an absolute path of a file or block device, which must still be the
    inode `identity` names. "stream": standard input or output, inherited as descriptor number `address`. "null":
    nothing.
    """

    kind: Literal["nbd", "file", "stream", "null"]
    address: Text
    identity: Text = ""  # "device:inode" of a local file


class EndpointDescription(Record, frozen=True):
    """What a worker found when it opened an endpoint: for NBD the outcome of the negotiation.

    `size` is None for a stream and for `null:`. `block_*` in bytes, powers of two except `block_maximum`.
    """

    peer: Text  # for messages: the URI or path, without credentials
    size: Count | None
    read_only: bool = False
    can_multi_conn: bool = False
    can_flush: bool = False
    can_fua: bool = False
    can_zero: bool = False
    can_extents: bool = False
    block_minimum: Count = 1
    block_preferred: Count = 4096
    block_maximum: Count = 32 << 20
    rotational: bool = False
    is_stream: bool = False
    hints: Hints = NO_HINTS  # tell nothing about the export: they may differ from one connection to the next

    def difference(self, other: EndpointDescription, *, any_size: bool = False) -> str:
        """What is here and not as in `other`, for the user; "" if both describe the same export.

        Two machines may spell `peer` differently, `rotational` only tunes, and hints tell nothing about the export.
        `any_size`: of a file that is still to be given its size.
        """
        told = {"peer", "rotational", "hints"} | ({"size"} if any_size else set())
        for name in self.__struct_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if name not in told and ours != theirs:
                return f"{name.removeprefix('can_').replace('_', '-')} {_word(ours)} instead of {_word(theirs)}"
        return ""


def _word(value: int | bool | None) -> str:
    if value is None:
        return "unknown"
    return str(value) if not isinstance(value, bool) else "yes" if value else "no"


class JobOptions(Record, frozen=True):
    """The options of a copy that a worker needs (cli/copy.py explains each to the user)."""

    request_size: Count
    requests: Count
    queue_size: Count
    sparse_unit: Count | None  # None: the default; 0: no zero detection
    allocated: bool = False
    destination_is_zero: bool = False
    extents: bool = True
    synchronous: bool = False
    flush: bool = True
    data_path: DataPath = "auto"
    connect_seconds: Seconds = CONNECT_SECONDS
    handshake_seconds: Seconds = HANDSHAKE_SECONDS
    request_seconds: Seconds = REQUEST_SECONDS
    request_hinted: bool = False  # nobody has asked for it: what the server hints counts
    request_size_varies: bool = False  # nobody has asked for one: half of it may be better
    attempts: Annotated[int, msgspec.Meta(ge=1, le=RETRIES_MAX + 1)] = RETRIES + 1  # of one read or write
    salvage: bool = False  # what the source cannot read is written as zeroes
    checksum: bool = False  # digests of what is read go with every lease
    mode: Mode = "copy"


class ErrorReport(Record, frozen=True):
    """One failure, as the worker that met it tells it. `kind` is the branch of common.errors it belongs to."""

    kind: Literal["request", "connection", "protocol", "user", "bug"]
    text: Text  # the one line for the user
    side: Side | None = None
    peer: Text = ""
    offset: Count | None = None
    length: Count | None = None
    errno_name: Text = ""


class Counters(Record, frozen=True):
    """Bytes of one lease that are complete, by what became of them. Absolute, never a difference.

    `spliced` are those of the copied ones that never entered user space. In a comparison there are `compared` ones,
    which were read from one side at least, and `skipped` ones, which both sides said are zeroes.
    """

    copied: Count = 0
    zeroed: Count = 0
    skipped: Count = 0
    spliced: Count = 0
    compared: Count = 0

    @property
    def total(self) -> int:
        return self.copied + self.zeroed + self.skipped + self.compared


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    """A message on the wire; the tag is the class's name."""


class JobMessage(Message, frozen=True):
    """A message of one job and one life of its coordinator."""

    job: Text
    epoch: Count


# -- worker -> coordinator ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """A worker is there. Answered by `Assign` or `Refused`."""

    version: Count
    worker: Text  # a name of its own choice, unique within the job (uuid)
    machine: Text  # /etc/machine-id: tells whether local paths mean the same files
    host: Text
    pid: Count
    ring: Text  # "io_uring" or "epoll"


class Opened(JobMessage, frozen=True):
    """At least one connection to either side is up. Sent again when the number of connections changes."""

    source: EndpointDescription
    destinations: Annotated[list[EndpointDescription], JustOne]
    source_connections: Count
    destination_connections: Count  # to each destination


class OpenFailed(JobMessage, frozen=True):
    """The worker could not open one side at all, or lost all it had; it holds no connection now."""

    error: ErrorReport


class Wanted(JobMessage, frozen=True):
    """The worker can take up to `leases` more leases now. Workers pull; an old wish is replaced by a newer one."""

    leases: Count


class Progress(JobMessage, frozen=True):
    """How far a lease is. Completions only, never submissions."""

    lease: Count
    done: Counters


class LeafRun(Record, frozen=True):
    """Leaves side by side that are not all zeroes: `digests` of 32 bytes each (common/blkhash.py), from `start` on."""

    start: Count  # a multiple of LEAF_BYTES
    digests: Annotated[bytes, msgspec.Meta(min_length=32, max_length=LEAF_BYTES_PER_MESSAGE)]

    @property
    def count(self) -> int:
        return len(self.digests) // 32

    @property
    def end(self) -> int:
        """Where its last leaf ends, or would, if the image did not end inside it."""
        return self.start + self.count * LEAF_BYTES

    @property
    def memory_bytes(self) -> int:
        """About how much it takes where it is kept."""
        return len(self.digests) + DIGEST_RUN_BYTES


class Leaves(JobMessage, frozen=True):
    """Digests of the lease's leaves, as far as one message holds them; those that are all zeroes are left out.

    Comes before `Written` of the same lease, and again with it.
    """

    lease: Count
    runs: list[LeafRun]


class Written(JobMessage, frozen=True):
    """Every byte of the lease was acknowledged by the destination; not yet flushed. Sent again until `Noted`.

    For a stream source `end` says where it ended (its size); otherwise None. `unreadable`: where zeroes were written
    for what the source could not read, in order; where there are too many places, some are told as one, with what is
    between them. `leaves`: how many digests were sent.
    """

    lease: Count
    done: Counters
    end: Count | None = None
    unreadable: Annotated[tuple[Range, ...], msgspec.Meta(max_length=UNREADABLE_PER_LEASE_MAX)] = ()
    leaves: Count = 0


class Compared(JobMessage, frozen=True):
    """Every byte of the lease was compared. Sent again until `Noted`.

    `differing`: bytes in the blocks of DIFFERENCE_BYTES that differ. `differences`: the first of those, in order,
    neighbours as one range.
    """

    lease: Count
    done: Counters
    differing: Count = 0
    differences: Annotated[tuple[Range, ...], msgspec.Meta(max_length=DIFFERENCES_MAX)] = ()


class Failed(JobMessage, frozen=True):
    """The lease could not be completed; nothing of it counts. The worker has stopped writing to it."""

    lease: Count
    error: ErrorReport


class Flushed(JobMessage, frozen=True):
    """Answer to `Flush`: each connection that wrote was flushed, or `error` says why one was not.

    `durable` False without an error: the server has no FLUSH, durability is unknown.
    """

    flush: Count
    leases: list[Count]  # written leases this flush covers
    durable: bool
    error: ErrorReport | None = None


class Alive(JobMessage, frozen=True):
    """The worker's heartbeat, said `at` that moment."""

    at: Moment


class Goodbye(JobMessage, frozen=True):
    """Answer to `Stop`, or the worker leaves by itself: its connections are closed, it writes nothing more."""

    reason: Text


# -- coordinator -> worker ---------------------------------------------------------------------------------------------


class Assign(JobMessage, frozen=True):
    """The job, and this worker's share of its connections. 0 connections: stand by until the next `Assign`.

    A mode of "read-back" in the place of "copy": nothing is left to copy, and the connections stay as they are.
    """

    source: EndpointAddress
    destinations: Annotated[list[EndpointAddress], JustOne]
    options: JobOptions
    source_connections: Count
    destination_connections: Count  # to each destination
    heartbeat_seconds: Seconds
    lease_seconds: Seconds
    expected_source: EndpointDescription | None = None  # what an earlier worker found: refuse if yours differs
    expected_destinations: Annotated[list[EndpointDescription], JustOne] | None = None


class Refused(Message, frozen=True):
    """The coordinator does not take this worker; `reason` names both versions, or the unknown key, or what else."""

    version: Count
    reason: Text


class Lease(JobMessage, frozen=True):
    """Copy `range` of the export, or compare it, as the `mode` of the latest `Assign` says.

    The lease is over `seconds` after the worker said the latest thing it knows that the coordinator has heard: its
    first `Opened`, since nobody else is given a lease, or what this or an `AliveToo` answers.
    """

    lease: Count
    range: Range
    seconds: Seconds
    until_end: bool = False  # a stream: the range is an upper bound, its end is the stream's
    answers: Moment = 0.0  # as in `AliveToo`: a worker that was late is heard before it is granted anything


class Revoke(JobMessage, frozen=True):
    """Stop working on the lease and forget it; answered by `Failed` of kind "connection" once the wire is quiet."""

    lease: Count


class Noted(JobMessage, frozen=True):
    """The coordinator has recorded `Written` or `Compared` of this lease."""

    lease: Count


class Flush(JobMessage, frozen=True):
    """Flush every connection that wrote; answered by `Flushed` with the same `flush` id."""

    flush: Count


class Rate(JobMessage, frozen=True):
    """From now on read no more than this from the source: the worker's share of the job's rate.

    None: as fast as it goes; 0: begin nothing until the next `Rate`. Payload counts, zeroes do not. Comes again with
    every heartbeat.
    """

    bytes_per_second: Count | None


class AliveToo(JobMessage, frozen=True):
    """The coordinator's heartbeat. It renews every lease of this worker, from the moment on that it answers.

    `answers` is `at` of the worker's latest `Alive` that was heard; 0: of none so far. Whatever was heard of a worker
    was said before, so a lease counted from there ends before one counted from hearing it, however late messages are.
    """

    answers: Moment


class Stop(JobMessage, frozen=True):
    """Finish what is on the wire, disconnect softly, say `Goodbye`, and exit. `now`: do not wait for the wire."""

    reason: Text
    now: bool = False


FromWorker: TypeAlias = (
    Hello | Opened | OpenFailed | Wanted | Progress | Leaves | Written | Compared | Failed | Flushed | Alive | Goodbye
)
FromCoordinator: TypeAlias = Assign | Refused | Lease | Revoke | Noted | Flush | Rate | AliveToo | Stop

_packer = msgpack.Packer(unicode_errors=_NAMES)  # one for all messages: making it costs as much as a message does
_FROM_WORKER = {kind.__name__: kind for kind in get_args(FromWorker)}
_FROM_COORDINATOR = {kind.__name__: kind for kind in get_args(FromCoordinator)}


def encode(message: Message) -> bytes:
    """One frame. A Range travels as the map {start, end}, a file's name as the bytes it has, UTF-8 or not."""
    return _packer.pack(msgspec.to_builtins(message, builtin_types=(bytes,)))  # type: ignore[no-any-return]


def decode_from_worker(frame: bytes, peer: str) -> FromWorker:
    """The message in `frame`. Raises ProtocolError naming `peer` and the path of what is wrong."""
    return _decode(frame, peer, _FROM_WORKER, FromWorker)  # type: ignore[no-any-return]


def decode_from_coordinator(frame: bytes, peer: str) -> FromCoordinator:
    """The message in `frame`. Raises ProtocolError naming `peer` and the path of what is wrong."""
    return _decode(frame, peer, _FROM_COORDINATOR, FromCoordinator)  # type: ignore[no-any-return]


def foreign_version(frame: bytes) -> int | None:
    """The version in a `Hello` of another protocol version than ours; None if `frame` is anything else.

    Looks at `t` and `version` only, which keep their place and meaning in every version, as all of `Refused` does.
    """
    try:
        content = _unpack(frame, "")
    except ProtocolError:
        return None
    if not isinstance(content, dict) or content.get("t") != "Hello":
        return None
    version = content.get("version")
    is_number = isinstance(version, int) and not isinstance(version, bool)
    return version if is_number and version != PROTOCOL_VERSION else None


def _unpack(frame: bytes, peer: str) -> Any:
    if len(frame) > MESSAGE_BYTES_MAX:
        raise ProtocolError(peer, "control message", f"{len(frame)} bytes, at most {MESSAGE_BYTES_MAX} are allowed")
    try:
        return msgpack.unpackb(frame, strict_map_key=True, unicode_errors=_NAMES)
    except Exception as error:  # msgpack raises ValueError subclasses, UnicodeDecodeError and its own
        raise ProtocolError(peer, "control message", f"not msgpack: {error}") from None


def _decode(frame: bytes, peer: str, kinds: dict[str, Any], any_kind: Any) -> Any:
    content = _unpack(frame, peer)
    # msgspec looks into every class of a union each time it is given one: sixteen times the cost of the right class.
    tag = content.get("t") if isinstance(content, dict) else None
    kind = kinds.get(tag, any_kind) if isinstance(tag, str) else any_kind
    try:
        return msgspec.convert(content, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ProtocolError(peer, "control message", str(error)) from None
