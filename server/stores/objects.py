"""An object store as a store of chunks: S3 and its like. An object is only ever put whole.

So a write to a part of a chunk reads the rest of it first, unless all of it is written; nobody else writes the chunk
meanwhile, because the driver sees to it on this server, and a lease (`leases.py`) that there is no other one. A write
is acknowledged when the object is put, which is durable: a flush has nothing left to do.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from typing import Final

from nbdshard.common import logs
from nbdshard.common.limits import (
    LISTING_PAUSE_SECONDS,
    LISTING_WAIT_SECONDS,
    OBJECT_READS_AT_ONCE,
    OBJECT_TRANSFER_BYTES_MAX,
    OBJECT_WAIT_SECONDS,
    OBJECT_WRITES_AT_ONCE,
    VOLUME_CHUNK_BYTES_MAX,
)
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.ranges import Range
from nbdshard.server.backends.chunk_map import ChunkMap
from nbdshard.server.stores.bucket import Bucket
from nbdshard.server.stores.leases import Lease
from nbdshard.server.volumes import Volume

_PROBE_BYTES: Final = 4096
_ZEROES: Final = bytes(64 * 1024)


class ObjectStore:
    """The objects of `bucket`. `can_list`: its listings are to be trusted; else each chunk is looked for by itself."""

    def __init__(self, bucket: Bucket, *, read_only: bool = False, steal: bool = False, can_list: bool = True) -> None:
        self._bucket = bucket
        self._read_only = read_only
        self._steal = steal
        self.can_list = can_list
        self._lease: Lease | None = None
        self._volume: Volume | None = None
        self._reads = _Places(OBJECT_READS_AT_ONCE)
        self._writes = _Places(OBJECT_WRITES_AT_ONCE)
        self._merges = _Places(OBJECT_WRITES_AT_ONCE // 2)  # that read first: what came is in memory, too
        self._lock = threading.Lock()  # of these three
        self._there = ChunkMap()  # chunks that are there, or were when they were looked for
        self._gone = ChunkMap()  # chunks that are not: it is we who deleted them
        self._is_listed = threading.Event()
        self._listed_by = 0.0  # until then block status waits for that
        self._is_closing = threading.Event()

    def track(self, volume: Volume) -> None:
        """Its chunks are what is asked for from now on. Begins to list them."""
        self._volume = volume
        places = max(OBJECT_TRANSFER_BYTES_MAX // volume.chunk_bytes, 1)
        self._reads = _Places(min(OBJECT_READS_AT_ONCE, places))
        self._writes = _Places(min(OBJECT_WRITES_AT_ONCE, places))
        self._merges = _Places(max(self._writes.count // 2, 1))
        if self.can_list:
            self._listed_by = time.monotonic() + LISTING_WAIT_SECONDS
            threading.Thread(target=self._list, args=(volume,), daemon=True).start()

    @property
    def losses(self) -> int:
        return 0 if self._lease is None else self._lease.losses

    def read(self, key: str, where: Range) -> memoryview | None:
        if self._is_gone(key):
            return None
        with self._reads.one():
            found = self._bucket.get(key, where)
        return None if found is None else found.data

    def write(self, key: str, where: Range, data: memoryview) -> None:
        if where.start == 0 and where.length == self._length(key):
            with self._writes.one():
                self._put(key, data)
            return
        with self._merges.one(), self._writes.one():
            old = self._whole(key) or memoryview(b"")
            gap = bytes(max(where.start - len(old), 0))
            self._put(key, old[: where.start], gap, data, old[where.end :])

    def put(self, key: str, data: bytes, *, is_new: bool) -> None:
        with self._writes.one():
            if not is_new:
                self._put(key, data)
                return
            self._may_write()
            if not self._bucket.create(key, data):
                raise FileExistsError(errno.EEXIST, f"{key} is there already")

    def zero(self, key: str, where: Range, *, fast: bool = False) -> bool:
        if fast:
            if self.read(key, Range(0, 1)) is None:
                return False
            raise OSError(errno.ENOTSUP, "zeroes in a part of a chunk take as long as data there")
        with self._merges.one(), self._writes.one():
            old = self._whole(key)
            if old is None:
                return False
            if where.start >= len(old):
                return not _is_zero(old)
            before, behind = old[: where.start], old[where.end :]
            if _is_zero(before) and _is_zero(behind):
                return False
            self._put(key, before, bytes(where.length if behind else 0), behind)
            return True

    def cut(self, key: str, length: int) -> None:
        with self._merges.one(), self._writes.one():
            old = self._whole(key)
            if old is not None and len(old) > length:
                self._put(key, old[:length])

    def delete(self, key: str) -> bool:
        if self._is_gone(key):
            return False
        with self._writes.one():
            self._may_write()
            self._bucket.delete(key)
        number = self._number(key)
        if number is not None:
            with self._lock:
                self._gone.add(number)
                self._there.discard(number)
        return True  # as far as is known: a store does not say

    def sync(self) -> None:
        """Everything is durable already, unless somebody else writes here, too."""
        if self._lease is not None:
            self._lease.check()

    def extents(self, key: str, where: Range) -> Extents | None:
        """A chunk is all data, or not there: what of it is zeroes would have to be read."""
        number = self._number(key)
        if number is None or not self.can_list:
            with self._reads.one():
                found = self._bucket.get(key, Range(0, 1))
            return None if found is None else [(where, 0)]
        if not self._knows(number):
            self._is_listed.wait(max(self._listed_by - time.monotonic(), 0.0))
        with self._lock:
            if number in self._gone or (self._is_listed.is_set() and number not in self._there):
                return None
        return [(where, 0)]  # also where it is not known yet

    def keys(self) -> Iterator[str]:
        return (key for key, _ in self.stored())

    def stored(self) -> Iterator[tuple[str, int]]:
        for page in self._bucket.stored("", lambda _: True):
            yield from ((key, size) for key, size in page if "/" not in key)

    def claim(self, key: str, *, alone: bool) -> None:
        """Until `close` no other server writes what `key` stands for. Raises UserError where one does."""
        if alone:
            self._lease = Lease(self._bucket, key, steal=self._steal)

    def close(self) -> None:
        self._is_closing.set()
        if self._lease is not None:
            self._lease.release()
        self._bucket.close()

    # -- objects ------------------------------------------------------------------------------------------------------

    def _may_write(self) -> None:
        """Asked right before each call that changes something: what was read for it may have taken its time."""
        if self._read_only:
            raise OSError(errno.EROFS, "the store was opened to be read")
        if self._lease is not None:
            self._lease.check()

    def _whole(self, key: str) -> memoryview | None:
        if self._is_gone(key):
            return None
        length = self._length(key)
        found = self._bucket.get(key, Range(0, length))
        if found is None:
            return None
        if found.size > length:
            raise OSError(errno.EIO, f"{key} has {found.size} bytes, and a chunk {length}")
        return found.data

    def _put(self, key: str, *pieces: bytes | memoryview) -> None:
        """The object is these from now on, one behind the other. None of them is copied: each may be a chunk long."""
        self._may_write()
        number = self._number(key)
        if number is not None:
            with self._lock:  # before: who asks in between must not be told that there is nothing
                self._there.add(number)
                self._gone.discard(number)
        self._bucket.put(key, *pieces)

    def _length(self, key: str) -> int:
        """How many bytes the object may have."""
        number = self._number(key)
        if self._volume is None or number is None:
            return VOLUME_CHUNK_BYTES_MAX
        return max(min(self._volume.chunk_bytes, self._volume.size - number * self._volume.chunk_bytes), 0)

    # -- what is there ------------------------------------------------------------------------------------------------

    def _number(self, key: str) -> int | None:
        return None if self._volume is None else self._volume.number_of(key)

    def _is_gone(self, key: str) -> bool:
        number = self._number(key)
        if number is None:
            return False
        with self._lock:
            return number in self._gone

    def _knows(self, number: int) -> bool:
        with self._lock:
            return self._is_listed.is_set() or number in self._there or number in self._gone

    def _list(self, volume: Volume) -> None:
        """Until all chunks are listed; again and again where that fails."""
        is_told = False
        while not self._is_closing.is_set():
            try:
                for page in self._bucket.stored(volume.before, lambda key: key.startswith(volume.before)):
                    numbers = [volume.number_of(key) for key, _ in page]
                    with self._lock:
                        for number in numbers:
                            if number is not None and number * volume.chunk_bytes < volume.size:
                                self._there.add(number)
                    if self._is_closing.is_set():
                        return
            except OSError as error:
                if not is_told:
                    logs.warning(f"{error.strerror}; until that succeeds, everything is called data")
                is_told = True
                self._is_closing.wait(LISTING_PAUSE_SECONDS)
            else:
                self._is_listed.set()
                return


class _Places:
    """So many calls are under way at a time; others wait their turn."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = threading.BoundedSemaphore(count)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        if not self._free.acquire(timeout=OBJECT_WAIT_SECONDS):
            raise OSError(errno.EIO, f"the object store has not taken a request for {OBJECT_WAIT_SECONDS:g} s")
        try:
            yield
        finally:
            self._free.release()


def _is_zero(view: memoryview) -> bool:
    if any(view[at] for at in range(len(view) - 1, -1, -_PROBE_BYTES)):  # data shows itself at once
        return False
    return all(
        bytes(view[at : at + len(_ZEROES)]) == _ZEROES[: len(view) - at] for at in range(0, len(view), len(_ZEROES))
    )
