"""What an export's parameters say to its clients: a description, and how patient they should be. Pure."""

from __future__ import annotations

from typing import Final

from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    EXPORT_NAME_BYTES_MAX,
    HINT_BACKOFF_SECONDS_MAX,
    HINT_BACKOFF_SECONDS_MIN,
    HINT_LOSS_SECONDS_MAX,
    HINT_LOSS_SECONDS_MIN,
    HINT_REQUEST_SECONDS_MAX,
    HINT_REQUEST_SECONDS_MIN,
)
from nbdshard.common.nbd.hints import Hints
from nbdshard.common.units import format_seconds, parse_seconds
from nbdshard.server.parameters import Parameters

PARAMETERS: Final = frozenset({"description", "hint-request", "hint-loss", "hint-backoff"})


def description_of(parameters: Parameters) -> str:
    """What `description` says; "" if nothing. Raises UserError."""
    text = parameters.text("description") or ""
    if len(text.encode(errors="replace")) > EXPORT_NAME_BYTES_MAX or "\0" in text:
        what = f"a description of at most {EXPORT_NAME_BYTES_MAX} bytes without a NUL is expected"
        raise UserError(what, parameters.where)
    return text


def hints_of(parameters: Parameters) -> Hints:
    """What `hint-request`, `hint-loss` and `hint-backoff` say. Raises UserError, also beyond what clients believe."""
    request, loss = (parameters.seconds(f"hint-{name}") for name in ("request", "loss"))
    _check(parameters, "hint-request", request, HINT_REQUEST_SECONDS_MIN, HINT_REQUEST_SECONDS_MAX)
    _check(parameters, "hint-loss", loss, HINT_LOSS_SECONDS_MIN, HINT_LOSS_SECONDS_MAX)
    backoff = parameters.text("hint-backoff")
    if backoff is None:
        return Hints(request, loss)
    where = f"{parameters.where}: hint-backoff="
    first, dash, last = backoff.partition("-")
    if not dash:
        raise UserError(f"{backoff!r} is not a shortest and a longest pause", where, "200ms-5s, say")
    low, high = parse_seconds(first, where), parse_seconds(last, where)
    for pause in (low, high):
        _check(parameters, "hint-backoff", pause, HINT_BACKOFF_SECONDS_MIN, HINT_BACKOFF_SECONDS_MAX)
    if low > high:
        raise UserError(f"{backoff!r}: the shortest pause is longer than the longest", where)
    return Hints(request, loss, low, high)


def _check(parameters: Parameters, name: str, seconds: float | None, least: float, most: float) -> None:
    if seconds is not None and not least <= seconds <= most:
        allowed = f"{format_seconds(least)} to {format_seconds(most)}"
        raise UserError(f"{name}={parameters.text(name)}: {allowed} is what clients believe", parameters.where)
