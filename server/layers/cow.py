"""`cow`: what is written goes to an overlay, and never to what is below, which is opened read-only.

An overlay is kept where it is named, and thrown away at the end where it is not. A block that is written in part for
the first time is made whole from the base.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.limits import OVERLAY_SAMPLE_BYTES, OVERLAY_SAMPLES
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import WRITES, Backend
from nbdshard.server.device import Hole
from nbdshard.server.layers.base import Passing
from nbdshard.server.layers.overlay import Overlay, kept, temporary
from nbdshard.server.locks import Locks
from nbdshard.server.opening import Layer, Opening

_NAME: Final = "overlay"


class Cow(Passing):
    """`below`, with `overlay` over it, which it owns."""

    def __init__(self, below: Backend, overlay: Overlay, *, read_only: bool = False) -> None:
        super().__init__(below)
        self._overlay = overlay
        self._locks = Locks()
        kept_flags = below.flags & ~(WRITES | TransmissionFlag.READ_ONLY)
        # One overlay is behind every connection, over a base that does not change.
        self._flags = (
            kept_flags | TransmissionFlag.CAN_MULTI_CONN | (TransmissionFlag.READ_ONLY if read_only else WRITES)
        )

    @property
    def flags(self) -> TransmissionFlag:
        return self._flags

    @property
    def block_size(self) -> int:
        return max(self._overlay.block_bytes, self.below.block_size)

    @property
    def losses(self) -> int:
        return self.below.losses + self._overlay.losses

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        parts: list[memoryview | bytes | Hole] = []
        for run, is_here in self._overlay.runs(where):
            if is_here:
                parts.append(self._overlay.read(run))
            else:
                parts += self.below.read(run)
        return parts

    def write(self, where: Range, data: memoryview) -> None:
        if all(is_here for _, is_here in self._overlay.runs(where)):
            self._overlay.write(where, data)
            return
        for block, part in self._blocks(where):
            piece = data[part.start - where.start : part.end - where.start]
            if self._overlay.has(block):
                self._overlay.write(part, piece)
                continue
            with self._locks.of(block):
                if not self._overlay.has(block) and part != self._whole(block):
                    self._make_whole(block)
                self._overlay.write(part, piece)
                self._overlay.add(range(block, block + 1))

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        blocks = list(self._blocks(where))
        if fast and any(part != self._whole(block) and not self._overlay.has(block) for block, part in blocks):
            raise OSError(errno.ENOTSUP, "a block of the base would have to be copied")
        for block, part in blocks:
            with self._locks.of(block):
                if not self._overlay.has(block) and part != self._whole(block):
                    self._make_whole(block)
                if not self._overlay.zero(part, may_punch=may_punch, may_write=not fast):
                    raise OSError(errno.ENOTSUP, "zeroes are written here")
                self._overlay.add(range(block, block + 1))

    def trim(self, where: Range) -> None:
        """Zeroes, but for parts of blocks that would have to be copied for it."""
        for block, part in self._blocks(where):
            with self._locks.of(block):
                if self._overlay.has(block) or part == self._whole(block):
                    self._overlay.zero(part, may_punch=True)
                    self._overlay.add(range(block, block + 1))

    def cache(self, where: Range) -> None:
        for run, is_here in self._overlay.runs(where):
            if not is_here:
                self.below.cache(run)

    def flush(self) -> None:
        self._overlay.sync()

    def extents(self, where: Range) -> Extents:
        found: Extents = []
        for run, is_here in self._overlay.runs(where):
            found += (self._overlay.extents(run) if is_here else self.below.extents(run)) or [(run, 0)]
            if found[-1][0].end < run.end:
                break  # the rest is asked for when somebody wants to know it
        return found

    def close(self) -> None:
        self._overlay.close()
        super().close()

    def _whole(self, block: int) -> Range:
        start = block * self._overlay.block_bytes
        return Range(start, min(start + self._overlay.block_bytes, self.size))

    def _blocks(self, where: Range) -> Iterator[tuple[int, Range]]:
        """(number, its part of `where`) of each block that `where` touches."""
        for part in where.split(self._overlay.block_bytes):
            yield part.start // self._overlay.block_bytes, part

    def _make_whole(self, block: int) -> None:
        """Copy the base's block, which is locked. It is not here until that is said."""
        at = self._whole(block).start
        for part in self.below.read(self._whole(block)):
            where = Range.of(at, part.length if isinstance(part, Hole) else len(part))
            if isinstance(part, Hole):
                self._overlay.zero(where, may_punch=True)
            else:
                self._overlay.write(where, memoryview(part))
            at = where.end


def fingerprint(base: Backend) -> str:
    """What `base` is known by: a hash of its size and of samples of its content. Raises OSError."""
    found = hashlib.sha256(str(base.size).encode())
    length = min(OVERLAY_SAMPLE_BYTES, base.size)
    for number in range(OVERLAY_SAMPLES if length else 0):
        start = (base.size - length) * number // (OVERLAY_SAMPLES - 1)
        for part in base.read(Range.of(start, length)):
            found.update(bytes(part.length) if isinstance(part, Hole) else part)
    return found.hexdigest()


def _wrap(below: Backend, opening: Opening) -> Backend:
    text = opening.parameters.text(_NAME)
    if text is None:
        return Cow(below, temporary(below.size), read_only=opening.read_only)
    try:
        base = fingerprint(below)
    except OSError as error:
        raise UserError(f"the base cannot be read: {error.strerror}", opening.parameters.where) from None
    overlay = kept(Path(text), below.size, base, read_only=opening.read_only)
    return Cow(below, overlay, read_only=opening.read_only)


LAYER: Final = Layer(_wrap, frozenset({_NAME}), only_reads=True)
