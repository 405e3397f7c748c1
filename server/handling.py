"""From a request to a backend's call and back to an answer: what a device is to say. Any thread may run it.

A command is added by a handler of one's own, from anywhere, in the `Protocol` that a `Service` or a `Connection` is
given.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from nbdshard.common import logs
from nbdshard.common.nbd.commands import COMMANDS, CommandTable
from nbdshard.common.nbd.constants import BASE_ALLOCATION, Command, CommandFlag, Errno
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Device
from nbdshard.server.haggling import SERVED_OPTIONS, OptionTable
from nbdshard.server.serving import Request

Answer = Callable[[Device], None]  # to be called where the device lives
Handler = Callable[[Backend, Request], Answer]  # may raise OSError
HandlerTable = Mapping[int, Handler]

_ERRNOS: Final[Mapping[int, Errno]] = MappingProxyType(
    {
        errno.EPERM: Errno.EPERM,
        errno.EACCES: Errno.EPERM,
        errno.EROFS: Errno.EPERM,
        errno.ENOMEM: Errno.ENOMEM,
        errno.EINVAL: Errno.EINVAL,
        errno.ENOSPC: Errno.ENOSPC,
        errno.EDQUOT: Errno.ENOSPC,  # "SHOULD map the EDQUOT and EFBIG errors to ENOSPC"
        errno.EFBIG: Errno.ENOSPC,
        errno.EOPNOTSUPP: Errno.ENOTSUP,
        errno.ESHUTDOWN: Errno.ESHUTDOWN,
    }
)


def failure(request: Request, error: Exception) -> Answer:
    """The answer where carrying out `request` raised `error`."""
    if isinstance(error, OSError):
        number, sentence = _ERRNOS.get(error.errno or 0, Errno.EIO), error.strerror or str(error)
    elif isinstance(error, MemoryError):
        number, sentence = Errno.ENOMEM, "the server has no memory left"
    else:  # a bug; unanswered, the client would wait for ever, and so would this server's end
        logs.error(f"internal error: {request!r}: {type(error).__name__}: {error}")
        number, sentence = Errno.EIO, "an internal error of the server"
    return lambda device: device.failed(request, number, sentence)


def _where(request: Request) -> Range:
    return Range.of(request.offset, request.length)


def _read(backend: Backend, request: Request) -> Answer:
    parts = backend.read(_where(request))
    return lambda device: device.content(request, parts)


def _write(backend: Backend, request: Request) -> Answer:
    backend.write(_where(request), memoryview(request.payload))
    return lambda device: device.done(request)


def _zero(backend: Backend, request: Request) -> Answer:
    may_punch = not request.flags & CommandFlag.NO_HOLE
    backend.zero(_where(request), may_punch=may_punch, fast=bool(request.flags & CommandFlag.FAST_ZERO))
    return lambda device: device.done(request)


def _trim(backend: Backend, request: Request) -> Answer:
    backend.trim(_where(request))
    return lambda device: device.done(request)


def _cache(backend: Backend, request: Request) -> Answer:
    backend.cache(_where(request))
    return lambda device: device.done(request)


def _flush(backend: Backend, request: Request) -> Answer:
    backend.flush()
    return lambda device: device.done(request)


def _block_status(backend: Backend, request: Request) -> Answer:
    extents = backend.extents(_where(request))
    return lambda device: device.extents(request, {BASE_ALLOCATION: extents})


_WRITING: Final = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})
HANDLERS: Final[HandlerTable] = MappingProxyType(
    {
        Command.READ: _read,
        Command.WRITE: _write,
        Command.WRITE_ZEROES: _zero,
        Command.TRIM: _trim,
        Command.CACHE: _cache,
        Command.FLUSH: _flush,
        Command.BLOCK_STATUS: _block_status,
    }
)


def handle(backend: Backend, request: Request, handlers: HandlerTable = HANDLERS) -> Answer:
    """Carry out `request`; what to answer. Never raises: whatever goes wrong is the answer."""
    try:
        answer = handlers[request.command](backend, request)
        if request.fua and request.command in _WRITING:
            _make_durable(backend)
        return answer
    except Exception as error:
        return failure(request, error)


def changes(request: Request) -> bool:
    """Whether it changes what is there."""
    return request.command in _WRITING


def flushes(request: Request) -> bool:
    """Whether carrying it out takes a flush."""
    return request.command == Command.FLUSH or (request.fua and request.command in _WRITING)


def flushed(backend: Backend, request: Request) -> Answer:
    """Make durable what `request`, which is carried out otherwise, has written. Never raises."""
    try:
        _make_durable(backend)
    except Exception as error:
        return failure(request, error)
    return lambda device: device.done(request)


def _make_durable(backend: Backend) -> None:
    """ENOTSUP of a flush would tell a client whose zeroes were to be fast that nothing has changed."""
    try:
        backend.flush()
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            raise OSError(errno.EIO, error.strerror) from None
        raise


class Protocol(msgspec.Struct, frozen=True):
    """What a server speaks, as tables to which anybody may add: option -> what is answered, command -> what it needs of
    an export, command -> what carries it out.
    """

    options: OptionTable = SERVED_OPTIONS
    commands: CommandTable = COMMANDS
    handlers: HandlerTable = HANDLERS


NBD: Final = Protocol()
