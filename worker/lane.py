"""A lane: one source connection and one destination connection, and a thread that copies from the one to the other.

While nothing is the matter, a copy of data is the same few steps over and over, and a thread that waits in the kernel
for each of them does it with a fifth of the Python that the copier's tables take (docs/benchmarks.md). So the copier
lends a pair of connections and feeds it stretches of data. The thread knows only that all goes well: it reads, finds
the zeroes, writes, and counts what is acknowledged. Whatever is anything else ends the loan: the connections go back at
a point where nothing is half sent or half received, with a list of what is unanswered, and the copier goes on from
there (lanes.py).

::

    feed -> READ asked -> reply whole, in the pipe or the buffer -> WRITE sent -> acknowledged
                                     \\-> zeroes: left to the copier

The copier's invariants hold here, too: no WRITE begins before its payload is whole, only acknowledged bytes count, and
the clock is compared with the lease's end before each piece that is sent.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import threading
from collections import deque
from collections.abc import Callable
from errno import EAGAIN
from math import inf
from typing import Final, Protocol

from nbdshard.common.limits import LANE_DEPTH, LANE_LOOK_SECONDS
from nbdshard.common.messages import Side
from nbdshard.common.nbd.quick import ODD
from nbdshard.common.ranges import Range
from nbdshard.worker.lane_rows import RequestSizes, Rows
from nbdshard.worker.lending import ENDED, NOTHING, LaneSource, LaneTarget
from nbdshard.worker.pipes import SAMPLE_BYTES, SAMPLES_MAX, Pipe
from nbdshard.worker.stretch import Outcome, Stretch
from nbdshard.worker.zeroes import find_runs

_ZERO_SAMPLE: Final = bytes(SAMPLE_BYTES)


class Looks(Protocol):
    """What a lane needs of the kernel's pipes (plumbing.SystemPlumbing)."""

    def open_pipe(self, size: int) -> Pipe | int: ...
    def close_pipe(self, pipe: Pipe) -> None: ...
    def sample(self, pipe: Pipe, unit: int) -> bytes: ...
    def close(self) -> None: ...


class _Over(Exception):  # not an error: the loan is over, as `_result` says
    """Ends the loop from inside a step."""


