"""What the server asks of a backend. Blocking calls, which any thread may make at any time.

An error is an OSError: its errno is what the client is told (`handling.py`). Ranges are within the export, and not
empty: the device has checked them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol, runtime_checkable

from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.device import Hole


class Deferred(OSError):
    """A flush that has not brought everything to where it belongs. Nothing is lost if the server ends now, though: the
    next one goes on with it."""


# What a backend can that is the same behind every connection; and what one can that does all there is.
READS: Final = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)
WRITES: Final = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)


class Backend(Protocol):
    """One export's bytes."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def flags(self) -> TransmissionFlag:
        """What it can do, READ_ONLY if it is; CAN_MULTI_CONN where a flush covers every connection's writes."""

    @property
    def block_size(self) -> int:
        """What requests should fit to be fast, in bytes: a power of two of at least 512."""

    @property
    def losses(self) -> int:
        """How often something that was acknowledged may have been lost since it was opened, as by a write-back that
        failed. Only ever grows; clients are told another `instance` when it has."""

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        """What is there, in order and in memory; nobody else changes it any more."""

    def write(self, where: Range, data: memoryview) -> None:
        """Put `data` there. It is durable after the next `flush` that begins when this has returned."""

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        """Make it read as zeroes. `fast`: fail with ENOTSUP, and change nothing, rather than be as slow as a write."""

    def trim(self, where: Range) -> None:
        """What is there is not needed any more."""

    def cache(self, where: Range) -> None:
        """It will be read soon."""

    def flush(self) -> None:
        """Make every write durable that has returned. An error is told to one flush at least, and never forgotten."""

    def extents(self, where: Range) -> Extents:
        """What is known of it, from its start on; not necessarily to its end."""

    def close(self) -> None:
        """Nothing is asked any more."""


# What a backend may offer beside. A layer offers it only where it has nothing to do with the bytes.


@runtime_checkable
class Prompt(Protocol):
    """Calls for a connection's own thread, which must not wait."""

    def read_now(self, where: Range) -> Sequence[memoryview | bytes | Hole] | None:
        """As `read`; None where it would have to wait, for a disk, say."""

    def write_now(self, where: Range, data: memoryview) -> bool:
        """As `write`; False, and nothing is written, where it would have to wait."""


class Place(NamedTuple):
    """Where a range begins: an open file, and an offset in it. A block's own where it is there anyway."""

    number: int
    offset: int

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@runtime_checkable
class Direct(Protocol):
    """Its bytes are in files of this machine, so they may be moved from and to a socket without a look at them."""

    def is_direct(self, where: Range, *, to_write: bool) -> bool:
        """Whether all of `where` is in one file that is at hand, or will be when it is written (`to_write`)."""

    def reading(self, where: Range) -> AbstractContextManager[Place | None]:
        """Where `where`, which is direct, is, all of it and for as long as the block lasts, to be read without waiting;
        None where it is not so."""

    def writing(self, where: Range, *, is_all: bool) -> AbstractContextManager[Place]:
        """Where to write something of `where`, which is direct, in the block; with `is_all` all of it is there then.
        After that block, all is as if `write` had returned, or raised what the block raised. After each other one, what
        was written is made durable by the next `flush`."""
