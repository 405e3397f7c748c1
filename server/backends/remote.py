"""An export of another NBD server, of whatever make, as an export: over a few connections that all threads share.

A connection that is lost is made anew by whoever needs one; what was not answered then is asked again, a flush only
where nothing is lost. What was acknowledged and not flushed may be gone with the other server's life. It is not, where
its hint `instance` is the same as before, and it CAN_MULTI_CONN (`common/nbd/hints.py`). Where that cannot be shown,
`losses` grows, and no flush succeeds any more: nobody here knows which of several clients have been told.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Final
from urllib.parse import quote

from nbdshard.common import logs
from nbdshard.common.blocking import Deadline, Timeouts, open_export
from nbdshard.common.errors import ConnectionLost, NbdshardError, RequestError, TimedOut, UserError
from nbdshard.common.limits import (
    CONNECT_SECONDS,
    EXTRA_LINK_SECONDS,
    FLUSH_BYTES_PER_SECOND,
    FLUSH_SECONDS,
    HANDSHAKE_SECONDS,
    LINK_REQUEST_SECONDS,
    LINK_RETRY_SECONDS,
    LINKS,
    LINKS_MAX,
    MIB,
    REMOTE_PIECE_BYTES,
    REMOTE_RANGE_BYTES,
    REQUEST_SECONDS_PER_MIB,
)
from nbdshard.common.nbd.client import Client, Done
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import BASE_ALLOCATION, Errno, TransmissionFlag
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.extents import Extents
from nbdshard.common.nbd.uri import NbdUri, parse_uri
from nbdshard.common.ranges import Range
from nbdshard.server.backends.acknowledged import Acknowledged
from nbdshard.server.backends.aligned import Aligned
from nbdshard.server.backends.base import WRITES, Backend
from nbdshard.server.backends.link import Link, Queue
from nbdshard.server.device import Hole
from nbdshard.server.opening import Opener, Opening

_PASSED: Final = (
    TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.SEND_CACHE
)
_ERRNOS: Final[Mapping[str, int]] = MappingProxyType({each.name: int(each) for each in Errno})


class RemoteBackend:
    """The export at `uri`. Opens at once; raises UserError where there is none, or it cannot be used.

    All ranges are to be multiples of `minimum`, in bytes: see Aligned.
    """

    def __init__(self, uri: NbdUri, *, read_only: bool = False, links_max: int = LINKS) -> None:
        self._uri = uri
        self._peer = str(uri)
        self._acknowledged = Acknowledged()
        self._links: list[Link] = []
        self._state = threading.Lock()  # of the links
        self._connecting = threading.Lock()
        self._is_told = False  # the log knows of a loss
        self._refused: tuple[float, NbdshardError] | None = None  # when and why there was no connection
        try:
            first = self._open(Timeouts())
        except NbdshardError as error:
            raise UserError(str(error)) from None
        self._export = first.export
        self._tries = links_max + 2  # of one request: all connections may be lost at once, and be noticed one by one
        self._links_max = links_max if first.export.flags & TransmissionFlag.CAN_MULTI_CONN else 1
        self.minimum = first.export.block_sizes.minimum
        if first.export.size % self.minimum:
            first.close()
            what = f"takes requests in multiples of {self.minimum} bytes only, and has {first.export.size}"
            raise UserError(what, self._peer, "nobody can read its end")
        self._links = [first, *self._more(first)]
        self.size = first.export.size
        self.flags = _flags(first.export.flags, read_only=read_only)
        self.block_size = max(512, first.export.block_sizes.preferred)

    @property
    def losses(self) -> int:
        return 1 if self._acknowledged.lost else 0

    # -- calls --------------------------------------------------------------------------------------------------------

    def read(self, where: Range) -> Sequence[memoryview | bytes | Hole]:
        view = memoryview(bytearray(where.length))
        for piece in self._pieces(where):
            into = view[piece.start - where.start : piece.end - where.start]
            self._call("reading", piece, partial(_read, piece, into))
        return (view,)

    def write(self, where: Range, data: memoryview) -> None:
        def pieces() -> None:
            for piece in self._pieces(where):
                part = data[piece.start - where.start : piece.end - where.start]
                self._call("writing", piece, partial(_write, piece, part))

        self._change(pieces, where.length)

    def zero(self, where: Range, *, may_punch: bool, fast: bool) -> None:
        flags = self._export.flags
        if fast and not flags & TransmissionFlag.SEND_FAST_ZERO:
            raise OSError(errno.ENOTSUP, "the other server does not say whether zeroes are fast")
        if not flags & TransmissionFlag.SEND_WRITE_ZEROES:
            for part in where.split(REMOTE_PIECE_BYTES):
                self.write(part, memoryview(bytes(part.length)))
            return

        def ask(piece: Range, client: Client, handle: int) -> None:
            nonlocal fast
            client.write_zeroes(handle, piece, no_hole=not may_punch, fast_zero=fast)
            fast = False  # what was asked once may have been done, whatever became of the answer: too late to say no

        self._change_ranges("zeroing", where, ask)

    def trim(self, where: Range) -> None:
        if self._export.flags & TransmissionFlag.SEND_TRIM:  # else it is a hint that cannot be followed
            self._change_ranges("trimming", where, _trim)

    def cache(self, where: Range) -> None:
        if self._export.flags & TransmissionFlag.SEND_CACHE:
            for piece in where.split(REMOTE_RANGE_BYTES):
                self._call("caching", piece, partial(_cache, piece), payload=False)

    def extents(self, where: Range) -> Extents:
        if BASE_ALLOCATION not in self._export.contexts:
            return [(where, 0)]
        piece = next(where.split(REMOTE_RANGE_BYTES))
        try:
            done = self._call("mapping", piece, partial(_block_status, piece), payload=False)
        except _Refused:
            return [(where, 0)]  # what is not known is data
        return done.extents or [(piece, 0)]

    def flush(self) -> None:
        """What was acknowledged before is durable; or may be lost, and then this and every later flush fails."""
        acknowledged = self._acknowledged
        covered = acknowledged.covered()
        seconds = FLUSH_SECONDS + acknowledged.bytes_unflushed / FLUSH_BYTES_PER_SECOND
        deadline = Deadline(self._peer, "flushing", seconds)
        for _ in range(self._tries):
            link = self._link(deadline)
            self._tell_loss()
            if not self._export.flags & TransmissionFlag.SEND_FLUSH:
                return  # and none was promised
            try:
                failure: NbdshardError | None = link.ask(_flush, deadline).error
            except NbdshardError as error:
                failure = error
                self._drop(link)
            if failure is None:
                break
            acknowledged.flush_failed(str(failure), has_lives=bool(self._export.hints.instance))
            if isinstance(failure, TimedOut) or not isinstance(failure, ConnectionLost):
                raise _as_os_error(failure)
            # It was lost with its connection. Asked on another one, it is told if anything else was.
        else:
            raise OSError(errno.ENOTCONN, f"{self._peer}: its connections are lost again and again")
        acknowledged.flushed(covered)
        self._tell_loss()

    def close(self) -> None:
        with self._state:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def _pieces(self, where: Range) -> Iterator[Range]:
        """What one READ or WRITE may have: the other server's maximum, and ours."""
        maximum = min(self._export.block_sizes.maximum, REMOTE_PIECE_BYTES)
        return where.split(maximum - maximum % self.minimum)

    def _call(self, doing: str, where: Range, queue: Queue, *, payload: bool = True) -> Done:
        """Ask, again on another connection where one is lost. Raises OSError."""
        seconds = LINK_REQUEST_SECONDS + (REQUEST_SECONDS_PER_MIB * where.length / MIB if payload else 0)
        deadline = Deadline(self._peer, f"{doing} {where}", seconds)
        failure: NbdshardError
        for _ in range(self._tries):
            link = self._link(deadline)
            try:
                done = link.ask(queue, deadline)
            except NbdshardError as error:
                failure = error
                self._drop(link)
                if isinstance(error, TimedOut) or not isinstance(error, ConnectionLost):
                    break  # it may still be done: whoever asks again has to know
            else:
                if done.error is None:
                    return done
                if done.error.errno_name != Errno.ESHUTDOWN.name:
                    raise _Refused(_number_of(done.error), str(done.error))
                failure = done.error
        raise _as_os_error(failure)

    def _change_ranges(self, doing: str, where: Range, request: Callable[[Range, Client, int], None]) -> None:
        """A change without payload."""

        def pieces() -> None:
            for piece in where.split(REMOTE_RANGE_BYTES):
                self._call(doing, piece, partial(request, piece), payload=False)

        self._change(pieces, 0)

    def _change(self, ask: Callable[[], None], length: int) -> None:
        """`ask` for it, all of it in one life of the server: what is acknowledged in an earlier one may be gone."""
        number = self._acknowledged.begin(length)
        try:
            for _ in range(2):
                life = self._acknowledged.life
                ask()
                if self._acknowledged.answered(number, life):
                    return
        finally:
            self._acknowledged.end(number)
        raise OSError(errno.ENOTCONN, f"{self._peer}: it was started again and again")

    def _tell_loss(self) -> None:
        if why := self._acknowledged.lost:
            sentence = f"{self._peer} may have lost what it acknowledged: {why}"
            if not self._is_told:
                logs.warning(sentence)
            self._is_told = True
            raise OSError(errno.EIO, sentence)

    # -- connections --------------------------------------------------------------------------------------------------

    def _link(self, deadline: Deadline) -> Link:
        """The connection with the fewest requests, made anew if there is none. Raises OSError."""
        try:
            found = self._best()
            if found is None:
                if not self._connecting.acquire(timeout=deadline.left()):
                    raise deadline.over()
                try:
                    found = self._best() or self._reconnected(deadline)
                finally:
                    self._connecting.release()
        except NbdshardError as error:
            raise _as_os_error(error) from None
        return found

    def _best(self) -> Link | None:
        with self._state:
            leaving = [link for link in self._links if self._acknowledged.is_in_doubt or not link.is_usable]
            self._links = [link for link in self._links if link not in leaving]
            found = min(self._links, key=lambda link: link.pending, default=None)
        _part_from(leaving)
        return found

    def _reconnected(self, deadline: Deadline) -> Link:
        """Who is here is the only one, and no connection is left. As long as one is, the server's life goes on."""
        if self._refused is not None and time.monotonic() - self._refused[0] < LINK_RETRY_SECONDS:
            raise self._refused[1]
        left = deadline.left()
        try:
            first = self._open(Timeouts(min(left, CONNECT_SECONDS), min(left, HANDSHAKE_SECONDS)))
        except NbdshardError as error:
            self._refused = (time.monotonic(), error)
            raise
        self._refused = None
        old, new = self._export, first.export
        if (old.size, old.flags, old.block_sizes) != (new.size, new.flags, new.block_sizes):
            first.close()
            raise ConnectionLost(self._peer, "connecting again", "it is not the same export any more")
        self._acknowledged.connected(is_same_life=_is_same_life(old, new))
        self._export = new
        more = self._more(first)
        with self._state:
            self._links = [first, *more]
        logs.info(f"{self._peer}: connected again")
        return first

    def _open(self, timeouts: Timeouts) -> Link:
        connection, export = open_export(self._uri, self._peer, Wishes(self._uri.export_name, hints=True), timeouts)
        return Link(connection, export, self._peer)

    def _more(self, first: Link) -> list[Link]:
        """Further connections; a server may say that it admits several, and admit fewer."""
        found: list[Link] = []
        while len(found) + 1 < self._links_max:
            try:
                link = self._open(Timeouts(EXTRA_LINK_SECONDS, EXTRA_LINK_SECONDS))
            except NbdshardError as error:
                logs.info(f"{self._peer}: {len(found) + 1} of {self._links_max} connections: {error}")
                break
            if link.export.hints.instance != first.export.hints.instance:
                link.close()
                break
            found.append(link)
        return found

    def _drop(self, link: Link) -> None:
        link.fail(ConnectionLost(self._peer, "idle", "it is not used any more"))
        with self._state:
            self._links = [each for each in self._links if each is not link]


