"""Standard input or output as one side of a copy: bytes in order, each of them once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from functools import partial

from nbdshard.common.errors import ConnectionLost, UserError
from nbdshard.common.limits import BLOCK_BYTES_MAX_DEFAULT, PIPE_BYTES
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ring import Kind, Operation
from nbdshard.worker.local import LocalConnection, Request, Task, refusal

_NO_EXTENTS = refusal(errno.EOPNOTSUPP, "a stream has no extents")
_NO_ZEROES = refusal(errno.EOPNOTSUPP, "a stream cannot be zeroed")
_NO_FLUSH = refusal(errno.EOPNOTSUPP, "a stream cannot be flushed")


class StreamConnection(LocalConnection):
    """A pipe, socket, character device, or a file from where its offset is.

    Requests are carried out one after another and must follow each other without a gap. Whatever fails ends the
    connection: what was read or written cannot be read or written again. There is no time-out, for the process at the
    other end may take as long as it likes.

    The inherited descriptor is only borrowed: a duplicate is used and closed. Its O_NONBLOCK belongs to all who share
    the open file, and is left as it is; the ring copes with either.
    """

    _can_sync = False
    _position = 0  # of the next byte, counted from where we began
    _ended = False  # the end of the source was met

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.peer = "standard input" if self.side == "source" else "standard output"
        try:
            inherited = int(self.address.address)
            mode = os.fstat(inherited).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            number = os.dup(inherited)
        except ValueError:
            self._not_opened(UserError("its address is not a descriptor's number", self.peer))
        except OSError as error:
            self._not_opened(UserError(f"cannot be used: {error.strerror}", self.peer))
        else:
            self._can_sync = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
            if stat.S_ISFIFO(mode):
                _widen_pipe(number)
            # Never as a socket, which the ring would shut down at its end, for all who share it.
            self._opened(self._describe(), self._ring.attach(number, is_socket=False))

    def _describe(self) -> EndpointDescription:
        return EndpointDescription(
            peer=self.peer,
            size=None,
            read_only=self.side == "source",
            can_flush=self._can_sync,
            block_maximum=BLOCK_BYTES_MAX_DEFAULT,
            is_stream=True,
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def _may_begin(self) -> bool:
        return not self._under_way

    def _begin(self, request: Request) -> None:
        match request.task:
            case Task.READ | Task.WRITE:
                self._begin_transfer(request)
            case Task.ZERO:
                self._answer(request, _NO_ZEROES)
            case Task.EXTENTS:
                self._answer(request, _NO_EXTENTS)
            case Task.FLUSH if self._can_sync:
                self._ring.submit(Operation(Kind.SYNC, self._descriptor, owner=partial(self._synced, request)))
            case Task.FLUSH:
                self._answer(request, _NO_FLUSH)

    def _begin_transfer(self, request: Request) -> None:
        if self._ended:
            self._answer(request, count=0)
        elif request.where.start != self._position:
            what = f"is at byte {self._position} and cannot go to byte {request.where.start}"
            self._lose(UserError(what, self.peer, "a stream cannot be copied a second time"))
        else:
            self._transfer(request)

    def _transfer(self, request: Request) -> None:
        """Move what is left of `request`."""
        self._ring.submit(
            Operation(
                Kind.RECEIVE if request.task is Task.READ else Kind.SEND,
                self._descriptor,
                buffers=[request.buffer[request.moved :]],
                owner=partial(self._transferred, request),
            )
        )

    def _transferred(self, request: Request, operation: Operation) -> None:
        if not self._is_under_way(request):
            return
        result = operation.result
        if result < 0:
            self._lose(ConnectionLost(self.peer, request.task.value, os.strerror(-result).lower()))
            return
        request.moved += result
        self._position += result
        if request.moved == request.where.length:
            self._answer(request, count=request.moved)
        elif result > 0:
            self._transfer(request)
        elif request.task is Task.READ:
            self._ended = True
            self._answer(request, count=request.moved)
        else:
            self._lose(ConnectionLost(self.peer, request.task.value, "nothing was written, and no error was reported"))

    def _synced(self, request: Request, operation: Operation) -> None:
        self._answer(request, refusal(-operation.result) if operation.result < 0 else None)

    # -- the end -------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """There is no time by which a stream must have moved."""

    def disconnect(self) -> None:
        """As ever, but that a read has nothing to finish: a pipe may be idle for ever."""
        if self.side == "source":
            self.close()
        else:
            super().disconnect()


def _widen_pipe(number: int) -> None:
    """Give a pipe room for PIPE_BYTES: fewer, longer transfers on either side of it (tried: half as fast again)."""
    with contextlib.suppress(OSError):  # the user's share of pipe memory is used up: the pipe works as it is
        if fcntl.fcntl(number, fcntl.F_GETPIPE_SZ) < PIPE_BYTES:
            fcntl.fcntl(number, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
