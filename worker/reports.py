"""How a worker tells the coordinator of a failure. Pure."""

from __future__ import annotations

from nbdshard.common.errors import ConnectionLost, NbdshardError, ProtocolError, RequestError, UserError
from nbdshard.common.messages import ErrorReport, Side
from nbdshard.common.ranges import Range


def report_error(error: NbdshardError, side: Side | None) -> ErrorReport:
    """`error` as the coordinator is told of it."""
    text = f"{side} {error}" if side else str(error)
    match error:
        case RequestError():
            return ErrorReport("request", text, side, errno_name=error.errno_name)
        case ConnectionLost():
            return ErrorReport("connection", text, side, error.peer)
        case ProtocolError():
            return ErrorReport("protocol", text, side, error.peer)
        case UserError():
            return ErrorReport("user", text, side)
        case _:
            return ErrorReport("bug", text, side)


def request_failure(side: Side, peer: str, doing: str, where: Range, error: RequestError, attempts: int) -> ErrorReport:
    """A read or write of `where` that failed for the last time."""
    times = "once" if attempts == 1 else f"{attempts} times"
    text = f"{side} {peer}: {doing} of {where.length} bytes at offset {where.start} failed {times}: {error}"
    return ErrorReport("request", text, side, peer, where.start, where.length, error.errno_name)


def too_small(peer: str, size: int) -> ErrorReport:
    """A destination of `size` bytes, of a stream that goes on."""
    text = f"destination {peer}: smaller than the source, which goes on after {size} bytes"
    return ErrorReport("user", text, "destination", peer)
