"""What a negotiated export means for a copy. Pure."""

from __future__ import annotations

from nbdshard.common.messages import EndpointDescription
from nbdshard.common.nbd.constants import BASE_ALLOCATION, TransmissionFlag
from nbdshard.common.nbd.export import Export


def describe(export: Export, peer: str) -> EndpointDescription:
    """What a negotiated export means for a copy."""
    flags = export.flags
    return EndpointDescription(
        peer=peer,
        size=export.size,
        read_only=TransmissionFlag.READ_ONLY in flags,
        can_multi_conn=TransmissionFlag.CAN_MULTI_CONN in flags,
        can_flush=TransmissionFlag.SEND_FLUSH in flags,
        can_fua=TransmissionFlag.SEND_FUA in flags,
        can_zero=TransmissionFlag.SEND_WRITE_ZEROES in flags,
        can_extents=BASE_ALLOCATION in export.contexts,
        block_minimum=export.block_sizes.minimum,
        block_preferred=export.block_sizes.preferred,
        block_maximum=export.block_sizes.maximum,
        rotational=TransmissionFlag.ROTATIONAL in flags,
        hints=export.hints,
    )
