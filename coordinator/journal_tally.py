"""What is known of a journal's tables without looking at them: how much there is, and a mark of all of it. Pure."""

from __future__ import annotations

import hashlib
import struct

import msgspec

from nbdshard.common.limits import LEAF_BYTES


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


def _mark(start: int, end: int) -> int:
    return int.from_bytes(hashlib.blake2b(struct.pack(">QQ", start, end), digest_size=8).digest())


def _mark_of_leaves(start: int, digests: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(struct.pack(">Q", start) + digests, digest_size=8).digest())
