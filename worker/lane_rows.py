"""The cookies of one side of a lane, and what was asked with each; and how much to ask with each.

A lane's thread writes them, others look at them.
"""

from __future__ import annotations

from math import inf

from nbdshard.common.limits import LANE_DEPTH, LANE_STRETCH_BYTES, LANE_TRIAL_STRETCHES, SPLICED_BYTES_PER_SECOND
from nbdshard.common.ranges import Range
from nbdshard.worker.stretch import Stretch, Unanswered


class Rows:
    """Row number = cookie. `length` is 0 where nothing is asked; it may have rows of the lane's own behind the `count`.

    `depth`: how many to keep in use: as many as SPLICED_BYTES_PER_SECOND takes, by the fastest answer so far. Of
    those in use `payloads` have payload, `bytes` of it, which may be `queue_bytes` if that is more than one request.
    """

    __slots__ = (
        "_unit",
        "_depth_max",
        "bytes",
        "count",
        "depth",
        "fastest",
        "free",
        "is_zero",
        "length",
        "of",
        "payloads",
        "sent",
        "spliced",
        "start",
        "used",
    )

    def __init__(self, count: int, unit: int, queue_bytes: int, *, extra: int = 0) -> None:
        self.count = count
        self._unit = unit
        self.fastest = inf
        self._depth_max = max(1, min(count, queue_bytes // unit))
        self.depth = min(self._depth_max, LANE_DEPTH)
        self.length = [0] * (count + extra)
        self.clear()

    def clear(self) -> None:
        """Nothing is asked; what was learnt of the other side stays."""
        count = self.count
        self.used = self.payloads = self.bytes = 0
        self.free = list(range(count - 1, -1, -1))  # the lowest on top: few rows are hot
        self.of: list[Stretch | None] = [None] * count
        self.start = [0] * len(self.length)
        self.length = [0] * len(self.length)
        self.is_zero = [False] * count  # no payload: a WRITE_ZEROES
        self.spliced = [0] * count  # bytes of the payload that are in a pipe
        self.sent = [inf] * count

    def take(self, stretch: Stretch, start: int, length: int, now: float, *, is_zero: bool = False) -> int:
        """A cookie for `length` bytes at `start`; the caller has seen that one is free."""
        cookie = self.free.pop()
        self.of[cookie] = stretch
        self.start[cookie] = start
        self.length[cookie] = length
        self.is_zero[cookie] = is_zero
        self.spliced[cookie] = 0
        self.sent[cookie] = now
        self.used += 1
        if not is_zero:
            self.payloads += 1
            self.bytes += length
        return cookie

    def give(self, cookie: int) -> None:
        """It was answered, or never sent."""
        if not self.is_zero[cookie]:
            self.payloads -= 1
            self.bytes -= self.length[cookie]
        self.length[cookie] = 0
        self.of[cookie] = None
        self.sent[cookie] = inf
        self.free.append(cookie)
        self.used -= 1

    def answered(self, cookie: int, now: float) -> None:
        """Learn from how long the answer took."""
        seconds = now - self.sent[cookie]
        if seconds < self.fastest:
            self.fastest = seconds
            needed = int(seconds * SPLICED_BYTES_PER_SECOND / self._unit)
            self.depth = min(self._depth_max, max(LANE_DEPTH, needed))

    def unanswered(self) -> list[Unanswered]:
        return [
            Unanswered(
                cookie,
                Range.of(self.start[cookie], self.length[cookie]),
                stretch,
                self.is_zero[cookie],
                self.spliced[cookie],
            )
            for cookie, stretch in enumerate(self.of)
            if stretch is not None
        ]

    def oldest(self) -> tuple[float, int]:
        """When the oldest unanswered one was sent (inf: there is none), and the bytes of all.

        From another thread: a row may change under the look, and is no older for it.
        """
        return min(self.sent), sum(self.length[: self.count])


class RequestSizes:
    """How much to ask for at a time: `size`, in bytes, a power of two.

    What suits a server best depends on its buffers and its processor's cache: nbdkit's threads on requests of 1 MiB,
    the one thread of qemu-nbd on half as much, by far. So, where nobody has asked for a size, both are tried in turns,
    twice, and the one with the faster turn is kept.
    """

    def __init__(self, largest: int, *, varies: bool) -> None:
        self.size = largest
        self._left = [largest, largest // 2] * 2 if varies else []  # turns to come, the present one included
        self._fastest: dict[int, float] = {}
        self._since = inf  # when the present turn began; inf: it has not
        self._stretches = 0  # of it

    def begin_stretch(self, length: int, now: float) -> None:
        """A stretch of `length` bytes is to be asked for next."""
        if not self._left:
            return
        if length < LANE_STRETCH_BYTES or self._since == inf:  # what is shorter says little
            self._since, self._stretches = (now, 0) if length >= LANE_STRETCH_BYTES else (inf, 0)
            return
        self._stretches += 1
        if self._stretches < LANE_TRIAL_STRETCHES:
            return
        size = self._left.pop(0)
        self._fastest[size] = min(self._fastest.get(size, inf), now - self._since)
        self.size = self._left[0] if self._left else min(self._fastest, key=lambda each: self._fastest[each])
        self._since, self._stretches = now, 0

    def pause(self) -> None:
        """Nothing more is asked for now: the present turn begins anew."""
        self._since = inf
