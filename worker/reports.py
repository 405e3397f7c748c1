"""How a worker tells the coordinator of a failure. Pure."""

from __future__ import annotations

from nbdshard.common.errors import ConnectionLost, NbdshardError, ProtocolError, RequestError, UserError
from nbdshard.common.messages import ErrorReport, Side


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