def _part_from(links: Sequence[Link]) -> None:
    """What is still asked there is answered first."""
    for link in links:
        threading.Thread(target=link.close, daemon=True).start()


class _Refused(OSError):
    """The other server's own error."""


def _read(where: Range, into: memoryview, client: Client, handle: int) -> None:
    client.read(handle, where, into)


def _write(where: Range, data: memoryview, client: Client, handle: int) -> None:
    client.write(handle, where, [data])


def _trim(where: Range, client: Client, handle: int) -> None:
    client.trim(handle, where)


def _cache(where: Range, client: Client, handle: int) -> None:
    client.cache(handle, where)


def _block_status(where: Range, client: Client, handle: int) -> None:
    client.block_status(handle, where)


def _flush(client: Client, handle: int) -> None:
    client.flush(handle)


def _flags(flags: TransmissionFlag, *, read_only: bool) -> TransmissionFlag:
    """Ours. A flush covers all clients: they share one connection, or several of which a flush of one covers all."""
    found = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_DF | TransmissionFlag.CAN_MULTI_CONN | flags & _PASSED
    if flags & TransmissionFlag.SEND_FLUSH:
        found |= TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    if read_only or flags & TransmissionFlag.READ_ONLY:
        found = found & ~WRITES | TransmissionFlag.READ_ONLY
    return found


