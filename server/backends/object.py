"""One object of an object store as an image: read by ranges, and put anew, whole, by a flush.

An object cannot be changed in part. What is written goes to an overlay in a local temporary file, and a flush uploads
the image as it is then, in parts: blocks of the overlay, and what is between them from the object itself. The new one
takes the place of the old when the last part is there, and only then has the flush been done. Meanwhile others read and
write: what they write goes to a second overlay, in front of the first::

    between flushes          during one                          after it
    overlay                  overlay 2 (what is written now)     overlay 2
    object                   overlay     --- uploaded -->        object (new)
                             object

Where an upload fails, the second overlay is put into the first, and the next flush uploads both: nothing is lost.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    OBJECT_PART_BYTES_MAX,
    OBJECT_PART_BYTES_MIN,
    OBJECT_PARTS_MAX,
    OBJECT_PARTS_WANTED,
    OBJECT_TRANSFER_BYTES_MAX,
)
from nbdshard.common.nbd.constants import STATE_HOLE, STATE_ZERO, TransmissionFlag
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Hole
from nbdshard.server.layers.cow import Cow
from nbdshard.server.layers.overlay import Overlay, temporary
from nbdshard.server.stores.bucket import Bucket
from nbdshard.server.stores.leases import Lease

_READS: Final = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN  # one object, or one overlay, is behind every connection
)
_PIECE_BYTES: Final = 1 << 20


class WholeObject:
    """The object `key` as it is, which has `size` bytes; `is_there`: not yet, and it reads as zeroes until it is."""

    def __init__(self, bucket: Bucket, key: str, size: int, *, is_there: bool) -> None:
        self.bucket = bucket
        self.key = key
        self.size = size
        self.is_there = is_there
        self.flags = _READS | TransmissionFlag.READ_ONLY
        self.block_size = 1 << 20

    @property
    def losses(self) -> int:
        return 0

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        return (self._get(where),) if self.is_there else (Hole(where.length),)

    def check(self) -> None:
        """Whether it is there, and as long as it should be. Raises OSError."""
        self._get(Range(0, 1))

    def _get(self, where: Range) -> memoryview:
        found = self.bucket.get(self.key, where)
        if found is None or found.size != self.size:
            what = "is gone" if found is None else f"has {found.size} bytes instead of {self.size}"
            raise OSError(errno.EIO, f"{self.key} {what}: somebody else has changed it")
        return found.data

    def write(self, where: Range, data: memoryview) -> None:
        raise OSError(errno.EROFS, "an object is not changed in part")

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        raise OSError(errno.EROFS, "an object is not changed in part")

    def trim(self, where: Range) -> None:
        raise OSError(errno.EROFS, "an object is not changed in part")

    def cache(self, where: Range) -> None:
        return None

    def flush(self) -> None:
        return None

    def extents(self, where: Range) -> Extents:
        return [(where, 0 if self.is_there else STATE_HOLE | STATE_ZERO)]

    def close(self) -> None:
        self.bucket.close()


class ObjectBackend:
    """`whole`, which is its own, with what is written to it. `spool_bytes`: so much goes to an overlay before a write
    has to flush. Raises UserError where the image is too large, or there is no room for an overlay.
    """

    def __init__(self, whole: WholeObject, lease: Lease, spool_bytes: int) -> None:
        self.size = whole.size
        self._whole = whole
        self._lease = lease
        self._spool_bytes = spool_bytes
        self._part_bytes = _part_bytes(whole)
        self._overlays = [temporary(whole.size)]  # the one that is written to is last; two while one is uploaded
        self._images: list[Backend] = [Cow(whole, self._overlays[0])]
        self._spooled = 0  # bytes of data that the last overlay may hold
        self._counting = threading.Lock()
        self._is_dirty = not whole.is_there
        self._gate = _Gate()
        self._flushing = threading.Lock()

    @property
    def flags(self) -> TransmissionFlag:
        return self._images[-1].flags

    @property
    def block_size(self) -> int:
        return self._whole.block_size

    @property
    def losses(self) -> int:
        return self._lease.losses

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        with self._gate.passing():
            return self._images[-1].read(where)

    def write(self, where: Range, data: memoryview) -> None:
        with self._changing(where, takes_room=True):
            self._images[-1].write(where, data)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        with self._changing(where, takes_room=not may_punch):
            self._images[-1].zero(where, may_punch=may_punch, fast=fast)

    def trim(self, where: Range) -> None:
        with self._changing(where, takes_room=False):
            self._images[-1].trim(where)

    def cache(self, where: Range) -> None:
        return None

    def extents(self, where: Range) -> Extents:
        with self._gate.passing():
            return self._images[-1].extents(where)

    def flush(self) -> None:
        with self._flushing:
            self._upload()

    def close(self) -> None:
        self._lease.release()
        self._whole.close()
        for overlay in self._overlays:
            overlay.close()

    @contextlib.contextmanager
    def _changing(self, where: Range, *, takes_room: bool) -> Iterator[None]:
        self._lease.check()
        room = where.length if takes_room else 0
        if self._spooled + room > self._spool_bytes:
            with self._flushing:
                if self._spooled + room > self._spool_bytes:  # nobody else has done it meanwhile
                    self._upload()
        with self._gate.passing():
            self._is_dirty = True
            if takes_room:
                with self._counting:
                    self._spooled += self._new_bytes(where)
            yield

    def _new_bytes(self, where: Range) -> int:
        """What a write there adds to the overlay, which has whole blocks only."""
        overlay = self._overlays[-1]
        block = overlay.block_bytes
        blocks = Range(where.start // block * block, -(-where.end // block) * block)
        return sum(run.length for run, is_here in overlay.runs(blocks) if not is_here)

    # -- a flush, one at a time ---------------------------------------------------------------------------------------

    def _upload(self) -> None:
        self._lease.check()
        if len(self._overlays) > 1:
            self._put_together()
        if not self._is_dirty:
            return
        image = self._images[0]
        self._begin()
        try:
            at_once = max(min(OBJECT_TRANSFER_BYTES_MAX // self._part_bytes, 4), 1)
            self._whole.bucket.upload(self._whole.key, self._pieces(image), self._part_bytes, at_once)
            self._lease.check()
            self._whole.check()
        except BaseException:
            self._is_dirty = True
            self._put_together()
            raise
        self._end()

    def _pieces(self, image: Backend) -> Iterator[bytes | memoryview]:
        at = 0
        while at < self.size:
            where = Range(at, min(at + _PIECE_BYTES, self.size))
            self._lease.check()
            for part in image.read(where):
                yield bytes(part.length) if isinstance(part, Hole) else part
            at = where.end

    def _begin(self) -> None:
        """From now on what is written goes to a second overlay."""
        overlay = _new_overlay(self.size)
        with self._gate.alone():
            self._overlays.append(overlay)
            self._images.append(Cow(self._images[0], overlay))
            self._spooled, self._is_dirty = 0, False

    def _end(self) -> None:
        """The object has what the first overlay had."""
        with self._gate.alone():
            self._whole.is_there = True
            old = self._overlays.pop(0)
            self._images = [Cow(self._whole, self._overlays[0])]
        old.close()

    def _put_together(self) -> None:
        """The second overlay becomes part of the first. Where that fails both stay, and are tried again."""
        first, second = self._overlays
        with self._gate.alone():
            for run, is_here in second.runs(Range(0, self.size)):
                for where in _cut(run) if is_here else ():
                    first.write(where, second.read(where))
                    first.add(range(where.start // first.block_bytes, -(-where.end // first.block_bytes)))
            held = sum(run.length for run, is_here in first.runs(Range(0, self.size)) if is_here)
            self._spooled = min(held, self._spool_bytes // 2)
            self._overlays.pop()
            self._images.pop()
        second.close()


def _cut(where: Range) -> Iterator[Range]:
    at = where.start
    while at < where.end:
        end = min(at + _PIECE_BYTES, where.end)
        yield Range(at, end)
        at = end


def _part_bytes(whole: WholeObject) -> int:
    """A store takes so many parts and no more; few are wanted, and small ones, because some are in memory."""
    wanted = -(-whole.size // OBJECT_PARTS_WANTED)
    found = min(max(-(-wanted // _PIECE_BYTES) * _PIECE_BYTES, OBJECT_PART_BYTES_MIN), OBJECT_PART_BYTES_MAX)
    if -(-whole.size // found) > OBJECT_PARTS_MAX:
        raise UserError(f"{whole.size} bytes are too many for one object", whole.key, "use the driver sharded")
    return found


def _new_overlay(size: int) -> Overlay:
    try:
        return temporary(size)
    except UserError as error:
        raise OSError(errno.ENOSPC, str(error)) from None


class _Gate:
    """Many pass at a time, or one is alone, for a moment: who wants to be lets nobody pass who comes later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passing = 0
        self._is_closed = False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._passing += 1
        try:
            yield
        finally:
            with self._changed:
                self._passing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._passing)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()
