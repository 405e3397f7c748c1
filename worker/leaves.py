"""The leaf digests of one lease, from what is read of its source in whatever pieces and order. Pure.

A read need not begin or end where a leaf does: requests may be shorter than a leaf, and extents are cut at 512 bytes.
A leaf that comes in pieces is put together first::

    leaves   |    whole    |  in pieces  |   zeroes    |   zeroes    |  in pieces |
    reads    |   data      | data |zeroes: block status says so             |data |   (the image may end inside a leaf)

At the ends of every read that is under way at most two leaves are in pieces, of 64 KiB each. Once known a leaf takes 32
bytes, where there is any data, and one more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from nbdshard.common.blkhash import DIGEST_BYTES, leaf_digest, leaves_in
from nbdshard.common.errors import BugError
from nbdshard.common.limits import LEAF_BYTES, LEAF_BYTES_PER_MESSAGE
from nbdshard.common.messages import LeafRun, Leaves
from nbdshard.common.ranges import Range
from nbdshard.worker.zeroes import is_zero

_UNKNOWN, _ZEROES, _DATA = range(3)
_RUN_WRAPPING_BYTES: Final = 40  # of one run in a message, at most
_RUN_MAX: Final = (LEAF_BYTES_PER_MESSAGE - _RUN_WRAPPING_BYTES) // DIGEST_BYTES
_RUN_OF_DATA: Final = re.compile(b"\2{1,%d}" % _RUN_MAX)
_SAMPLE_OFFSET: Final = 0x15B  # odd: where real data is least often zero by chance


class LeafDigests:
    """Of the lease of `where`, which begins where a leaf does, and ends so unless the image ends."""

    __slots__ = ("_digests", "_kinds", "_pieces", "_where")

    def __init__(self, where: Range) -> None:
        assert where.start % LEAF_BYTES == 0
        self._where = where
        self._kinds = bytearray(leaves_in(where.length))
        self._digests = bytearray()  # of all leaves, once there is one of data
        self._pieces: dict[int, _Piecemeal] = {}  # by leaf

    def add_data(self, start: int, buffer: bytearray, length: int) -> None:
        """`buffer` begins with the `length` bytes that are at `start` of the image. Each byte is to come once."""
        self._add(Range.of(start, length), buffer)

    def add_zeroes(self, where: Range) -> None:
        """`where` is zeroes, as the source says."""
        self._add(where, None)

    @property
    def is_whole(self) -> bool:
        """Whether all leaves are known."""
        return _UNKNOWN not in self._kinds

    def messages(self, job: str, epoch: int, lease: int) -> Iterator[Leaves]:
        """What the coordinator is to be told, once all is known, in messages that are short enough."""
        if not self.is_whole:
            raise BugError(f"not all leaves of the lease of {self._where} are known")
        runs: list[LeafRun] = []
        room = LEAF_BYTES_PER_MESSAGE
        for run in self._runs():
            size = len(run.digests) + _RUN_WRAPPING_BYTES
            if size > room:
                yield Leaves(job, epoch, lease, runs)
                runs, room = [], LEAF_BYTES_PER_MESSAGE
            runs.append(run)
            room -= size
        if runs:
            yield Leaves(job, epoch, lease, runs)

    def _runs(self) -> Iterator[LeafRun]:
        for found in _RUN_OF_DATA.finditer(self._kinds):
            first, end = found.span()
            digests = bytes(self._digests[first * DIGEST_BYTES : end * DIGEST_BYTES])
            yield LeafRun(self._where.start + first * LEAF_BYTES, digests)

    # -- taking in -----------------------------------------------------------------------------------------------------

    def _add(self, where: Range, buffer: bytearray | None) -> None:
        if where not in self._where:
            raise BugError(f"{where} is not of the lease of {self._where}")
        at = where.start
        while at < where.end:
            leaf = (at - self._where.start) // LEAF_BYTES
            whole = self._leaf(leaf)
            end = min(where.end, whole.end)
            if at > whole.start or end < whole.end:
                self._add_piece(leaf, Range(at, end), buffer, at - where.start)
            elif buffer is not None:
                self._finish(leaf, buffer, at - where.start, end - at)
            elif end - at < LEAF_BYTES:
                self._finish(leaf, bytearray(end - at), 0, end - at)
            else:
                end = where.end - where.end % LEAF_BYTES
                self._mark(leaf, leaf + (end - at) // LEAF_BYTES, _ZEROES)
            at = end

    def _leaf(self, leaf: int) -> Range:
        start = self._where.start + leaf * LEAF_BYTES
        return Range(start, min(start + LEAF_BYTES, self._where.end))

    def _add_piece(self, leaf: int, where: Range, buffer: bytearray | None, offset: int) -> None:
        whole = self._leaf(leaf)
        if self._kinds[leaf] != _UNKNOWN:
            raise BugError(f"{where} of the lease of {self._where} comes a second time")
        pieces = self._pieces.setdefault(leaf, _Piecemeal())
        pieces.come += where.length
        if buffer is not None:
            if pieces.content is None:
                pieces.content = bytearray(whole.length)
            start = where.start - whole.start
            pieces.content[start : start + where.length] = memoryview(buffer)[offset : offset + where.length]
        if pieces.come < whole.length:
            return
        del self._pieces[leaf]
        self._finish(leaf, pieces.content or bytearray(whole.length), 0, pieces.come)

    def _finish(self, leaf: int, buffer: bytearray, start: int, length: int) -> None:
        """All of `leaf` is in `buffer`, from `start` on."""
        end = start + length
        if length == LEAF_BYTES and not buffer[start + _SAMPLE_OFFSET] and is_zero(buffer, start, end):
            self._mark(leaf, leaf + 1, _ZEROES)
            return
        self._mark(leaf, leaf + 1, _DATA)
        if not self._digests:
            self._digests = bytearray(len(self._kinds) * DIGEST_BYTES)
        digest = leaf_digest(memoryview(buffer)[start:end])
        self._digests[leaf * DIGEST_BYTES : (leaf + 1) * DIGEST_BYTES] = digest

    def _mark(self, first: int, end: int, kind: int) -> None:
        if self._kinds.count(_UNKNOWN, first, end) != end - first:
            raise BugError(f"one of the leaves {first} to {end - 1} of the lease of {self._where} comes a second time")
        self._kinds[first:end] = bytes((kind,)) * (end - first)


class _Piecemeal:
    """A leaf that comes in pieces. `content` is None while all of them are zeroes; `come`: bytes that have."""

    __slots__ = ("content", "come")

    def __init__(self) -> None:
        self.content: bytearray | None = None
        self.come = 0
