"""An image in chunks that are files: what is within one of them goes between it and a socket like a file's own bytes.

Only with files that are open already: to open one, and to sync the one that makes room for it, may take its time.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence

from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Place
from nbdshard.server.backends.sharded import ShardedBackend
from nbdshard.server.stores.file import FileStore
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

    def is_direct(self, where: Range) -> bool:
        chunk, part = self._first(where)
        return part.length == where.length and self._files.is_open(self._key_of(chunk))

    @contextlib.contextmanager
    def reading(self, where: Range) -> Iterator[Place | None]:
        chunk, part = self._first(where)
        with self._files.reading(self._key_of(chunk), part) as number:
            yield None if number is None else Place(number, part.start)

    @contextlib.contextmanager
    def writing(self, where: Range) -> Iterator[Place]:
        chunk, part = self._first(where)
        with self._locks.of(chunk):
            self._known.came(chunk)
            with self._files.writing(self._key_of(chunk)) as number:
                yield Place(number, part.start)
            if self._files.is_zero(self._key_of(chunk), part):  # whatever it was before: it changes nothing
                self._clear(chunk, part, fast=False)

    def _first(self, where: Range) -> tuple[int, Range]:
        """The chunk that `where` begins in, and which part of it."""
        size = self._chunk_bytes
        chunk, start = divmod(where.start, size)
        return chunk, Range(start, min(start + where.length, size))
