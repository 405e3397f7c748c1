"""The states of a cached block as data: a sentence each, and where each may go."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from nbdshard.common.nbd.states import Row, row


class BlockState(Enum):
    """How what a block holds stands to what is below. A block that the cache does not hold has none."""

    CLEAN = auto()
    DIRTY = auto()
    WRITING = auto()
    REWRITTEN = auto()


_S = BlockState
BLOCK_STATES: Final[Mapping[BlockState, Row]] = {
    _S.CLEAN: row(
        "What it holds is below, too: when nobody uses it, it may make room for others.",
        _S.DIRTY,
    ),
    _S.DIRTY: row(
        "It holds something that is not below yet.",
        _S.WRITING,
        _S.CLEAN,  # zeroed or trimmed below, so there is nothing left to write
    ),
    _S.WRITING: row(
        "What was dirty is on its way below, and has not changed since.",
        _S.CLEAN,
        _S.DIRTY,
        _S.REWRITTEN,
    ),
    _S.REWRITTEN: row(
        "It was written to while it was on its way below: however that ends, it is dirty.",
        _S.DIRTY,
    ),
}
