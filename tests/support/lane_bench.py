"""A lane on a bench: its thread is real, and so are its sockets, whose other ends the test plays, in NBD's bytes.

The wire is written on its own struct code (doubles.py): a fault in quick.py is not mirrored here. The clock stands
still unless it is moved. Every loan that ends is checked: each byte that was fed is copied, or a zero, or handed back.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nbdshard.common.nbd.quick import quick
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.worker.lane import Lane
from nbdshard.worker.lane_ends import SocketSource, SocketTarget
from nbdshard.worker.lane_payload import Looks
from nbdshard.worker.lease import LeaseWork
from nbdshard.worker.lending import LaneSource, LaneTarget
from nbdshard.worker.plumbing import SystemPlumbing
from nbdshard.worker.stretch import Outcome, Stretch, Unanswered
from support.doubles import (
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    FLAG_DONE,
    REPLY_ERROR,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from support.images import KIB, MIB
from support.listening import receive_exactly
from support.nbd_feeding import an_export
from support.pipes import Ends, prepared, unix_ends, waiting_in
from support.waiting import WAIT_SECONDS, wait_for

MODES = ("simple", "structured", "extended")
UNIT = 64 * KIB  # of a request, unless a test says otherwise: what a socket's buffers hold in any case
EXPIRES = 200.0  # of the lease; the clock begins at 100
Play = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the server got it."""

    command: int
    cookie: int
    start: int
    length: int
    payload: bytes = b""

    @property
    def where(self) -> Range:
        return Range.of(self.start, self.length)


class Peer:
    """The server's end of one connection. Replies are made as bytes, to be sent whole or in parts."""

    def __init__(self, end: socket.socket, mode: str) -> None:
        self.end = end
        self._is_extended = mode == "extended"
        self._is_structured = mode == "structured"

    def take_header(self) -> Asked:
        """The next request, without the payload of a WRITE."""
        layout = struct.Struct(">IHHQQQ" if self._is_extended else ">IHHQQI")
        magic, flags, command, cookie, start, length = layout.unpack(receive_exactly(self.end, layout.size))
        assert magic == (EXTENDED_REQUEST_MAGIC if self._is_extended else REQUEST_MAGIC)
        assert flags == (32 if self._is_extended and command == CMD_WRITE else 0)  # PAYLOAD_LEN
        return Asked(command, cookie, start, length)

    def take(self) -> Asked:
        """The next request, with its payload."""
        asked = self.take_header()
        if asked.command != CMD_WRITE:
            return asked
        payload = receive_exactly(self.end, asked.length)
        return Asked(asked.command, asked.cookie, asked.start, asked.length, payload)

    def reads(self, count: int) -> list[Asked]:
        """The next `count` requests, all READs."""
        asked = [self.take() for _ in range(count)]
        assert [each.command for each in asked] == [CMD_READ] * count
        return asked

    def write(self) -> Asked:
        """The next request, a WRITE."""
        asked = self.take()
        assert asked.command == CMD_WRITE
        return asked

    def flush(self) -> Asked:
        """The next request, a FLUSH."""
        asked = self.take()
        assert asked.command == CMD_FLUSH
        return asked

    def send(self, *parts: bytes) -> None:
        self.end.sendall(b"".join(parts))

    def chunk(self, asked: Asked, kind: int, payload: bytes) -> bytes:
        if self._is_extended:
            head = (EXTENDED_REPLY_MAGIC, FLAG_DONE, kind, asked.cookie, asked.start, len(payload))
            return struct.pack(">IHHQQQ", *head) + payload
        return struct.pack(">IHHQI", STRUCTURED_REPLY_MAGIC, FLAG_DONE, kind, asked.cookie, len(payload)) + payload

    def data(self, asked: Asked, payload: bytes) -> bytes:
        """The reply to a READ."""
        assert len(payload) == asked.length
        if self._is_extended or self._is_structured:
            return self.chunk(asked, REPLY_OFFSET_DATA, struct.pack(">Q", asked.start) + payload)
        return struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, 0, asked.cookie) + payload

    def ack(self, asked: Asked) -> bytes:
        """The reply to a WRITE or FLUSH."""
        if self._is_extended:
            return self.chunk(asked, REPLY_NONE, b"")
        return struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, 0, asked.cookie)

    def refusal(self, asked: Asked, error: int, message: bytes = b"") -> bytes:
        """An error in the place of either; a simple one has no message."""
        if self._is_extended or (self._is_structured and asked.command == CMD_READ):
            return self.chunk(asked, REPLY_ERROR, struct.pack(">IH", error, len(message)) + message)
        return struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, error, asked.cookie)


