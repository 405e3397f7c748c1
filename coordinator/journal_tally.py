"""What is known of a journal's tables without looking at them: how much there is, and a mark of all of it. Pure."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TypeAlias

import msgspec

from nbdshard.common.limits import LEAF_BYTES

_Numbers: TypeAlias = tuple[int, int, int]  # of a Tally


class Tally(msgspec.Struct, frozen=True):
    """What a table has: how many rows, about how many bytes of the image, and the XOR of their marks."""

    count: int = 0
    total_bytes: int = 0
    mark: int = 0

    def plus(self, start: int, end: int) -> Tally:
        return Tally(self.count + 1, self.total_bytes + end - start, self.mark ^ _mark(start, end))

    def minus(self, start: int, end: int) -> Tally:
        return Tally(self.count - 1, self.total_bytes - (end - start), self.mark ^ _mark(start, end))

    def plus_leaves(self, start: int, digests: bytes) -> Tally:
        return self._changed(1, digests, _mark_of_leaves(start, digests))

    def minus_leaves(self, start: int, digests: bytes) -> Tally:
        return self._changed(-1, digests, _mark_of_leaves(start, digests))

    def _changed(self, sign: int, digests: bytes, mark: int) -> Tally:
        return Tally(self.count + sign, self.total_bytes + sign * (len(digests) // 32 * LEAF_BYTES), self.mark ^ mark)


class Tallies(msgspec.Struct, frozen=True):
    """Of all tables but the job's."""

    durable: Tally = Tally()
    unreadable: Tally = Tally()
    leaves: Tally = Tally()

    def as_text(self) -> str:
        """For the job's row. Marks have 64 bits, one more than SQLite's integers."""
        tables = (self.durable, self.unreadable, self.leaves)
        return json.dumps([(tally.count, tally.total_bytes, tally.mark) for tally in tables], separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Tallies:
        """What `as_text` made. Raises ValueError for anything else."""
        try:
            durable, unreadable, leaves = msgspec.json.decode(text, type=tuple[_Numbers, _Numbers, _Numbers])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        return cls(Tally(*durable), Tally(*unreadable), Tally(*leaves))


def _mark(start: int, end: int) -> int:
    return int.from_bytes(hashlib.blake2b(struct.pack(">QQ", start, end), digest_size=8).digest())


def _mark_of_leaves(start: int, digests: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(struct.pack(">Q", start) + digests, digest_size=8).digest())
