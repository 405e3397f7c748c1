"""Payload on its way through pipes: filled by a read, drained by a write, looked at in between. Pure over `Plumbing`.

A `PipedPayload` holds the bytes of one operation, in order, as pieces: mostly one run in a pipe. Some bytes are in
memory all the same: those that came along with a reply's header, a hole inside a reply, and all that follows once the
pipe is full early (256 slots are 1 MiB only if each holds a whole page) or a reply's chunks do not come in order.
"""

from __future__ import annotations

from typing import Final

from nbdshard.common.errors import BugError
from nbdshard.common.limits import PIPES_MAX, ZERO_FILL_BYTES
from nbdshard.common.nbd.payload import Elsewhere
from nbdshard.worker.pipes import SAMPLE_BYTES, SAMPLES_MAX, Pipe, Plumbing

_ZERO_SAMPLE: Final = bytes(SAMPLE_BYTES)
_NO_TARGET: Final = memoryview(b"")
_ZEROES: Final = memoryview(bytes(ZERO_FILL_BYTES))


class PipeRun(Elsewhere):
    """A piece that is in a pipe, in front of whatever is put there later. `left`: bytes not yet taken out."""

    __slots__ = ("left", "pipe")

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self.pipe = pipe
        self.left = 0

    def grow(self, count: int) -> None:
        self.length += count
        self.left += count


class PipedPayload:
    """`length` bytes of one operation. Implements `common.nbd.sinks.Sink`; `pieces` is what a WRITE sends.

    Used once: what was taken out of a pipe cannot be taken out again.
    """

    __slots__ = ("_at", "_buffer", "_end", "_plumbing", "filled", "length", "pieces", "pipe", "spilled_at")

    def __init__(self, length: int, pipe: Pipe, plumbing: Plumbing) -> None:
        self.length = length
        self.pipe = pipe
        self.pieces: list[PipeRun | memoryview] = []
        self.filled = 0  # bytes of the payload that are here, from its start on; not kept up once it has spilled
        self.spilled_at = -1  # where the rest went into memory; -1: it did not
        self._plumbing = plumbing
        self._buffer = _NO_TARGET  # for [spilled_at, length)
        self._at = 0  # what arrives next, once it goes there
        self._end = 0  # of the stretch that is arriving

    def __len__(self) -> int:
        return self.length

    # -- filling: the Sink of an NBD read ------------------------------------------------------------------------------

    def begin(self, at: int, length: int) -> None:
        if self.spilled_at < 0 and at != self.filled:
            self.spill()
        self._at = at
        self._end = at + length

    def target(self) -> memoryview:
        if self.spilled_at < 0:
            return _NO_TARGET
        return self._buffer[self._at - self.spilled_at : self._end - self.spilled_at]

    def advance(self, count: int) -> None:
        if self.spilled_at >= 0:
            self._at += count
            return
        self.filled += count
        last = self.pieces[-1] if self.pieces else None
        if not isinstance(last, PipeRun):
            last = PipeRun(self.pipe)
            self.pieces.append(last)
        last.grow(count)

    def take(self, data: memoryview) -> None:
        if self.spilled_at < 0:
            self._append(memoryview(bytes(data)))
        else:
            start = self._at - self.spilled_at
            self._buffer[start : start + len(data)] = data
            self._at += len(data)

    def zeroes(self, at: int, length: int) -> None:
        if self.spilled_at < 0 and at == self.filled:
            for start in range(0, length, ZERO_FILL_BYTES):
                self._append(_ZEROES[: min(length - start, ZERO_FILL_BYTES)])
            return
        if self.spilled_at < 0:
            self.spill()
        start = at - self.spilled_at
        for each in range(start, start + length, ZERO_FILL_BYTES):
            end = min(each + ZERO_FILL_BYTES, start + length)
            self._buffer[each:end] = _ZEROES[: end - each]

    def _append(self, piece: memoryview) -> None:
        self.pieces.append(piece)
        self.filled += len(piece)

    def spill(self) -> None:
        """From here on into memory: the pipe is full, or what comes is not what belongs there next."""
        self.spilled_at = self._at = self.filled
        self._buffer = memoryview(bytearray(self.length - self.filled))
        self.pieces.append(self._buffer)

    def rest(self, at: int) -> PipeRun | memoryview:
        """What comes next where all before offset `at` was taken out: the rest of one piece."""
        for piece in self.pieces:
            if at < len(piece):
                return piece if isinstance(piece, PipeRun) else piece[at:]
            at -= len(piece)
        raise BugError(f"a payload of {self.length} bytes has none at its end")

    @property
    def in_memory(self) -> int:
        """Bytes of it that are not in the pipe, nor were."""
        return sum(len(piece) for piece in self.pieces if not isinstance(piece, PipeRun))

    # -- looking -------------------------------------------------------------------------------------------------------

    def seems_dense(self, unit: int) -> bool:
        """Whether samples of its units, all of them in the pipe, show that none is zero. Cheap; False says nothing."""
        run = self.pieces[0] if len(self.pieces) == 1 else None
        if not isinstance(run, PipeRun) or self.length % unit or self.length > SAMPLES_MAX * unit:
            return False
        samples = self._plumbing.sample(self.pipe, unit)
        return samples != b"" and _ZERO_SAMPLE not in samples

    def look(self, buffer: memoryview) -> bool:
        """Copy the payload into `buffer`, exactly as long. Whether it is still whole here: else `buffer` has it all."""
        if not self.pipe.held:
            self._gather(buffer, _NO_TARGET)
            return True
        runs = [piece for piece in self.pieces if isinstance(piece, PipeRun)]
        held = self.pipe.held
        if len(self.pieces) == len(runs) == 1:
            if self._plumbing.peek(self.pipe, buffer) == held:
                return True
            self._unload(buffer)
            return False
        copy = memoryview(bytearray(held))
        whole = self._plumbing.peek(self.pipe, copy) == held
        if not whole:
            self._unload(copy)
        self._gather(buffer, copy)
        return whole

    def _unload(self, buffer: memoryview) -> None:
        """Take all that is in the pipe out into `buffer`."""
        at, held = 0, self.pipe.held
        while at < held:
            moved = self._plumbing.read(self.pipe, buffer[at:held])
            if moved <= 0:
                raise BugError(f"a pipe that holds {held - at} bytes gave none of them ({moved})")
            at += moved

    def _gather(self, buffer: memoryview, piped: memoryview) -> None:
        """Put the pieces together in `buffer`; `piped` has what is in the pipe, in order."""
        at = taken = 0
        for piece in self.pieces:
            length = len(piece)
            if isinstance(piece, PipeRun):
                buffer[at : at + length] = piped[taken : taken + length]
                taken += length
            else:
                buffer[at : at + length] = piece
            at += length


