"""Finding zeroes in data that was read: exact, and cheap when there are none. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SAMPLE_OFFSET = 0x15B  # odd, and inside the smallest unit: in much real data the first byte of every block is zero
_ZEROES = bytes(1 << 20)
_ZERO_SAMPLES = re.compile(b"\0+")

Run = tuple[int, int, bool]  # start, end (offsets in the buffer), whether every byte is zero


def is_zero(buffer: bytearray, start: int, end: int) -> bool:
    """Whether buffer[start:end] holds only zero bytes. Compares in place: no copy, no Python per byte."""
    while start < end:
        length = min(end - start, len(_ZEROES))
        prefix = _ZEROES if length == len(_ZEROES) else _ZEROES[:length]
        if not buffer.startswith(prefix, start):  # a memcmp of `length` bytes
            return False
        start += length
    return True


def find_runs(buffer: bytearray, length: int, unit: int, phase: int = 0) -> list[Run]:
    """Cut buffer[0:length] into runs that are all zero or not, in order, kinds alternating.

    Cuts fall on multiples of `unit` on the device, where `phase` is the device offset of buffer[0] modulo `unit`; the
    shorter pieces at both ends count as blocks of their own. One byte of each block is looked at first, so dense data
    costs one strided slice.
    """
    head_end = min(length, unit - phase) if phase else 0
    blocks = (length - head_end) // unit
    tail_start = head_end + blocks * unit
    sample = bytes(memoryview(buffer)[head_end + min(_SAMPLE_OFFSET, unit - 1) : tail_start : unit])
    head_zero = head_end > 0 and is_zero(buffer, 0, head_end)
    tail_zero = tail_start < length and is_zero(buffer, tail_start, length)
    if not head_zero and not tail_zero and 0 not in sample:
        return [(0, length, False)]
    zero: list[tuple[int, int]] = [(0, head_end)] if head_zero else []
    if blocks and is_zero(buffer, head_end, tail_start):
        _join(zero, head_end, tail_start)
    else:
        for start, end in _zero_spans(buffer, unit, head_end, sample):
            _join(zero, start, end)
    if tail_zero:
        _join(zero, tail_start, length)
    return list(_with_gaps(zero, length))


def _zero_spans(buffer: bytearray, unit: int, base: int, sample: bytes) -> Iterator[tuple[int, int]]:
    """Blocks that are all zero; neighbours whose samples are together: most often they are zero as a whole."""
    for found in _ZERO_SAMPLES.finditer(sample):
        start, end = base + found.start() * unit, base + found.end() * unit
        if is_zero(buffer, start, end):
            yield start, end
            continue
        for block in range(start, end, unit):
            if is_zero(buffer, block, block + unit):
                yield block, block + unit


def _join(spans: list[tuple[int, int]], start: int, end: int) -> None:
    if spans and spans[-1][1] == start:
        spans[-1] = (spans[-1][0], end)
    else:
        spans.append((start, end))


def _with_gaps(zero: list[tuple[int, int]], length: int) -> Iterator[Run]:
    at = 0
    for start, end in zero:
        if at < start:
            yield at, start, False
        yield start, end, True
        at = end
    if at < length:
        yield at, length, False
