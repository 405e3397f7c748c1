"""What a negotiation found out about one export. Plain data, shared by both sides."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from nbdshard.common.limits import BLOCK_BYTES_MAX_DEFAULT
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.hints import NO_HINTS, Hints


class BlockSizes(msgspec.Struct, frozen=True):
    """NBD_INFO_BLOCK_SIZE, in bytes (spec, "Size constraints"); the defaults where a server advertises nothing."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = BLOCK_BYTES_MAX_DEFAULT
    advertised: bool = False


class Export(msgspec.Struct, frozen=True):
    """One export as negotiated: everything the transmission phase needs to know."""

    name: str
    size: int
    flags: TransmissionFlag
    block_sizes: BlockSizes = msgspec.field(default_factory=BlockSizes)
    structured: bool = False  # NBD_OPT_STRUCTURED_REPLY was acknowledged
    extended: bool = False  # NBD_OPT_EXTENDED_HEADERS was acknowledged (it implies structured)
    contexts: Mapping[str, int] = msgspec.field(default_factory=dict)  # metadata context name -> id
    description: str = ""  # NBD_INFO_DESCRIPTION, bounded and printable
    canonical_name: str = ""  # NBD_INFO_NAME, when it differs
    hints: Hints = NO_HINTS