class LaneBench:
    """A lane between `source` and `target`, which are the servers' ends. `written`: to `serve_writes`."""

    def __init__(
        self,
        mode: str,
        unit: int,
        sparse_unit: int,
        rows: int,
        ends: tuple[Ends, Ends],
        plumbing: Looks,
        queue_bytes: int,
        *,
        zeroes: bool,
    ) -> None:
        self.now = 100.0
        self.wakes = 0
        self.unit = unit
        self.looks: list[int] = []  # how many WRITEs could be seen at each look at the clock
        self.lane = Lane(unit, sparse_unit, rows, queue_bytes, self._clock, self._woken, plumbing, zeroes=zeroes)
        assert self.lane.prepare() == ""
        self.ours, self.theirs = (ends[0][0], ends[1][0]), (ends[0][1], ends[1][1])
        self.source, self.target = (Peer(end, mode) for end in self.theirs)
        self.lease = LeaseWork(1, Range(0, 1 << 40), expires=EXPIRES, alignment=1)
        self.stretches: list[Stretch] = []  # all that was fed
        self.written: list[Asked] = []
        self._quick = quick(an_export(mode=mode))
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def _clock(self) -> float:
        self.looks.append(len(self.lane.stretches_written()))
        return self.now

    def _woken(self) -> None:
        self.wakes += 1

    # -- the copier's part ---------------------------------------------------------------------------------------------

    def feed(self, *ranges: tuple[int, int]) -> list[Stretch]:
        """Stretches of the lease, in order."""
        fed = [Stretch(self.lease, Range(start, end)) for start, end in ranges]
        self.lane.feed.extend(fed)
        self.stretches += fed
        return fed

    def begin(
        self, *ranges: tuple[int, int], source: LaneSource | None = None, target: LaneTarget | None = None
    ) -> None:
        """Feed `ranges`, and lend both connections, or others in their place."""
        self.feed(*ranges)
        self.lane.begin(source or self.source_end(), target or SocketTarget(self.ours[1].fileno(), self._quick))

    def source_end(self) -> SocketSource:
        return SocketSource(self.ours[0].fileno(), self._quick, self.unit)

    def target_end(self, kind: type[SocketTarget] = SocketTarget) -> SocketTarget:
        return kind(self.ours[1].fileno(), self._quick)

    def end(self) -> Outcome:
        """How the loan ends, once it does."""
        wait_for("the loan to end", lambda: self.lane.outcome is not None)
        outcome = self.lane.take_outcome()
        assert outcome is not None
        if outcome.bug is not None:
            raise outcome.bug
        self._assert_conserved(outcome)
        self._assert_as_before()
        return outcome

    def _assert_conserved(self, outcome: Outcome) -> None:
        """Each byte that was fed is copied, or in exactly one other place."""
        elsewhere = RangeSet()
        counted = 0

        def count(stretch: Stretch, where: Range) -> None:
            nonlocal counted
            assert stretch in self.stretches
            assert where in Range(stretch.start, stretch.end)
            assert elsewhere.add(where) == where.length, f"{where} is in two places"
            counted += where.length

        back = dict.fromkeys(self.stretches, 0)
        handed_back = [(each.stretch, each.where) for each in (*outcome.reads, *outcome.writes)]
        handed_back += outcome.unwritten
        handed_back += [(stretch, Range(stretch.at, stretch.end)) for stretch in self.lane.feed]
        for stretch, where in handed_back:
            count(stretch, where)
            back[stretch] += where.length
        for stretch in self.stretches:
            for start, end in stretch.zeroes:
                count(stretch, Range(start, end))
            assert stretch.left == back[stretch], str(stretch)
            assert stretch.spliced <= stretch.copied
            assert (stretch in self.lane.finished) == (stretch.left == 0)
        assert counted + sum(stretch.copied + stretch.zeroed for stretch in self.stretches) == sum(
            stretch.end - stretch.start for stretch in self.stretches
        )

    def _assert_as_before(self) -> None:
        """The connections are as they were lent."""
        for end in self.ours:
            assert not os.get_blocking(end.fileno())
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1

    # -- the servers' part ---------------------------------------------------------------------------------------------

    def play(self, part: Play) -> None:
        """Run `part` in a thread, until its connection ends."""

        def run() -> None:
            try:
                part()
            except (EOFError, ConnectionError):
                pass
            except BaseException as error:  # whatever it is, the test is told
                self._errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def serve_reads(self, content: bytes, pieces: int = 1 << 30) -> None:
        """Answer every READ, by sends of up to `pieces` bytes."""

        def part() -> None:
            while True:
                asked = self.source.take()
                reply = self.source.data(asked, content[asked.start : asked.start + asked.length])
                for at in range(0, len(reply), pieces):
                    self.source.send(reply[at : at + pieces])

        self.play(part)

    def serve_writes(self) -> None:
        """Acknowledge every WRITE and WRITE_ZEROES, and keep it."""

        def part() -> None:
            while True:
                self.written.append(asked := self.target.take())
                assert asked.command in (CMD_WRITE, CMD_WRITE_ZEROES)
                self.target.send(self.target.ack(asked))

        self.play(part)

    def store(self, length: int, fill: bytes = b"\xee") -> bytes:
        """What a destination of `length` bytes holds that was all `fill` before."""
        held = bytearray(fill * length)
        for asked in self.written:
            payload = asked.payload if asked.command == CMD_WRITE else bytes(asked.length)
            held[asked.start : asked.start + asked.length] = payload
        return bytes(held)

    def fill_up_soon(self) -> None:
        """The destination's socket holds little, however fast it is."""
        self.ours[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        self.theirs[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)

    def fill_up(self) -> int:
        """Fill the destination's socket, so that not a byte of a header finds room: how many bytes that took."""
        self.fill_up_soon()
        sent = 0
        while True:
            try:
                sent += self.ours[1].send(bytes(1))
            except BlockingIOError:
                return sent

    def until_full(self) -> None:
        """Wait until the destination's socket has no room, so that the lane waits for it."""
        wait_for("the socket to be full", lambda: self.untaken() and not select.select([], [self.ours[1]], [], 0)[1])

    def untaken(self) -> int:
        """Bytes that have come to the destination and were not taken."""
        return waiting_in(self.theirs[1], termios.FIONREAD)

    def taken_by_lane(self, side: int) -> None:
        """Wait until the lane has received all that was sent to its source (0) or destination (1)."""
        wait_for("the lane to receive", lambda: waiting_in(self.ours[side], termios.FIONREAD) == 0)

    def close(self) -> None:
        """Have the lane end, whatever it does, and all that is played."""
        self.lane.stop()
        for end in (*self.ours, *self.theirs):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if self.lane.is_out:
            wait_for("the lane to end", lambda: self.lane.outcome is not None)
        self.lane.close()
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "a server's thread did not end"
        assert not self._errors, self._errors


@contextlib.contextmanager
def lane_bench(
    mode: str = "structured",
    *,
    unit: int = UNIT,
    sparse_unit: int = 0,
    rows: int = 16,
    ends: Callable[[], Ends] = unix_ends,
    zeroes: bool = False,
    queue_bytes: int = 16 * MIB,
    plumbing: Looks | None = None,
) -> Iterator[LaneBench]:
    """A lane that is lent when `begin` is called, and closed with its sockets when the block ends."""
    with prepared(ends()) as one, prepared(ends()) as two:
        plumbing = plumbing or SystemPlumbing()
        bench = LaneBench(mode, unit, sparse_unit, rows, (one, two), plumbing, queue_bytes, zeroes=zeroes)
        try:
            yield bench
        finally:
            bench.close()


def ranges(unanswered: list[Unanswered]) -> list[tuple[int, int]]:
    """What requests are for, in order."""
    return sorted((each.where.start, each.where.end) for each in unanswered)
