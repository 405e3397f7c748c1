"""A local file or block device as one side of a copy."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial

import msgspec

from nbdshard.common.errors import BugError, RequestError, TimedOut, UserError
from nbdshard.common.file_calls import NEVER, zero_device, zero_file
from nbdshard.common.file_map import FileMap
from nbdshard.common.limits import (
    BLOCK_BYTES_MAX_DEFAULT,
    FILE_OPERATIONS_MAX,
    MIB,
    REQUEST_SECONDS,
    REQUEST_SECONDS_PER_MIB,
)
from nbdshard.common.messages import EndpointDescription, Side
from nbdshard.common.ranges import Range
from nbdshard.common.ring import Kind, Operation, Splice
from nbdshard.worker.lane_ends import FileSource, FileTarget
from nbdshard.worker.lending import LaneAge, LanePort, LaneSource, LaneTarget, Lendable
from nbdshard.worker.local import Life, LocalConnection, Request, Task, refusal
from nbdshard.worker.page_cache import PageCache
from nbdshard.worker.piped import PipedPayload, PipeRun
from nbdshard.worker.ports import Extents, Payload

_PREFERRED_DEFAULT = 4096
# The pipe is full: from an offset inside a page, 1 MiB takes one slot more than it has. Or nothing of this file system
# can be spliced.
_INTO_MEMORY = (-errno.EAGAIN, -errno.EINVAL)
_NO_ZEROES = refusal(errno.EOPNOTSUPP, "the file system or device cannot make zeroes")


class _Opened(msgspec.Struct, frozen=True):
    """An open file, and what was found out about it."""

    number: int
    is_device: bool
    description: EndpointDescription


class FileConnection(LocalConnection, Lendable):
    """A regular file or block device, read and written by position through the ring.

    The file is neither created, claimed nor resized here, which is the coordinator's part, and must still be the inode
    that the coordinator saw. A destination's size is not a bound: it may be set after this connection opened.
    """

    _opened_file: _Opened | None = None
    _page_cache: PageCache | None = None
    _knows_extents = True
    _refused: frozenset[bool] = frozenset()  # the ways to zero (allocated or not) that were refused for good

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._call(partial(_open_file, self.peer, self.address.identity, self.side), self._found)

    def _found(self, outcome: _Opened | UserError | OSError) -> None:
        if isinstance(outcome, OSError):
            self._not_opened(UserError(f"cannot be opened: {outcome.strerror}", self.peer))
        elif isinstance(outcome, UserError):
            self._not_opened(outcome)
        else:
            self._opened_file = outcome
            self._page_cache = PageCache(outcome.number, self._hint)
            self._file_map = FileMap(outcome.number)
            self._opened(outcome.description, self._ring.attach(outcome.number, is_socket=False))

    @property
    def _file(self) -> _Opened:
        if self._opened_file is None:
            raise BugError(f"{self.peer} is not open")
        return self._opened_file

    @property
    def _map(self) -> FileMap:
        if self._file_map is None:
            raise BugError(f"{self.peer} is not open")
        return self._file_map

    @property
    def _cache(self) -> PageCache:
        if self._page_cache is None:
            raise BugError(f"{self.peer} is not open")
        return self._page_cache

    def _may_leave(self) -> bool:
        if self._lane is not None:
            self._lane.stop()
            return False
        self._cache.finish()
        return not self._cache.busy

    def _hint(self, function: Callable[[], None], then: Callable[[object], None]) -> None:
        def over(outcome: object) -> None:
            then(outcome)
            self._leave_if_done()

        self._call(function, over)

    @property
    def splices(self) -> bool:
        return True

    # -- lending.Lendable: reads and writes by position may go on beside those of a lane -------------------------------

    is_shared = True
    _lane: LanePort | None = None

    def lend_source(self, lane: LanePort, request_bytes: int) -> LaneSource | None:
        del request_bytes
        return FileSource(self._file.number) if self._lend(lane) else None

    def lend_target(self, lane: LanePort) -> LaneTarget | None:
        return FileTarget(self._file.number) if self._lend(lane) else None

    def _lend(self, lane: LanePort) -> bool:
        if self.life is not Life.OPEN:
            return False
        self._lane, self._age = lane, LaneAge()
        return True

    def adopt_read(self, handle: int, where: Range, into: Payload) -> None:
        self.read(handle, where, into)

    def adopt_write(self, handle: int, where: Range, *, is_zero: bool) -> None:
        raise BugError("a write to a file is over when its lane is")

    def adopt_flush(self, handle: int) -> None:
        raise BugError("a file is flushed by its connection, not by a lane")

    def take_back(self, data: bytes, lost: int | None, reason: str = "") -> None:
        """What was wrong, if anything, its own reads and writes will find."""
        self._lane = None
        if self.life is Life.CLOSING:
            super()._release()
        else:
            self._leave_if_done()

    def _release(self) -> None:
        if self._lane is not None:
            self._lane.stop()  # it still has the descriptor's number
        else:
            super()._release()

    def tick(self, now: float) -> None:
        super().tick(now)
        if self._lane is None:
            return
        since, size = self._lane.oldest_read() if self.side == "source" else self._lane.oldest_write()
        seconds = REQUEST_SECONDS + REQUEST_SECONDS_PER_MIB * size / MIB
        if self._age.seconds(since, now) >= seconds:
            self._lose(TimedOut(self.peer, "reading" if self.side == "source" else "writing", seconds))

    def lane_reads(self, where: Range) -> None:
        self._cache.before_read(where)

    def lane_moved(self, where: Range) -> None:
        if self.side == "source":
            self._cache.after_read(where)
        else:
            self._unflushed_bytes += where.length
            self._cache.after_write(where)

    def lane_flushes(self) -> None:
        """Its connection does that."""

    lane_flushed = lane_flushes

    def refusal(self, error: int) -> RequestError:
        return refusal(error)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _may_begin(self) -> bool:
        # The ring has room for all that sockets need, but not for hundreds of requests on each of many connections.
        return self._ring.in_flight < FILE_OPERATIONS_MAX

    def _begin(self, request: Request) -> None:
        match request.task:
            case Task.READ:
                if self.side == "source":
                    self._cache.before_read(request.where)
                self._transfer(request)
            case Task.WRITE:
                self._transfer(request)
            case Task.ZERO:
                self._zero(request)
            case Task.EXTENTS:
                self._find_extents(request)
            case Task.FLUSH:
                self._ring.submit(Operation(Kind.SYNC, self._descriptor, owner=partial(self._synced, request)))

    def _transfer(self, request: Request) -> None:
        """Read or write what is left of `request`."""
        if request.piped is not None:
            self._splice(request, request.piped)
            return
        self._ring.submit(
            Operation(
                Kind.READ if request.task is Task.READ else Kind.WRITE,
                self._descriptor,
                buffers=[request.buffer[request.moved :]],
                offset=request.where.start + request.moved,
                owner=partial(self._transferred, request),
            )
        )

    def _splice(self, request: Request, payload: PipedPayload) -> None:
        """As `_transfer`, between the file and a pipe; what of the payload is in memory is read and written there."""
        is_read, offset = request.task is Task.READ, request.where.start + request.moved
        if is_read and request.moved == 0:
            payload.begin(0, payload.length)
        piece: PipeRun | memoryview | None = payload.target() or None if is_read else payload.rest(request.moved)
        operation: Operation
        if isinstance(piece, memoryview):
            kind, then = Kind.READ if is_read else Kind.WRITE, partial(self._moved_in_memory, request, payload)
            operation = Operation(kind, self._descriptor, buffers=[piece], offset=offset, owner=then)
        else:
            assert self._descriptor is not None
            operation = Splice(
                self._descriptor,
                payload.pipe.write_end if is_read else payload.pipe.read_end,
                offset=offset,
                length=request.where.length - request.moved if piece is None else piece.left,
                into_pipe=is_read,
                owner=partial(self._spliced, request, payload, piece),
            )
        self._ring.submit(operation)

    def _moved_in_memory(self, request: Request, payload: PipedPayload, operation: Operation) -> None:
        if operation.result > 0 and request.task is Task.READ:
            payload.advance(operation.result)
        self._transferred(request, operation)

    def _spliced(self, request: Request, payload: PipedPayload, run: PipeRun | None, operation: Operation) -> None:
        pipe, moved = payload.pipe, operation.result
        if moved in _INTO_MEMORY and run is None:
            payload.spill()
            if self._is_under_way(request):
                self._transfer(request)
            return
        if moved < 0:
            pipe.is_unknown = True
        elif run is None:
            pipe.held += moved
            if moved:
                payload.advance(moved)
        else:
            pipe.held -= moved
            run.left -= moved
        self._transferred(request, operation)

    def _transferred(self, request: Request, operation: Operation) -> None:
        if not self._is_under_way(request):
            return
        request.moved += max(0, operation.result)
        if operation.result < 0:
            if request.task is Task.READ:
                self._cache.after_failure(request.where)
            self._answer(request, refusal(-operation.result))
        elif request.moved == request.where.length:
            self._remember(request)
            self._answer(request, count=request.moved)
        elif operation.result > 0:
            self._transfer(request)
        elif request.task is Task.READ:
            self._answer(request, refusal(errno.ENXIO, "the file became shorter"))
        else:
            self._answer(request, refusal(errno.EIO, "nothing was written, and no error was reported"))

    def _remember(self, request: Request) -> None:
        if request.task is Task.WRITE:
            self._cache.after_write(request.where)
        elif self.side == "source":
            self._cache.after_read(request.where)

    def _synced(self, request: Request, operation: Operation) -> None:
        if not self._is_under_way(request):
            return
        if operation.result < 0:
            self._answer(request, refusal(-operation.result))
        else:
            self._cache.after_sync()
            self._answer(request)

    def _zero(self, request: Request) -> None:
        if request.allocated in self._refused:
            self._answer(request, _NO_ZEROES)
            return
        zero = zero_device if self._file.is_device else zero_file
        self._call(partial(zero, self._file.number, request.where, request.allocated), partial(self._zeroed, request))

    def _zeroed(self, request: Request, outcome: OSError | None) -> None:
        if outcome is None:
            self._answer(request)
        elif outcome.errno in NEVER:
            self._refused |= {request.allocated}
            self._answer(request, _NO_ZEROES)
        else:
            self._answer(request, refusal(outcome.errno or errno.EIO))

    def _find_extents(self, request: Request) -> None:
        if self._knows_extents and not self._file.is_device:
            self._call(partial(self._map.find, request.where), partial(self._extents_found, request))
        else:
            self._answer(request, extents=[(request.where, 0)])

    def _extents_found(self, request: Request, outcome: Extents | OSError) -> None:
        if isinstance(outcome, OSError):
            self._knows_extents = False  # EINVAL: the file system has no SEEK_HOLE. Everything is data then.
            outcome = [(request.where, 0)]
        self._answer(request, extents=outcome)


def _open_file(path: str, identity: str, side: Side) -> _Opened | UserError:
    """Open what the coordinator saw at `path`, and nothing else. Runs on a thread: it may block. Raises OSError."""
    # Looked at first because only opening a FIFO, or some devices, would already wait or have effects.
    if error := _mismatch(path, os.stat(path), identity):
        return error
    number = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if side == "source" else os.O_RDWR))
    try:
        status = os.fstat(number)
        if error := _mismatch(path, status, identity):
            os.close(number)
            return error
        if side == "source":
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        is_device = stat.S_ISBLK(status.st_mode)
        size = os.lseek(number, 0, os.SEEK_END) if is_device else status.st_size
    except OSError:
        os.close(number)
        raise
    return _Opened(number, is_device, _describe(path, size, status, side))


def _mismatch(path: str, status: os.stat_result, identity: str) -> UserError | None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        return UserError("neither a regular file nor a block device", path)
    if f"{status.st_dev}:{status.st_ino}" != identity:
        return UserError("another file than when the copy began (it was replaced meanwhile)", path)
    return None


def _describe(path: str, size: int, status: os.stat_result, side: Side) -> EndpointDescription:
    preferred = status.st_blksize
    is_power_of_two = preferred > 0 and preferred & (preferred - 1) == 0
    return EndpointDescription(
        peer=path,
        size=size,
        read_only=side == "source",
        can_multi_conn=True,
        can_flush=True,
        can_zero=True,
        can_extents=stat.S_ISREG(status.st_mode),
        block_minimum=1,  # the page cache writes any byte, even of a device with large sectors
        block_preferred=min(preferred, BLOCK_BYTES_MAX_DEFAULT) if is_power_of_two else _PREFERRED_DEFAULT,
        block_maximum=BLOCK_BYTES_MAX_DEFAULT,
    )
