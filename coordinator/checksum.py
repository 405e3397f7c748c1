"""The checksum of the image, from the leaf digests of settled ranges, which come in any order. Pure.

The root hashes leaf digests in the order of the image (common/blkhash.py), so a range is taken when everything before
it is; until then it waits here. Ranges are leased in order, so few wait: what is done while the slowest one is under
way. 32 bytes for 64 KiB are 1/2048 of the data, and leaves of zeroes take nothing. What an earlier run had made durable
is read from its journal, a step at a time, when its turn comes::

    | taken: one hash, no memory |  under way  | waits | under way | waits |       not begun       |
    | earlier run's, from journal |                                        | earlier run's |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from nbdshard.common.blkhash import Root, leaves_in
from nbdshard.common.errors import BugError
from nbdshard.common.limits import DIGEST_RUN_BYTES, EARLIER_STEP_BYTES, LEAF_BYTES
from nbdshard.common.messages import LeafRun
from nbdshard.common.ranges import Range
from nbdshard.coordinator.job import EarlierLeaves


class ImageChecksum:
    """Takes the digests of every range once, when nothing can take the range back any more."""

    def __init__(self, earlier: EarlierLeaves | None = None, taken_over: Iterable[Range] = ()) -> None:
        """`taken_over`: what an earlier run made durable, merged and in order; `earlier` has its digests."""
        self._root = Root()
        self._end = 0  # everything before it is in the root
        self._waiting: dict[int, tuple[Range, Sequence[LeafRun]]] = {}
        self._earlier = earlier
        self._taken_over = deque(taken_over)
        self.held_bytes = 0  # of memory, for what waits

    @staticmethod
    def fault_of(runs: Sequence[LeafRun], where: Range) -> str:
        """What is wrong with the digests of a range that are said to be all of them; "" if nothing is."""
        at = where.start
        for run in runs:
            if run.start % LEAF_BYTES or len(run.digests) % 32 or run.start < at or run.end - LEAF_BYTES >= where.end:
                return f"it sent {run.count} digests from {run.start} on, which do not fit into {where}"
            at = run.end
        if where.end % LEAF_BYTES and at < where.end:
            return f"it sent no digest of the short leaf at the end of {where}"
        return ""

    def add(self, where: Range, runs: Sequence[LeafRun]) -> None:
        """`where` is settled; `runs`, in order, are the digests of its leaves."""
        self._waiting[where.start] = where, runs
        self.held_bytes += _memory_of(runs)
        self._take_waiting()

    def step(self) -> None:
        """Take some more of what an earlier run had done, if that is next."""
        self._take_waiting()
        if not self._taken_over or self._taken_over[0].start > self._end:
            return
        if self._earlier is None:
            raise BugError("nobody has the digests of what an earlier run had made durable")
        piece = self._taken_over.popleft()
        if piece.length > EARLIER_STEP_BYTES:
            cut = piece.start + EARLIER_STEP_BYTES
            self._taken_over.appendleft(Range(cut, piece.end))
            piece = Range(piece.start, cut)
        self._take(piece, self._earlier.leaves(piece))
        self._take_waiting()

    def finish(self, size: int) -> str:
        """The checksum, in hexadecimal, once every range of the `size` bytes was settled. Raises BugError before."""
        while self._taken_over and self._taken_over[0].start <= self._end:
            self.step()
        if self._end != size or self._waiting or self._root.count != leaves_in(size):
            raise BugError(f"{size} bytes are settled, and the checksum is only of the first {self._end}")
        return self._root.finish(size)

    def _take_waiting(self) -> None:
        while (found := self._waiting.pop(self._end, None)) is not None:
            where, runs = found
            self.held_bytes -= _memory_of(runs)
            self._take(where, runs)

    def _take(self, where: Range, runs: Sequence[LeafRun]) -> None:
        fault = self.fault_of(runs, where)
        if where.start != self._end or fault:
            raise BugError(f"the digests of {where} come after those of the first {self._end} bytes; {fault}")
        at = where.start
        for run in runs:
            self._root.zeroes((run.start - at) // LEAF_BYTES)
            self._root.data(run.digests)
            at = run.end
        self._root.zeroes(max(0, where.end - at) // LEAF_BYTES)
        self._end = where.end


def _memory_of(runs: Sequence[LeafRun]) -> int:
    """About what a range takes that waits; one without data, too, as there may be millions of them."""
    return DIGEST_RUN_BYTES + sum(run.memory_bytes for run in runs)
