"""The calls that are made of an object store, by obstore: one try each with few repeats, in bounded time.

obstore itself would try for three minutes. How patient to be is for the layer `retry` to say; here only what a network
does all the time is tried again at once.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
import obstore
from obstore.store import ObjectStore as Client

from nbdshard.common.limits import OBJECT_CONNECT_SECONDS, OBJECT_RETRIES_MAX, OBJECT_RETRY_SECONDS
from nbdshard.common.ranges import Range
from nbdshard.server.stores.object_errors import is_beyond_the_end, is_missing, is_taken, told

if TYPE_CHECKING:  # obstore has these as stubs only
    from obstore.store import ClientConfig, RetryConfig


def client_options(seconds: float, *, plain: bool) -> ClientConfig:
    """For a store whose calls may take `seconds` each; `plain`: over HTTP without TLS."""
    return {
        "timeout": timedelta(seconds=seconds),
        "connect_timeout": timedelta(seconds=min(seconds, OBJECT_CONNECT_SECONDS)),
        "allow_http": plain,
    }


def retry_config() -> RetryConfig:
    """What is tried again below us, and for how long."""
    return {"max_retries": OBJECT_RETRIES_MAX, "retry_timeout": timedelta(seconds=OBJECT_RETRY_SECONDS)}


class Found(msgspec.Struct, frozen=True):
    """What a range of an object holds, the whole object's size, and when it was put, by the store's clock."""

    data: memoryview
    size: int
    modified: datetime | None


class _Contradiction(OSError):
    """Two things that the store said of one object do not go together."""


class Bucket:
    """The objects below one prefix. Every error is an OSError that says what was done, and nothing secret.

    `call_seconds`: how long a call may take, repeats included.
    """

    def __init__(self, client: Client, call_seconds: float) -> None:
        self._client: Client | None = client
        self.call_seconds = call_seconds

    def close(self) -> None:
        """Let go of its connections, when nothing is under way any more. Nothing is asked after that."""
        self._client = None

    def _open(self) -> Client:
        if self._client is None:
            raise OSError(errno.EIO, "the object store is closed")
        return self._client

    def get(self, key: str, where: Range) -> Found | None:
        """What of `where` the object has; None where there is none."""
        for _ in range(OBJECT_RETRIES_MAX):
            with contextlib.suppress(_Contradiction):  # the object may just have become another one: ask again
                return self._get(key, where)
        return self._get(key, where)

    def _get(self, key: str, where: Range) -> Found | None:
        doing = f"reading {key}"
        try:
            result = obstore.get(self._open(), key, options={"range": (where.start, where.end)})
            found = Found(memoryview(result.bytes()), result.meta["size"], result.meta["last_modified"])
        except Exception as error:
            if is_missing(error):
                return None
            if is_beyond_the_end(error):
                return self._nothing_of(key, where)
            raise _told(error, doing) from None
        if len(found.data) != min(found.size, where.end) - where.start:
            raise _Contradiction(errno.EIO, f"{doing}: the object store answered with another length")
        return found

    def _nothing_of(self, key: str, where: Range) -> Found | None:
        """What an object has of a range that is said to be beyond its end; zeroes only if the store stays with it."""
        try:
            found = obstore.head(self._open(), key)
        except FileNotFoundError:  # it was there a moment ago
            return None
        except Exception as error:
            raise _told(error, f"reading {key}") from None
        if found["size"] > where.start:
            raise _Contradiction(errno.EIO, f"reading {key}: the object store finds nothing where the object has bytes")
        return Found(memoryview(b""), found["size"], found["last_modified"])

    def put(self, key: str, *pieces: bytes | memoryview) -> None:
        """Make them the object, one behind the other, whole or not at all.

        They are not copied, and may be held for a moment when a call has failed: nobody changes them any more.
        """
        with _telling(f"writing {key}"):
            obstore.put(self._open(), key, iter(pieces), use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Make it the object unless there is one; whether that was done."""
        try:
            obstore.put(self._open(), key, data, mode="create", use_multipart=False)
        except Exception as error:
            if is_taken(error):
                return False
            raise _told(error, f"writing {key}") from None
        return True

    def upload(self, key: str, pieces: Iterator[memoryview | bytes], part_bytes: int, at_once: int) -> None:
        """Put an object in parts, of which `at_once` are on their way. It is there when the last one is.

        What goes wrong in `pieces` is raised as it is. Parts of an upload that fails stay in the store, unseen, until
        it clears them away: obstore has no call for it.
        """
        with _telling(f"writing {key}"):
            writer = obstore.open_writer(self._open(), key, buffer_size=part_bytes, max_concurrency=at_once)
        for piece in pieces:
            with _telling(f"writing {key}"):
                count = writer.write(piece)
            if count != len(piece):
                raise OSError(errno.EIO, f"writing {key}: {count} bytes of {len(piece)} were taken")
        with _telling(f"writing {key}"):
            writer.close()

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none."""
        try:
            obstore.delete(self._open(), key)
        except Exception as error:
            if not is_missing(error):
                raise _told(error, f"deleting {key}") from None

    def stored(self, after: str, is_wanted: Callable[[str], bool]) -> Iterator[list[tuple[str, int]]]:
        """Pages of keys and sizes behind `after`, in the order of the keys' bytes, until one is not wanted."""
        with _telling("listing objects"):
            for page in obstore.list(self._open(), offset=after or None, chunk_size=1000):
                wanted = [(each["path"], each["size"]) for each in page if is_wanted(each["path"])]
                yield wanted
                if len(wanted) < len(page):
                    return


@contextlib.contextmanager
def _telling(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _told(error, doing) from None


def _told(error: Exception, doing: str) -> OSError:
    return error if isinstance(error, OSError) and error.errno else told(error, doing)