class PipePool:
    """Pipes of `size` bytes, opened when first needed; the one given back last is used next.

    A user's share of pipe memory is bounded (pipe(7)): `limited` is set when fewer could be had.
    """

    def __init__(self, plumbing: Plumbing, size: int) -> None:
        self.size = size
        self.limited = ""  # why there are fewer than were wanted, for the log
        self._plumbing = plumbing
        self._count = 0  # that may still be opened
        self._is_retired = False
        self._free: list[Pipe] = []
        self._used: set[Pipe] = set()

    def grow(self, count: int) -> None:
        """Allow `count` more pipes, PIPES_MAX in all."""
        in_all = len(self._free) + len(self._used) + self._count
        if not self.limited:
            self._count += min(count, PIPES_MAX - in_all)

    def take(self, length: int) -> PipedPayload | None:
        """An empty payload of `length` bytes, `size` at most; None where there is no pipe for it."""
        pipe = self._free.pop() if self._free else self._open()
        if pipe is None:
            return None
        self._used.add(pipe)
        return PipedPayload(length, pipe, self._plumbing)

    def _open(self) -> Pipe | None:
        if self._count == 0:
            return None
        self._count -= 1
        pipe = self._plumbing.open_pipe(self.size)
        if not isinstance(pipe, int) and pipe.capacity >= self.size:
            return pipe
        have = len(self._used)
        if isinstance(pipe, int):
            self.limited = f"no more than {have} pipes can be opened"
        else:
            self._plumbing.close_pipe(pipe)
            why = "pipe-max-size, pipe-user-pages-soft"
            self.limited = f"pipe {have + 1} can hold only {pipe.capacity} bytes ({why})"
        self._count = 0
        return None

    def retire(self, why: str) -> None:
        """Give out no more pipes."""
        self.limited = why
        self._count = 0
        for pipe in self._free:
            self._plumbing.close_pipe(pipe)
        self._free.clear()
        self._is_retired = True

    @property
    def used(self) -> int:
        """How many are out."""
        return len(self._used)

    def give(self, payload: PipedPayload) -> None:
        """Take the pipe of `payload` back, in whatever state it is."""
        pipe = payload.pipe
        self._used.discard(pipe)
        if pipe.held and not pipe.is_unknown:
            self._plumbing.discard(pipe)
        if pipe.held or pipe.is_unknown:
            self._plumbing.close_pipe(pipe)
            self._count += 0 if self.limited else 1
        elif self._is_retired:
            self._plumbing.close_pipe(pipe)
        else:
            self._free.append(pipe)

    def close(self) -> None:
        """Close every pipe; nothing may be using one any more. Idempotent."""
        for pipe in (*self._free, *self._used):
            self._plumbing.close_pipe(pipe)
        self._free.clear()
        self._used.clear()
        self._count = 0
        self._plumbing.close()
