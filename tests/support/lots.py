"""Random requests whose results are known although many are under way: an export is cut into lots, with one on each.

A lot has an odd length, so that blocks and chunks of an export are shared by lots that are used at the same time. Who
takes a request carries it out, over whatever connection, and says what came of it; that is checked against a reference.
Nothing but the standard library is used: a client may be a program for another Python.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field, replace

HOLE, ZERO = 1, 2  # flags of base:allocation
LOT_BYTES = 21_001
LOTS_MAX = 12  # that one request takes: a quarter of a megabyte
CHECKS = ("read", "extents")
CHANGES = ("write", "write", "zero", "trim")  # data more often, or all would soon be zeroes


class Wrong(AssertionError):
    """The export is not what the reference says."""


@dataclass(eq=False)
class Request:
    """`kind`: write, zero, trim, read, extents, flush, or settle, which is a read. `data`: of a write.

    `may_punch` and `fast`: of a zero. `lots`: what it needs, and nobody else uses meanwhile.
    """

    kind: str
    start: int = 0
    length: int = 0
    data: bytes = b""
    fua: bool = False
    may_punch: bool = True
    fast: bool = False
    lots: range = field(default_factory=lambda: range(0))

    def __str__(self) -> str:
        flags = [name for name in ("fua", "may_punch", "fast") if getattr(self, name)]
        return f"{self.kind} [{self.start}, {self.start + self.length}) {' '.join(flags)}"


class Lots:
    """`size` bytes that are all zeroes, or `content`. Any thread may take requests and say what came of them.

    `align`: offsets and lengths are multiples of it, as is `size`. `can_trim`, `can_fast`: what may be asked for.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        content: bytes = b"",
        align: int = 1,
        can_trim: bool = True,
        can_fast: bool = True,
    ) -> None:
        self.reference = bytearray(content or size)
        self._chance = random.Random(seed)
        self._align = align
        self._bytes = LOT_BYTES // align * align
        self._count = -(-size // self._bytes)
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._kinds = [kind for kind in CHANGES if can_trim or kind != "trim"]
        self._can_fast = can_fast

    def take(self) -> Request | None:
        """A request for lots that nobody uses; None: so many are in use that none was found."""
        with self._lock:
            chance = self._chance
            if chance.random() < 0.05:
                return Request("flush")
            first = chance.randrange(self._count)
            lots = range(first, min(first + (chance.randint(1, LOTS_MAX) if chance.random() < 0.2 else 1), self._count))
            if self._taken.intersection(lots):
                return None
            self._taken.update(lots)
            return self._random(lots)

    def _random(self, lots: range) -> Request:
        chance, align = self._chance, self._align
        low, high = lots.start * self._bytes, min(lots.stop * self._bytes, len(self.reference))
        start = chance.choice((low, chance.randrange(low, high))) // align * align
        end = -(-chance.choice((high, chance.randint(start + 1, high))) // align) * align
        request = Request(chance.choice((*self._kinds, *CHECKS)), start, end - start, lots=lots)
        if request.kind in CHANGES:
            request.fua = chance.random() < 0.1
            request.may_punch = chance.random() < 0.5
            request.fast = self._can_fast and request.kind == "zero" and chance.random() < 0.3
        if request.kind == "write":
            request.data = self._content(request.length)
        return request

    def _content(self, length: int) -> bytes:
        """Noise; or zeroes, as if somebody had not looked; or noise with zeroes in it."""
        chance = self._chance
        kind = chance.random()
        if kind < 0.1:
            return bytes(length)
        data = bytearray(chance.randbytes(length))
        if kind < 0.3:
            start, end = sorted(chance.randrange(length + 1) for _ in range(2))
            data[start:end] = bytes(end - start)
        return bytes(data)

    def done(self, request: Request, answer: object = None) -> Request | None:
        """It was carried out: `answer` is what a read found (bytes), or extents, as (length, flags). Raises Wrong.

        What is trimmed reads as zeroes or as before, so there is a request more then: it has to be read.
        """
        there = slice(request.start, request.start + request.length)
        if request.kind == "trim":
            return replace(request, kind="settle", fua=False)
        try:
            match request.kind:
                case "write":
                    self.reference[there] = request.data
                case "zero":
                    self.reference[there] = bytes(request.length)
                case "read":
                    self._compare(request, self.reference[there], bytes(answer))  # type: ignore[call-overload]
                case "settle":
                    self._settle(request, there, bytes(answer))  # type: ignore[call-overload]
                case "extents":
                    self._check_extents(request, list(answer))  # type: ignore[call-overload]
        finally:
            self.give_back(request)
        return None

    def _settle(self, request: Request, there: slice, found: bytes) -> None:
        before = self.reference[there]
        for at in range(request.length):
            if found[at] and found[at] != before[at]:
                raise Wrong(f"{request}: the byte at {request.start + at} was {before[at]}, and is {found[at]}")
        self.reference[there] = found

    def give_back(self, request: Request) -> None:
        """It changed nothing: an error that was to be expected."""
        with self._lock:
            self._taken.difference_update(request.lots)

    @staticmethod
    def _compare(request: Request, expected: bytes | bytearray, found: bytes) -> None:
        if len(found) != len(expected):
            raise Wrong(f"{request}: {len(found)} bytes")
        if found != expected:
            at = next(at for at, (one, other) in enumerate(zip(expected, found, strict=True)) if one != other)
            raise Wrong(f"{request}: the byte at {request.start + at} is {found[at]} instead of {expected[at]}")

    def _check_extents(self, request: Request, extents: list[tuple[int, int]]) -> None:
        if not extents or sum(length for length, _ in extents) > request.length:
            raise Wrong(f"{request}: {extents}")
        at = request.start
        for length, flags in extents:
            if length <= 0 or (flags & ZERO and any(self.reference[at : at + length])):
                raise Wrong(f"{request}: [{at}, {at + length}) is said to be {flags}, and has data")
            at += length
