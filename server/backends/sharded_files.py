"""An image in chunks that are files: what is within one of them goes between it and a socket like a file's own bytes.

What is read is in a file that is open already; to write one is opened, but not where another would have to be closed,
and synced, for it first: that may take its time. One that is closed or deleted while the payload of a WRITE comes is
opened again all the same.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Place
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.stores.file import FileStore, OpenFile, is_zero_part
from nbdshard.server.volumes import Volume


class ShardedFiles(ShardedBackend):
    """`volume` in a directory, as Prompt and Direct."""

    def __init__(self, store: FileStore, volume: Volume, *, read_only: bool = False) -> None:
        super().__init__(store, volume, read_only=read_only)
        self._files = store

    def read_now(self, where: Range) -> Sequence[memoryview] | None:
        chunk, part = self._first(where)
        found = self._files.read_now(self._key_of(chunk), part) if part.length == where.length else None
        return None if found is None else (found,)

    def write_now(self, where: Range, data: memoryview) -> bool:
        chunk, part = self._first(where)
        if part.length < where.length:
            return False
        is_whole_pages = (where.start | where.length) % mmap.PAGESIZE == 0
        if not self._files.is_open(self._key_of(chunk), None if is_whole_pages else part):
            return False  # the rest of a page would have to be read first
        self.write(where, data)
        return True

    def is_direct(self, where: Range, *, to_write: bool) -> bool:
        chunk, part = self._first(where)
        is_at_hand = self._files.may_open if to_write else self._files.is_open
        return part.length == where.length and is_at_hand(self._key_of(chunk))

    @contextlib.contextmanager
    def reading(self, where: Range) -> Iterator[Place | None]:
        chunk, part = self._first(where)
        with self._files.reading(self._key_of(chunk), part) as number:
            yield None if number is None else Place(number, part.start)

    def writing(self, where: Range, *, is_all: bool) -> AbstractContextManager[Place]:
        chunk, part = self._first(where)
        return _Writing(self, chunk, part, is_all=is_all)

    def begin_write(self, chunk: int) -> OpenFile:
        """The file of `chunk`, which nobody else changes until `end_write`, which always follows."""
        self._locks.take(chunk)
        try:
            self._known.came(chunk)
            return self._files.take_to_write(self._key_of(chunk))
        except BaseException:
            self._locks.give(chunk)
            raise

    def end_write(self, chunk: int, file: OpenFile, written: Range | None) -> None:
        """`written`, if it is given, may be zeroes, all of it: whatever it was before, that is the same as nothing."""
        try:
            try:
                is_zero = written is not None and is_zero_part(file.number, written)
            finally:
                self._files.take_back(file)
            if is_zero and written is not None:
                self._clear(chunk, written, fast=False)
        finally:
            self._locks.give(chunk)

    def _first(self, where: Range) -> tuple[int, Range]:
        """The chunk that `where` begins in, and which part of it."""
        size = self._chunk_bytes
        chunk, start = divmod(where.start, size)
        return chunk, Range(start, min(start + where.length, size))


class _Writing:
    """A block in which one chunk is written. Not a generator: there is one for each piece of payload."""

    __slots__ = ("_backend", "_chunk", "_file", "_is_all", "_part")

    def __init__(self, backend: ShardedFiles, chunk: int, part: Range, *, is_all: bool) -> None:
        self._backend, self._chunk, self._part, self._is_all = backend, chunk, part, is_all

    def __enter__(self) -> Place:
        self._file = self._backend.begin_write(self._chunk)
        return Place(self._file.number, self._part.start)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._backend.end_write(self._chunk, self._file, self._part if self._is_all and kind is None else None)
