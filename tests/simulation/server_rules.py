"""How a simulated server behaves, and when it fails: chosen by the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum, auto

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = range(8)
EIO, EINVAL, ENOTSUP = 5, 22, 95


class Extents(Enum):
    """What answers to BLOCK_STATUS are like."""

    NONE = auto()  # base:allocation is not offered
    EXACT = auto()
    FRAGMENTED = auto()  # cut at any byte, neighbours alike
    SHORT = auto()  # ends somewhere before the end of the request
    FAILING = auto()  # an error, always


class Full(Enum):
    """What a server with no room for another connection does."""

    REFUSE = auto()  # ECONNREFUSED
    CLOSE = auto()  # accepts, and closes at once
    HANG = auto()  # accepts, and says nothing
    IGNORE = auto()  # the connect never ends


@dataclass(frozen=True, slots=True)
class ServerRules:
    """One server. Sizes in bytes."""

    name: str
    block_minimum: int = 1
    block_preferred: int = 4096
    block_maximum: int = 1 << 25
    knows_go: bool = True  # otherwise EXPORT_NAME, and no block sizes
    structured: bool = True
    extended: bool = False
    multi_conn: bool = True
    can_flush: bool = True
    can_zero: bool = True
    read_only: bool = False
    extents: Extents = Extents.EXACT
    connections_max: int = 1000
    when_full: Full = Full.REFUSE
    error_share: float = 0.0  # of requests that fail, but never more than `errors_max` times for the same place
    errors_max: int = 3
    refuses_zeroes: bool = False  # WRITE_ZEROES is offered, and always fails with ENOTSUP
    bad_byte: int | None = None  # reading or writing it always fails
    flush_fails: bool = False
    flush_failures: int = 0  # so many flushes fail, and lose some of what anybody wrote; nobody else is told
    names_lives: bool = False  # by hints; then a flush covers what was acknowledged on any connection of the same life
    silent_after: int | None = None  # requests; then nothing is answered any more
    is_contested: bool = False  # a worker that was given up may still be connected, and write what others write too
    # Of the client: what it may have under way on one connection.
    requests_max: int = 1000
    payload_max: int = 1 << 30
    no_hole: bool | None = None  # whether every WRITE_ZEROES must say NO_HOLE, or must not; None: there must be none


class Errors:
    """Errors that go away: how often a place has failed is shared by all connections."""

    def __init__(self, rules: ServerRules, chance: random.Random) -> None:
        self._rules = rules
        self._chance = chance
        self._failed: dict[tuple[int, int], int] = {}
        self._flushes_to_fail = rules.flush_failures

    def _flush_fails(self) -> bool:
        fails = self._flushes_to_fail > 0 and self._chance.random() < 0.3
        self._flushes_to_fail -= fails
        return fails

    def of(self, command: int, offset: int, length: int) -> int:
        """The error of a request, or 0."""
        rules = self._rules
        if command == CMD_FLUSH:
            return EIO if rules.flush_fails or self._flush_fails() else 0
        if command == CMD_BLOCK_STATUS and rules.extents is Extents.FAILING:
            return EIO
        if command == CMD_WRITE_ZEROES and rules.refuses_zeroes:
            return ENOTSUP
        moves_bytes = command in (CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES)
        if moves_bytes and rules.bad_byte is not None and offset <= rules.bad_byte < offset + length:
            return EIO
        if rules.error_share and self._chance.random() < rules.error_share:
            key = (command, offset)
            self._failed[key] = self._failed.get(key, 0) + 1
            if self._failed[key] <= rules.errors_max:
                return EIO
        return 0
