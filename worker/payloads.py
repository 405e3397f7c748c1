"""Where the payload of operations is while they have one: in a buffer, or in a pipe. Pure over `Plumbing`."""

from __future__ import annotations

from math import inf

from nbdshard.common.errors import BugError
from nbdshard.common.limits import SPLICED_BYTES_PER_SECOND, SPLICED_PER_CONNECTION
from nbdshard.worker.operation import Operation
from nbdshard.worker.piped import PipePool
from nbdshard.worker.pipes import NO_LOOK
from nbdshard.worker.zeroes import Run, find_runs


class Payloads:
    """Gives operations room for their payload, and takes it back. `pipes`: None where nothing is spliced."""

    def __init__(self, request_size: int, pipes: PipePool | None) -> None:
        self._buffers = BufferPool(request_size)
        self._pipes = pipes
        self._latency_seconds = inf
        self.pipes_per_source = SPLICED_PER_CONNECTION  # few are kept in use, unless the sources are slow to answer

    def learn(self, latency_seconds: float) -> bool:
        """A read was answered after so long. Whether that is the fastest answer so far."""
        if latency_seconds >= self._latency_seconds:
            return False
        self._latency_seconds = latency_seconds
        needed = int(latency_seconds * SPLICED_BYTES_PER_SECOND / self._buffers.size)
        self.pipes_per_source = max(SPLICED_PER_CONNECTION, needed)
        return True

    def grow(self, operations: int) -> None:
        """There may be so many more operations that read."""
        self._buffers.grow(operations)
        if self._pipes is not None:
            self._pipes.grow(operations)

    @property
    def piped(self) -> int:
        """Operations that hold a pipe."""
        return self._pipes.used if self._pipes is not None else 0

    def hold(self, operation: Operation, *, splice: bool) -> None:
        """Give `operation` room for its `where`: a pipe if it may be spliced and there is one, else a buffer."""
        if splice and self._pipes is not None:
            operation.piped = self._pipes.take(operation.where.length)
        if operation.piped is None:
            operation.buffer = self._buffers.take()

    def hold_in_memory(self, operation: Operation) -> None:
        """What `operation` holds is worthless; its next payload is to be kept for as long as it may be needed."""
        if operation.buffer is None:
            self.release(operation)
            operation.buffer = self._buffers.take()

    def find_runs(self, operation: Operation, unit: int) -> list[Run]:
        """The zeroes and the rest of the payload, as `zeroes.find_runs` cuts it.

        Spliced payload is looked at by a copy in a buffer that is used over and over. It stays spliced if it goes on
        as one piece; otherwise the copy takes its place.
        """
        length, phase = operation.where.length, operation.where.start % unit
        if operation.piped is None:
            assert operation.buffer is not None
            return find_runs(operation.buffer, length, unit, phase)
        if phase == 0 and operation.piped.seems_dense(unit):
            return [(0, length, False)]
        buffer = self._buffers.take()
        is_whole = operation.piped.look(memoryview(buffer)[:length])
        runs = find_runs(buffer, length, unit, phase)
        if not is_whole and self._pipes is not None:
            # As if by a rule: the pipe that copies go through is too small.
            self._pipes.retire(NO_LOOK)
        if is_whole and len(runs) == 1:
            self._buffers.give(buffer)
        else:
            self.release(operation)
            operation.buffer = buffer
        return runs

    def release(self, operation: Operation) -> None:
        """Take back what `operation` holds its payload in, if anything."""
        if operation.buffer is not None:
            self._buffers.give(operation.buffer)
            operation.buffer = None
        if operation.piped is not None and self._pipes is not None:
            self._pipes.give(operation.piped)
            operation.piped = None


class BufferPool:
    """Buffers of one size, the last one freed handed out first: its pages are in the cache."""

    __slots__ = ("_count", "_free", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._count = 0
        self._free: list[bytearray] = []

    def grow(self, count: int) -> None:
        """Allow `count` more buffers; each is made when it is first needed."""
        self._count += count

    def take(self) -> bytearray:
        if self._free:
            return self._free.pop()
        if self._count == 0:
            raise BugError("more operations than buffers")
        self._count -= 1
        return bytearray(self.size)

    def give(self, buffer: bytearray) -> None:
        self._free.append(buffer)
