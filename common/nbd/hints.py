"""How patient a server wants its clients to be, and which life of it this is: hints it may give. Pure.

The answer to NBD_OPT_LIST_META_CONTEXT with the query `x-nbdshard:hints`, in a namespace that the specification leaves
to anybody, has the form of one context's name, of up to HINTS_BYTES_MAX bytes::

    x-nbdshard:hints;v=1;request_ms=30000;loss_ms=120000;backoff_ms=200-5000;instance=<uuid>

Every key may be missing, and unknown ones may be there; of another `v` nothing is understood. A key that comes twice
says nothing, nor does a value that is none. A number is advice: it is believed within local limits.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from nbdshard.common.limits import (
    HINT_BACKOFF_SECONDS_MAX,
    HINT_BACKOFF_SECONDS_MIN,
    HINT_DIGITS_MAX,
    HINT_LOSS_SECONDS_MAX,
    HINT_LOSS_SECONDS_MIN,
    HINT_REQUEST_SECONDS_MAX,
    HINT_REQUEST_SECONDS_MIN,
    HINTS_BYTES_MAX,
)

QUERY: Final = "x-nbdshard:hints"
_VERSION: Final = "1"
_UUID_PARTS: Final = [8, 4, 4, 4, 12]
_HEX: Final = frozenset("0123456789abcdef")

RequestSeconds = Annotated[float, msgspec.Meta(ge=HINT_REQUEST_SECONDS_MIN, le=HINT_REQUEST_SECONDS_MAX)]
LossSeconds = Annotated[float, msgspec.Meta(ge=HINT_LOSS_SECONDS_MIN, le=HINT_LOSS_SECONDS_MAX)]
BackoffSeconds = Annotated[float, msgspec.Meta(ge=HINT_BACKOFF_SECONDS_MIN, le=HINT_BACKOFF_SECONDS_MAX)]


class Hints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a server said, within local limits; None and "" where it said nothing. Times in seconds.

    `request`: how old a request may become. `loss`: how long the server is to be waited for when it is lost, with
    pauses from `backoff_min` to `backoff_max` between tries (both or none). `instance`: a uuid that is another one
    after each start of the server, and whenever what it acknowledged without a flush may be lost.
    """

    request: RequestSeconds | None = None
    loss: LossSeconds | None = None
    backoff_min: BackoffSeconds | None = None
    backoff_max: BackoffSeconds | None = None
    instance: Annotated[str, msgspec.Meta(max_length=36)] = ""


NO_HINTS: Final = Hints()


def parse_hints(name: str) -> Hints | None:
    """What `name`, a context that a server lists, says; None if it is no answer to QUERY. Never raises."""
    head, _, rest = name.partition(";")
    if head != QUERY:
        return None
    if len(name.encode(errors="replace")) > HINTS_BYTES_MAX:
        return NO_HINTS
    fields = _fields(rest)
    if fields.get("v") != _VERSION:
        return NO_HINTS
    first, _, last = fields.get("backoff_ms", "").partition("-")
    low, high = (_seconds(text, HINT_BACKOFF_SECONDS_MIN, HINT_BACKOFF_SECONDS_MAX) for text in (first, last))
    if low is None or high is None or low > high:
        low = high = None
    return Hints(
        request=_seconds(fields.get("request_ms", ""), HINT_REQUEST_SECONDS_MIN, HINT_REQUEST_SECONDS_MAX),
        loss=_seconds(fields.get("loss_ms", ""), HINT_LOSS_SECONDS_MIN, HINT_LOSS_SECONDS_MAX),
        backoff_min=low,
        backoff_max=high,
        instance=_uuid(fields.get("instance", "")),
    )


def pack_hints(hints: Hints) -> str:
    """The context's name that says `hints`; `parse_hints` reads it."""
    fields = [QUERY, f"v={_VERSION}"]
    for key, seconds in (("request_ms", hints.request), ("loss_ms", hints.loss)):
        if seconds is not None:
            fields.append(f"{key}={_milliseconds(seconds)}")
    if hints.backoff_min is not None and hints.backoff_max is not None:
        fields.append(f"backoff_ms={_milliseconds(hints.backoff_min)}-{_milliseconds(hints.backoff_max)}")
    if hints.instance:
        fields.append(f"instance={hints.instance}")
    return ";".join(fields)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _fields(text: str) -> dict[str, str]:
    """By key; without those that come twice."""
    fields: dict[str, str] = {}
    repeated = set()
    for field in text.split(";"):
        key, equals, value = field.partition("=")
        if equals:
            if key in fields:
                repeated.add(key)
            fields[key] = value
    return {key: value for key, value in fields.items() if key not in repeated}


def _seconds(text: str, lowest: float, highest: float) -> float | None:
    """The milliseconds `text` says, within the limits; None unless it is a number."""
    return min(max(_number(text) / 1000, lowest), highest) if text.isascii() and text.isdigit() else None


def _number(text: str) -> int:
    """Of digits only. So many of them that nobody can mean it stand for a very large one."""
    return int(text) if len(text) <= HINT_DIGITS_MAX else 10**HINT_DIGITS_MAX


def _uuid(text: str) -> str:
    """`text` as RFC 9562 writes a uuid; "" if it is none."""
    parts = text.lower().split("-")
    return "-".join(parts) if [len(part) for part in parts] == _UUID_PARTS and _HEX.issuperset("".join(parts)) else ""