def _is_same_life(old: Export, new: Export) -> bool:
    """Whether what `old` acknowledged is there for certain."""
    multi = old.flags & new.flags & TransmissionFlag.CAN_MULTI_CONN
    return bool(multi and old.hints.instance) and old.hints.instance == new.hints.instance


def _number_of(error: RequestError) -> int:
    return _ERRNOS.get(error.errno_name, errno.EIO)


def _as_os_error(error: NbdshardError) -> OSError:
    number = errno.EPROTO
    if isinstance(error, RequestError):
        number = _number_of(error)
    elif isinstance(error, TimedOut):
        number = errno.ETIMEDOUT
    elif isinstance(error, ConnectionLost | UserError):  # the export may not be there yet
        number = errno.ENOTCONN
    return OSError(number, str(error))


def opener(scheme: str) -> Opener:
    """Of the store that is called like the scheme of its URIs: nbd://... is itself a CONN, and so is nbd:nbd://..."""

    def open_it(opening: Opening) -> Backend:
        """What is special in the place has been decoded; a `socket` in the URI is one of the parameters."""
        text = quote(opening.place, safe="/:[]@+", errors="surrogateescape")
        if text.startswith("//"):
            text = f"{scheme}:{text}"
        if (path := opening.parameters.text("socket")) is not None:
            text += f"?socket={quote(path, errors='surrogateescape')}"
        links_max = opening.parameters.count("connections", 1, LINKS_MAX)
        found = RemoteBackend(parse_uri(text), read_only=opening.read_only, links_max=links_max or LINKS)
        return found if found.minimum == 1 else Aligned(found, found.minimum)

    return Opener(open_it, frozenset({"socket", "connections"}))