class Lane:
    """`wake` is called, from the thread, when there is something to look at: `finished`, `outcome`, or a short feed."""

    def __init__(
        self,
        request_bytes: int,
        sparse_unit: int,
        rows: int,
        clock: Callable[[], float],
        wake: Callable[[], None],
        plumbing: Looks,
        *,
        varies: bool = False,
    ) -> None:
        """`rows`: cookies of both sides together, 2 at least. `sparse_unit`: of the search for zeroes, 0 for none.

        `varies`: `request_bytes` may also be half as much.
        """
        self.feed: deque[Stretch] = deque()
        self.finished: deque[Stretch] = deque()  # nothing of them is left
        self.feed_low = 0  # wake when so many are left
        self.is_out = False
        self.outcome: Outcome | None = None  # once it is over
        self.wants_flush = False
        self.flushed = False  # what was wanted was acknowledged
        self.small_pieces = 0  # bytes the pipe was full with before a payload's end; 0: that was never so
        self.copied = 0  # bytes, in this loan
        self._stopping = False
        self._unit = request_bytes  # the most that is asked for at a time
        self._sizes = RequestSizes(request_bytes, varies=varies)
        self._sparse_unit = sparse_unit
        self._clock = clock
        self._wake_copier = wake
        self._has_woken = False
        self._plumbing = plumbing
        self._pipe = Pipe(-1, -1, 0)
        self._poll = select.poll()
        self._buffer = bytearray(0)
        self._reads = Rows(rows // 2, request_bytes)
        self._writes = Rows(rows - rows // 2, request_bytes, extra=rows // 2 + 1)
        self._flush_cookie = rows  # behind all others
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
        self._may_splice = True  # the last payload that was searched had no zeroes

    # -- the copier's side: called from its thread ---------------------------------------------------------------------

    def prepare(self) -> str:
        """Open what is needed: "" or why there can be no lane."""
        pipe = self._plumbing.open_pipe(self._unit)
        if isinstance(pipe, int):
            return "no pipe can be opened"
        if pipe.capacity < self._unit:
            self._plumbing.close_pipe(pipe)
            return f"a pipe can hold only {pipe.capacity} bytes (pipe-max-size, pipe-user-pages-soft)"
        os.set_blocking(pipe.write_end, True)  # or else nothing that fills it waits
        self._poll.register(pipe.write_end, select.POLLOUT)
        self._pipe = pipe
        return ""

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
        """When the oldest unanswered READ was asked (inf: there is none), and the bytes of all of them."""
        return self._reads.oldest()

    def oldest_write(self) -> tuple[float, int]:
        """The same of WRITEs."""
        return self._writes.oldest()

    @property
    def flush_sent(self) -> float:
        """When the flush under way was sent; 0.0: there is none."""
        return self._flush_sent

    def stretches_written(self) -> list[Stretch]:
        """Those with a WRITE that is not answered."""
        return [stretch for stretch in self._writes.of if stretch is not None]

    def close(self) -> None:
        """End the thread, which has nothing under way, and let go of everything. Idempotent."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
            self._thread = None
        if self._pipe.capacity:
            self._poll.unregister(self._pipe.write_end)
            self._plumbing.close_pipe(self._pipe)
            self._pipe = Pipe(-1, -1, 0)
        self._plumbing.close()

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
        pipe, unit = self._pipe, self._sparse_unit
        if unit and (self.small_pieces or not self._may_splice):  # what spills has to be searched in memory
            self._receive(source, start, length, 0)
            self._hold(cookie, stretch, start, length)
            self._write_runs(target, stretch, start, length)
            return
        in_pipe = self._fill(source, pipe, start, length)
        if in_pipe < length:
            self._receive(source, start, length, in_pipe)
        self._hold(cookie, stretch, start, length)
        if unit and not self._seems_dense(pipe, unit, start, in_pipe, length):
            self._unload(in_pipe)
            self._write_runs(target, stretch, start, length)
        else:
            rest = memoryview(self._buffer)[in_pipe:length] if in_pipe < length else None
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
        self._held_of, self._held_at, self._held_end = stretch, start, start + length
        self._reads.give(cookie)

    def _fill(self, source: LaneSource, pipe: Pipe, start: int, length: int) -> int:
        """Payload into the pipe: all of it, or as much as the pipe had room for."""
        moved = 0
        while moved < length:
            count = source.fill(pipe, start + moved, length - moved)
            if count > 0:
                moved += count
                pipe.held = moved
                if moved < length and not self._poll.poll(0):
                    self.small_pieces = self.small_pieces or moved
                    return moved
            elif count != -EAGAIN:
                self._lose("source", -count)
        return moved

    def _receive(self, source: LaneSource, start: int, length: int, at: int) -> None:
        """The rest of a payload into the buffer, from `at` on, where it would be if all had gone there."""
        view = self._memory()
        while at < length:
            count = source.receive(view[at:length], start + at)
            if count > 0:
                at += count
            elif count != -EAGAIN:
                self._lose("source", -count)

    def _memory(self) -> memoryview:
        if not self._buffer:
            self._buffer = bytearray(self._unit)
        return memoryview(self._buffer)

    def _seems_dense(self, pipe: Pipe, unit: int, start: int, in_pipe: int, length: int) -> bool:
        """As `PipedPayload.seems_dense`: samples show that no unit is zero."""
        if in_pipe < length or start % unit or length % unit or length > SAMPLES_MAX * unit:
            return False
        samples = self._plumbing.sample(pipe, unit)
        return samples != b"" and _ZERO_SAMPLE not in samples

    def _unload(self, in_pipe: int) -> None:
        """What is in the pipe into the buffer, in front of what has spilled there."""
        view, at = self._memory(), 0
        while at < in_pipe:
            at += os.readv(self._pipe.read_end, [view[at:in_pipe]])
        self._pipe.held = 0

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write_runs(self, target: LaneTarget, stretch: Stretch, start: int, length: int) -> None:
        """What is in the buffer, without the zeroes in it."""
        unit, view = self._sparse_unit, memoryview(self._buffer)
        runs = find_runs(self._buffer, length, unit, start % unit)
        self._may_splice = len(runs) == 1 and not runs[0][2]
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
        writes = self._writes
        while not writes.free:
            self._take_acks(target, wait=True)
        # First the row, then the clock: whoever ends the lease in between sees that something may be written.
        cookie = writes.take(stretch, start, length, inf)
        writes.sent[cookie] = self._clock()
        writes.spliced[cookie] = in_pipe
        self._held_at = start + length
        expires = stretch.lease.expires
        while True:
            now = writes.sent[cookie]
            if now >= expires:
                expires = self._renewed(stretch, now, cookie, half_sent=False)
            count = target.begin(cookie, start, length, rest if not in_pipe else None)
            if count >= 0:
                break
            if count != -EAGAIN:
                self._lose("destination", -count, cookie)
            target.wait_for_room()
            writes.sent[cookie] = self._clock()
        if count and rest is not None:
            if count == len(rest):
                return
            rest = rest[count:]
        while in_pipe:
            expires = self._still_good(stretch, expires, cookie)
            count = target.drain(self._pipe, in_pipe)
            if count > 0:
                in_pipe -= count
                self._pipe.held = in_pipe
            elif count == -EAGAIN:
                target.wait_for_room()
            else:
                self._lose("destination", -count, cookie)
        while rest is not None:
            expires = self._still_good(stretch, expires, cookie)
            count = target.send(rest)
            if count == len(rest):
                return
            if count > 0:
                rest = rest[count:]
            elif count == -EAGAIN:
                target.wait_for_room()
            else:
                self._lose("destination", -count, cookie)

    def _still_good(self, stretch: Stretch, expires: float, cookie: int) -> float:
        """The lease's end, which is to come: we may have been stopped for long since the last piece went."""
        now = self._clock()
        if now < expires:
            return expires
        return self._renewed(stretch, now, cookie, half_sent=True)

    def _renewed(self, stretch: Stretch, now: float, cookie: int, *, half_sent: bool) -> float:
        """The end of the lease after a look at whether the coordinator has prolonged it; else the loan is over."""
        expires = stretch.lease.expires
        if now < expires:
            return expires
        if half_sent:
            self._result.is_late = True
            self._result.failed_write = cookie
        else:
            self._held_at = self._writes.start[cookie]
            self._writes.give(cookie)
        raise _Over

    def _flush(self, target: LaneTarget) -> None:
        self.wants_flush = False
        self._flush_sent = self._clock()
        self._writes.length[self._flush_cookie] = 1  # a reply names it like any other
        while error := target.flush(self._flush_cookie):
            if error != -EAGAIN:
                self._lose("destination", -error)
            target.wait_for_room()

    def _take_acks(self, target: LaneTarget, *, wait: bool) -> None:
        """Count what was acknowledged. `wait`: for at least one answer, or LANE_LOOK_SECONDS."""
        writes = self._writes
        self._acks_due = self._now + LANE_LOOK_SECONDS
        cookies = target.acks(writes.start, writes.length)
        if not cookies and wait:
            target.wait_for_acks()
            cookies = target.acks(writes.start, writes.length)
        if not cookies:
            return
        now = self._clock()
        for cookie in cookies:
            if cookie < 0:
                if cookie == ODD:
                    raise _Over
                self._lose("destination", target.error)
            if cookie == self._flush_cookie:
                self._flush_sent = 0.0
                writes.length[cookie] = 0
                self.flushed = True
                self._wake()
                continue
            stretch, length = writes.of[cookie], writes.length[cookie]
            assert stretch is not None
            writes.answered(cookie, now)
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
        if self._pipe.held:
            self._unload(self._pipe.held)
