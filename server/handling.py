"""From a request to a backend's call and back to an answer: what a device is to say. Any thread may run it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from nbdshard.common import logs
from nbdshard.common.nbd.constants import BASE_ALLOCATION, Command, CommandFlag, Errno
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.device import Device
from nbdshard.server.serving import Request

Answer = Callable[[Device], None]  # to be called where the device lives

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


def handle(backend: Backend, request: Request) -> Answer:
    """Carry out `request`; what to answer. Never raises: whatever goes wrong is the answer."""
    try:
        answer = _HANDLERS[request.command](backend, request)
        if request.fua and request.command in _WRITING:
            backend.flush()
        return answer
    except OSError as error:
        number, sentence = _ERRNOS.get(error.errno or 0, Errno.EIO), error.strerror or str(error)
    except MemoryError:
        number, sentence = Errno.ENOMEM, "the server has no memory left"
    except Exception as error:  # a bug; unanswered, the client would wait for ever, and so would this server's end
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
_HANDLERS: Final[Mapping[int, Callable[[Backend, Request], Answer]]] = MappingProxyType(
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
