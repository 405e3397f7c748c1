"""How a copy is cut: sizes and rules that follow from both ends and the user's options. Pure."""

from __future__ import annotations

from enum import Enum

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import HOLE_BYTES_MIN, SALVAGE_BYTES, SPARSE_UNIT_DEFAULT, SPLICE_BYTES_MIN
from nbdshard.common.messages import EndpointDescription, JobOptions
from nbdshard.common.ranges import Range


class ZeroPolicy(Enum):
    """What becomes of a range that is known to be zeroes."""

    SKIP = "the destination is zero already"
    REQUEST = "one WRITE_ZEROES"
    FILL = "written as data: the destination cannot zero"


class CopyShape(msgspec.Struct, frozen=True):
    """Sizes in bytes, counts in requests."""

    request_size: int  # of one read and one write: a power of two, and within both sides' maximum
    request_size_varies: bool  # half of it may be asked for, where that is faster
    requests: int  # in flight on one connection
    attempts: int  # of one read or write
    salvage_unit: int  # what cannot be read is lost in pieces of this; 0: it fails the copy
    depth: int  # operations per source connection: `requests`, as far as `queue_size` holds their buffers
    queue_size: int  # payload in flight per connection
    alignment: int  # the larger minimum block size: where zeroes and data may be cut
    sparse_unit: int  # zero detection; 0: none
    hole_min: int  # shorter holes of the source are read, and found again by zero detection
    merge_unit: int  # the destination's minimum block, for a tail shorter than it; 1: never
    zero_policy: ZeroPolicy
    allocated: bool
    ask_extents: bool
    synchronous: bool  # one operation at a time, in order
    splice: bool  # payload may go from one side to the other through a pipe
    checksum: bool = False  # all that is read is looked at, so nothing is spliced

    @classmethod
    def of(
        cls,
        source: EndpointDescription,
        destination: EndpointDescription,
        options: JobOptions,
        *,
        splice: bool = False,
    ) -> CopyShape:
        """The shape of a copy between these ends, which can both `splice`.

        Raises UserError when no request size suits both.
        """
        alignment = max(source.block_minimum, destination.block_minimum)
        largest = min(source.block_maximum, destination.block_maximum)
        if largest < alignment:
            raise UserError(
                f"block sizes do not fit: a request must be at least {alignment} and at most {largest} bytes",
                f"{source.peer} to {destination.peer}",
            )
        request_size = _power_of_two_within(min(max(options.request_size, alignment), largest))
        synchronous = options.synchronous or source.is_stream or destination.is_stream
        policy = _zero_policy(destination, options)
        splice = splice and not synchronous and not options.checksum and request_size >= SPLICE_BYTES_MIN
        sparse_unit = _sparse_unit(destination, options, alignment, request_size, policy)
        return cls(
            request_size=request_size,
            request_size_varies=options.request_size_varies and request_size // 2 >= max(alignment, SPLICE_BYTES_MIN),
            requests=options.requests,
            attempts=options.attempts,
            salvage_unit=max(SALVAGE_BYTES, alignment) if options.salvage and not source.is_stream else 0,
            depth=1 if synchronous else max(1, min(options.requests, options.queue_size // request_size)),
            queue_size=max(options.queue_size, request_size),
            alignment=alignment,
            sparse_unit=sparse_unit,
            hole_min=min(HOLE_BYTES_MIN, request_size // 4) if sparse_unit else 1,
            merge_unit=destination.block_minimum,
            zero_policy=policy,
            allocated=options.allocated,
            ask_extents=options.extents and source.can_extents,
            synchronous=synchronous,
            splice=splice,
            checksum=options.checksum,
        )

    def may_splice(self, where: Range) -> bool:
        """Whether the payload of a read of `where` may be spliced: if it is long enough to pay, and stays as it is."""
        return self.splice and where.length >= SPLICE_BYTES_MIN and not self.needs_merge(where)

    def needs_merge(self, where: Range) -> bool:
        """Whether a write of `where` ends inside a block of the destination."""
        return where.end % self.merge_unit != 0


def _zero_policy(destination: EndpointDescription, options: JobOptions) -> ZeroPolicy:
    if options.destination_is_zero and not options.allocated:
        return ZeroPolicy.SKIP
    return ZeroPolicy.REQUEST if destination.can_zero else ZeroPolicy.FILL


def _sparse_unit(
    destination: EndpointDescription,
    options: JobOptions,
    alignment: int,
    request_size: int,
    policy: ZeroPolicy,
) -> int:
    if options.sparse_unit == 0 or options.allocated or policy is ZeroPolicy.FILL:
        return 0
    wanted = options.sparse_unit
    if wanted is None:
        wanted = max(SPARSE_UNIT_DEFAULT, _power_of_two_within(max(1, destination.block_preferred)))
    return min(max(wanted, alignment), request_size)


def _power_of_two_within(size: int) -> int:
    return 1 << (size.bit_length() - 1)
