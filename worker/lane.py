"""A lane: one source connection and one destination connection, and a thread that copies from the one to the other.

While nothing is the matter, a copy of data is the same few steps over and over, and a thread that waits in the kernel
for each of them does it with a fifth of the Python that the copier's tables take (docs/benchmarks.md). So the copier
lends a pair of connections and feeds it stretches of data. The thread knows only that all goes well: it reads, finds
the zeroes, writes, and counts what is acknowledged. Whatever is anything else ends the loan: the connections go back at
a point where nothing is half sent or half received, with a list of what is unanswered, and the copier goes on from
there (lanes.py).

::

    feed -> READ asked -> reply whole, in the pipe or the buffer -> WRITE sent -> acknowledged
                                     |-> zeroes between data -> WRITE_ZEROES sent -> acknowledged
                                     \\-> nothing but zeroes: left to the copier

The copier's invariants hold here, too: no WRITE begins before its payload is whole, only acknowledged bytes count, and
the clock is compared with the lease's end before each piece that is sent.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from errno import EAGAIN
from math import inf
from typing import Final

from nbdshard.common.limits import LANE_DEPTH, LANE_GATHER_SHARE, LANE_LOOK_SECONDS, LANE_ROWS_MAX
from nbdshard.common.messages import Side
from nbdshard.common.nbd.quick import ODD
from nbdshard.common.ranges import Range
from nbdshard.worker.lane_payload import LanePayload, Looks, rest_of
from nbdshard.worker.lane_rows import RequestSizes, Rows
from nbdshard.worker.lending import ENDED, NOTHING, LaneSource, LaneTarget
from nbdshard.worker.stretch import Outcome, Stretch
from nbdshard.worker.zeroes import Run, find_runs

_NOBODY: Final = (inf, 0)


class _Over(Exception):  # not an error: the loan is over, as `_result` says
    """Ends the loop from inside a step."""


class Lane:
    """`wake` is called, from the thread, when there is something to look at: `finished`, `outcome`, or a short feed."""

    def __init__(
        self,
        request_bytes: int,
        sparse_unit: int,
        rows: int,
        queue_bytes: int,
        clock: Callable[[], float],
        wake: Callable[[], None],
        plumbing: Looks,
        *,
        varies: bool = False,
        zeroes: bool = False,
    ) -> None:
        """`sparse_unit`: of the search for zeroes, 0 for none. `rows`: requests with payload, of both sides, 2 or more;
        LANE_ROWS_MAX of them are used. And all requests of the target. `queue_bytes`: payload in flight on each side.

        `varies`: `request_bytes` may also be half as much. `zeroes`: zeroes in a payload may be sent as WRITE_ZEROES.
        """
        self.feed: deque[Stretch] = deque()
        self.finished: deque[Stretch] = deque()  # nothing of them is left
        self.feed_low = 0  # wake when so many are left
        self.is_out = False
        self.outcome: Outcome | None = None  # once it is over
        self.wants_flush = False
        self.flushed = False  # what was wanted was acknowledged
        self.copied = 0  # bytes, in this loan
        self.remarks: deque[str] = deque()  # for the log, of the source
        self._stopping = False
        self._sizes = RequestSizes(request_bytes, varies=varies)
        self._sparse_unit = sparse_unit
        self._zeroes = zeroes
        self._clock = clock
        self._wake_copier = wake
        self._has_woken = False
        self._payload = LanePayload(request_bytes, plumbing, self.remarks.append)
        rows = min(rows, LANE_ROWS_MAX)
        self._queue_bytes = queue_bytes
        self._reads = Rows(rows // 2, request_bytes, queue_bytes)
        self._writes = Rows(rows, request_bytes, queue_bytes, extra=1)
        self._payloads_max = rows - rows // 2  # each may become a read of the copier's, where it has `rows` in all
        # Not all of them at once, or each call would wait until the one before is answered.
        self._gather_max = max(1, rows // 2 // LANE_GATHER_SHARE)
        self.flush_cookie = rows  # behind all others
        self._orders: queue.SimpleQueue[tuple[LaneSource, LaneTarget] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._reset()

    def _reset(self) -> None:
        self._reads.clear()
        self._writes.clear()
        self._sizes.pause()
        self._stretch: Stretch | None = None  # what is being asked
        self._flush_sent = 0.0
        self._now = self._acks_due = 0.0  # of the last reply; when answers are to be looked for at the latest
        # Payload that is held, and of which no WRITE has begun: of this stretch, between these offsets.
        self._held_of: Stretch | None = None
        self._held_at = self._held_end = 0
        # The side that holds the other one up, which cannot show then what it would do.
        self._waits_for: Side | None = None
        self._may_splice = True  # the last payload that was searched had no zeroes

    # -- the copier's side: called from its thread ---------------------------------------------------------------------

    def prepare(self) -> str:
        """Open what is needed: "" or why there can be no lane."""
        return self._payload.open()

    def begin(self, source: LaneSource, target: LaneTarget) -> None:
        """Lend the connections; they are the lane's until `outcome` is there, and it is taken."""
        self.is_out = True
        self.flushed = self.wants_flush = self._stopping = False
        self.copied = 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="lane", daemon=True)
            self._thread.start()
        self._orders.put((source, target))

    def stop(self) -> None:
        """Give back what is lent, soon: when the payload that is moving is whole."""
        self._stopping = True

    def look(self) -> None:
        """The copier looks at everything now: the next thing of interest wakes it again."""
        self._has_woken = False

    def take_outcome(self) -> Outcome | None:
        """How the loan ended, once it has; the connections are the caller's again."""
        outcome = self.outcome
        if outcome is not None:
            self.outcome = None
            self.is_out = False
            self._reset()
        return outcome

    def oldest_read(self) -> tuple[float, int]:
        """When the oldest unanswered READ was asked, and the bytes of all of them.

        inf: there is none, or its answer may be there, and cannot be taken while the destination is waited for.
        """
        return _NOBODY if self._waits_for == "destination" else self._reads.oldest()

    def oldest_write(self) -> tuple[float, int]:
        """The same of WRITEs, and of waiting for the source."""
        return _NOBODY if self._waits_for == "source" else self._writes.oldest()

    @property
    def flush_sent(self) -> float:
        """When the flush under way was sent; 0.0: there is none, or its answer is not looked for just now."""
        return 0.0 if self._waits_for == "source" else self._flush_sent

    def stretches_written(self) -> list[Stretch]:
        """Those with a WRITE that is not answered."""
        return [stretch for stretch in self._writes.of if stretch is not None]

    def close(self) -> None:
        """End the thread, which has nothing under way, and let go of everything. Idempotent."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
            self._thread = None
        self._payload.close()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread's business
        while (order := self._orders.get()) is not None:
            source, target = order
            self._result = Outcome()
            try:
                source.open()
                target.open()
                self._work(source, target)
            except _Over:
                pass
            except BaseException as error:  # it is raised again where somebody can tell of it
                self._result.bug = error
            try:
                source.close()
                target.close()
                self._describe(source, target)
            except BaseException as error:  # else the loan would never end
                self._result.bug = self._result.bug or error
            self.outcome = self._result
            self._wake_copier()

    def _work(self, source: LaneSource, target: LaneTarget) -> None:
        """Until there is nothing left to do, or something else has happened."""
        reads, writes = self._reads, self._writes
        while not self._stopping:
            if self.wants_flush and not self._flush_sent:
                self._flush(target)
            if reads.used < reads.depth:
                self._ask(source)
            if reads.used:
                self._copy_next(source, target)
                # Not only when there are many: where zeroes come, no more are sent, and those would look unanswered.
                is_due = (writes.used or self._flush_sent) and self._now >= self._acks_due
                if writes.used >= LANE_DEPTH or is_due:
                    self._take_acks(target, wait=writes.used >= writes.depth)
            elif writes.used or self._flush_sent:
                self._take_acks(target, wait=True)
            else:
                return

    def _ask(self, source: LaneSource) -> None:
        """Ask for as much as the depth allows."""
        reads, sizes = self._reads, self._sizes
        now = self._clock()
        while reads.used < reads.depth:
            stretch = self._stretch
            if stretch is None or stretch.at == stretch.end:
                if not self.feed:
                    self._stretch = None
                    return
                stretch = self._stretch = self.feed.popleft()
                sizes.begin_stretch(stretch.end - stretch.at, now)
                if len(self.feed) <= self.feed_low:
                    self._wake()
            start = stretch.at
            end = (start // sizes.size + 1) * sizes.size
            if end > stretch.end:
                end = stretch.end
            cookie = reads.take(stretch, start, end - start, now)
            stretch.at = end
            error = source.ask(cookie, start, end - start)
            if error:
                self._lose("source", error)

    def _copy_next(self, source: LaneSource, target: LaneTarget) -> None:
        """Take the payload of the next reply, and send it on."""
        reads = self._reads
        cookie = source.reply(reads.start, reads.length)
        if cookie < 0:
            self._no_reply(cookie, source, target)
            return
        start, length, stretch = reads.start[cookie], reads.length[cookie], reads.of[cookie]
        assert stretch is not None
        self._now = self._clock()
        reads.answered(cookie, self._now)
        payload, unit = self._payload, self._sparse_unit
        if unit and (payload.is_poor or not self._may_splice):
            payload.receive(source, start, length, self._await_source)
            self._hold(cookie, stretch, start, length)
            self._write_runs(target, stretch, start, length)
            return
        in_pipe = payload.fill(source, start, length, self._await_source)
        self._hold(cookie, stretch, start, length)
        if unit and not payload.seems_dense(unit, start, in_pipe, length):
            payload.unload()
            self._write_runs(target, stretch, start, length)
        else:
            rest = memoryview(payload.buffer)[in_pipe:length] if in_pipe < length else None
            self._write(target, stretch, start, length, in_pipe, rest)

    def _no_reply(self, why: int, source: LaneSource, target: LaneTarget) -> None:
        if why == ENDED:
            self._lose("source", source.error)
        if why != NOTHING:
            raise _Over
        if self._writes.used or self._flush_sent:
            self._take_acks(target, wait=False)

    def _hold(self, cookie: int, stretch: Stretch, start: int, length: int) -> None:
        """The payload is whole, in the pipe or the buffer."""
        self._waits_for = None
        self._held_of, self._held_at, self._held_end = stretch, start, start + length
        self._reads.give(cookie)

    def _await_source(self, count: int) -> None:
        """Nothing of a payload came within LANE_LOOK_SECONDS, or nothing will."""
        if count != -EAGAIN:
            self._lose("source", -count)
        self._waits_for = "source"

    def _await_room(self, target: LaneTarget, count: int, cookie: int | None = None) -> None:
        """`target` took nothing: until it does, or for LANE_LOOK_SECONDS; or it never will."""
        if count != -EAGAIN:
            self._lose("destination", -count, cookie)
        self._waits_for = "destination"
        target.wait_for_room()
        self._waits_for = None

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write_runs(self, target: LaneTarget, stretch: Stretch, start: int, length: int) -> None:
        """What is in the buffer, without the zeroes in it.

        A payload of nothing but zeroes is left to the copier, which joins it with its neighbours; as are all zeroes
        where they may not be sent from here.
        """
        unit, buffer = self._sparse_unit, self._payload.buffer
        view = memoryview(buffer)
        runs = find_runs(buffer, length, unit, start % unit)
        self._may_splice = len(runs) == 1 and not runs[0][2]
        if self._zeroes and target.gathers and len(runs) > 1:
            for at in range(0, len(runs), self._gather_max):
                self._write_gathered(target, stretch, start, runs[at : at + self._gather_max])
            return
        for at, end, is_zero in runs:
            if is_zero:
                self._held_at = start + end
                stretch.zeroes.append((start + at, start + end))
                self._settle(stretch, end - at)
            else:
                self._write(target, stretch, start + at, end - at, 0, view[at:end])

    def _write(
        self, target: LaneTarget, stretch: Stretch, start: int, length: int, in_pipe: int, rest: memoryview | None
    ) -> None:
        """One WRITE: what is in the pipe, if any, and then `rest`."""
        writes, pipe = self._writes, self._payload.pipe
        self._make_room(target, 1, 1, length)
        # First the row, then the clock: whoever ends the lease in between sees that something may be written.
        cookie = writes.take(stretch, start, length, inf)
        writes.sent[cookie] = now = self._clock()  # once: it ages also while there is no room for its first byte
        writes.spliced[cookie] = in_pipe
        self._held_at = start + length
        expires = stretch.lease.expires
        while True:
            if now >= expires:
                expires = self._renewed(stretch, now, (cookie,), half_sent=False)
            count = target.begin(cookie, start, length, rest if not in_pipe else None)
            if count >= 0:
                break
            self._await_room(target, count, cookie)
            now = self._clock()
        if count and rest is not None:
            if count == len(rest):
                return
            rest = rest[count:]
        while in_pipe:
            expires = self._still_good(stretch, expires, cookie)
            count = target.drain(pipe, in_pipe)
            if count > 0:
                in_pipe -= count
                pipe.held = in_pipe
            else:
                self._await_room(target, count, cookie)
        while rest is not None:
            expires = self._still_good(stretch, expires, cookie)
            count = target.send(rest)
            if count == len(rest):
                return
            if count > 0:
                rest = rest[count:]
            else:
                self._await_room(target, count, cookie)

    def _write_gathered(self, target: LaneTarget, stretch: Stretch, start: int, runs: Sequence[Run]) -> None:
        """WRITEs and WRITE_ZEROES of one payload, which begins at `start`, in as few calls as they take."""
        writes, view = self._writes, memoryview(self._payload.buffer)
        data = [end - at for at, end, is_zero in runs if not is_zero]
        self._make_room(target, len(runs), len(data), sum(data))
        cookies: list[int] = []
        pieces: list[bytes | memoryview] = []
        for at, end, is_zero in runs:
            cookie = writes.take(stretch, start + at, end - at, inf, is_zero=is_zero)
            cookies.append(cookie)
            pieces.append(target.message(cookie, start + at, end - at, is_zero=is_zero))
            if not is_zero:
                pieces.append(view[at:end])
        self._held_at = start + runs[-1][1]
        has_begun, expires = False, stretch.lease.expires
        while pieces:
            now = self._clock()
            if now >= expires:
                expires = self._renewed(stretch, now, cookies, half_sent=has_begun)
            if writes.sent[cookies[0]] == inf:
                for cookie in cookies:
                    writes.sent[cookie] = now
            count = target.gather(pieces)
            if count > 0:
                has_begun = True
                pieces = rest_of(pieces, count)
            else:
                self._await_room(target, count, cookies[0])

    def _make_room(self, target: LaneTarget, rows: int, payloads: int, length: int) -> None:
        """Wait for answers until there are so many free rows, some with payload, and room for `length` bytes of it."""
        writes, most = self._writes, self._payloads_max - payloads
        while (
            len(writes.free) < rows
            or writes.payloads > most
            or (writes.bytes and writes.bytes + length > self._queue_bytes)
        ):
            self._take_acks(target, wait=True)

    def _still_good(self, stretch: Stretch, expires: float, cookie: int) -> float:
        """The lease's end, which is to come: we may have been stopped for long since the last piece went."""
        now = self._clock()
        if now < expires:
            return expires
        return self._renewed(stretch, now, (cookie,), half_sent=True)

    def _renewed(self, stretch: Stretch, now: float, cookies: Sequence[int], *, half_sent: bool) -> float:
        """The end of the lease after a look at whether the coordinator has prolonged it; else the loan is over."""
        expires = stretch.lease.expires
        if now < expires:
            return expires
        if half_sent:
            self._result.is_late = True
            self._result.failed_write = cookies[0]
        else:
            self._held_at = self._writes.start[cookies[0]]
            for cookie in cookies:
                self._writes.give(cookie)
        raise _Over

    def _flush(self, target: LaneTarget) -> None:
        self.wants_flush = False
        self._flush_sent = self._clock()
        self._writes.length[self.flush_cookie] = 1  # a reply names it like any other
        while error := target.flush(self.flush_cookie):
            self._await_room(target, error)

    def _take_acks(self, target: LaneTarget, *, wait: bool) -> None:
        """Count what was acknowledged. `wait`: for at least one answer, or LANE_LOOK_SECONDS."""
        writes = self._writes
        self._acks_due = self._now + LANE_LOOK_SECONDS
        cookies = target.acks(writes.start, writes.length)
        if not cookies and wait:
            self._waits_for = "destination"
            target.wait_for_acks()
            self._waits_for = None
            cookies = target.acks(writes.start, writes.length)
        if not cookies:
            return
        now = self._clock()
        for cookie in cookies:
            if cookie < 0:
                if cookie == ODD:
                    raise _Over
                self._lose("destination", target.error)
            if cookie == self.flush_cookie:
                self._flush_sent = 0.0
                writes.length[cookie] = 0
                self.flushed = True
                self._wake()
                continue
            stretch, length = writes.of[cookie], writes.length[cookie]
            assert stretch is not None
            writes.answered(cookie, now)
            if writes.is_zero[cookie]:
                stretch.zeroed += length
            else:
                stretch.spliced += writes.spliced[cookie]
                stretch.copied += length
                self.copied += length
            writes.give(cookie)
            self._settle(stretch, length)

    def _settle(self, stretch: Stretch, length: int) -> None:
        stretch.left -= length
        if not stretch.left:
            self.finished.append(stretch)
            if not self.feed:
                self._wake()

    def _wake(self) -> None:
        if not self._has_woken:
            self._has_woken = True
            self._wake_copier()

    # -- the end of a loan ---------------------------------------------------------------------------------------------

    def _lose(self, side: Side, error: int, write: int | None = None) -> None:
        """The connection, or the file, is of no use: an errno, or 0 for its end."""
        result = self._result
        result.lost, result.error, result.failed_write = side, error, write
        raise _Over

    def _describe(self, source: LaneSource, target: LaneTarget) -> None:
        """What is unanswered, and what was not begun."""
        result = self._result
        result.reads = self._reads.unanswered()
        result.writes = self._writes.unanswered()
        result.is_flushing = self._flush_sent > 0.0
        result.source_bytes = source.unread()
        result.target_bytes = target.unread()
        if self._stretch is not None and self._stretch.at < self._stretch.end:
            self.feed.appendleft(self._stretch)
        if self._held_of is not None and self._held_at < self._held_end:
            result.unwritten.append((self._held_of, Range(self._held_at, self._held_end)))
        self._payload.unload()
