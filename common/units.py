"""Sizes, rates and times as people write and read them. Pure; every unit is binary, as qemu-img counts."""

from __future__ import annotations

import re
from typing import Final

from nbdshard.common.errors import UserError

_SHIFTS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_SIZE: Final = re.compile(r"([0-9]{1,19})([kKmMgGtTpPeE]?)(?:i?[bB])?")
_SPAN: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)")
_SPAN_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE_MAX: Final = (1 << 63) - 1  # NBD offsets are unsigned, but Linux's off_t is not


def parse_size(text: str, where: str = "") -> int:
    """The bytes `text` means: a whole number, then nothing or one of k M G T P E, then perhaps B or iB.

    "4096", "256k", "1M" and "1MiB" are sizes; "1.5M", "-1" and "1 M" raise UserError with `where`.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} is not a size", where, "write bytes, or a whole number with k, M, G or T")
    size = int(match[1]) << _SHIFTS[match[2].upper()]
    if size > _SIZE_MAX:
        raise UserError(f"{text!r} is larger than any disk", where)
    return size


def parse_seconds(text: str, where: str = "") -> float:
    """The seconds `text` means: a number, then ms, s, m or h. "250ms", "1.5s" and "2m" are spans of time.

    Everything else, a number without a unit too, raises UserError with `where`.
    """
    match = _SPAN.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} is not a span of time", where, "write a number with ms, s, m or h")
    return float(match[1]) * _SPAN_SECONDS[match[2]]


def format_bytes(count: float) -> str:
    """`count` bytes with three significant digits: "0 B", "512 B", "4 KiB", "1.5 GiB", "100 GiB"."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if count < 999.5 if unit != "B" else count < 1024:
            break
        count /= 1024
        unit = larger
    return f"{_three_digits(count)} {unit}"


def format_rate(bytes_per_second: float) -> str:
    """A rate in bytes per second: "12.5 MiB/s"."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_seconds(seconds: float) -> str:
    """A span of time in seconds: "0.31 s", "12.4 s", "5 min 02 s", "3 h 05 min", "2 d 01 h"."""
    if seconds < 9.995:
        return f"{max(seconds, 0):.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = minutes // 60
    return f"{hours // 24} d {hours % 24:02d} h"


def size_text(count: int) -> str:
    """`count` bytes, exactly, in the form `parse_size` reads: "4k" for 4096, "1000" for 1000."""
    for suffix in "EPTGMk":
        shift = _SHIFTS[suffix.upper()]
        if count and count % (1 << shift) == 0:
            return f"{count >> shift}{suffix}"
    return str(count)


def _three_digits(value: float) -> str:
    if value >= 99.95 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}".rstrip("0").rstrip(".")
