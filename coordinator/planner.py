"""Can this copy be done, and how is it cut up? Pure: descriptions of both ends in, a `Plan` or one clear line out.

The way from an export to ranges: the unit (`granularity`) is a multiple of both minimum block sizes, so every cut is
aligned for both servers. Ranges have `range_size` until the rest is small against the number of workers; then each
takes half of its fair share of the rest, so that all finish together::

    |      128 MiB      |      128 MiB      |   64 MiB   |   64 MiB   |  32  |  32  | 16 | 16 | 8| 8|4|4|odd tail|

A resumed copy cuts the gaps that are left in the same way, at the same multiples of `range_size`. Where a range would
take long, because the worker or the job's rate is slow, or came back with some of it done, a part of it is leased at a
time, of one request at least.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import (
    CONNECTION_BYTES_MIN,
    CONNECTIONS_MAX,
    RANGE_BYTES_DEFAULT,
    RANGE_BYTES_MIN,
    RANGE_BYTES_TAIL_MIN,
    RANGES_PER_WORKER_MIN,
    WORKER_BYTES_MIN,
    WORKERS_MAX,
)
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.job import Job

OFFSET_MAX: Final = (1 << 63) - 1  # the spec's largest size: the bound of a stream whose end nobody knows


class Plan(msgspec.Struct, frozen=True):
    """How the job is cut up and shared out. Sizes in bytes.

    `size` is None for a stream source; `bound` is then the most that can be copied. `in_order`: one worker, one
    connection a side, one lease at a time. `repeatable` is False where a stream makes a second try impossible.
    `source_limit` and `destination_limit`: connections of the whole job; at most `worker_count` workers get any.
    """

    size: int | None
    bound: int
    alignment: int
    granularity: int
    range_size: int
    range_size_min: int
    lease_size_min: int  # of what is slow or comes back again and again: one request, which cannot be done by halves
    may_grow: bool  # nobody has asked for ranges of a certain size
    in_order: bool
    repeatable: bool
    single_writer: bool
    can_flush: bool
    source_limit: int
    destination_limit: int
    worker_count: int

    def usable(self, durable: Iterable[Range]) -> RangeSet:
        """What of `durable` need not be copied: nothing beyond the end, and what is left is cut at whole units."""
        taken = RangeSet()
        for piece in RangeSet(durable):
            start = _round_up(piece.start, self.granularity)
            end = self.bound if piece.end >= self.bound else piece.end - piece.end % self.granularity
            if start < end:
                taken.add(Range(start, end))
        return taken

    def next_length(self, remaining: int, start: int, gap_end: int, units: int = 1, most: float | None = None) -> int:
        """How long the next range is, which begins at `start` and ends at `gap_end` at the latest, when `remaining`
        bytes are left to hand out in all gaps together. `units`: how many range sizes it may have. `most`: no more
        bytes than that, if nobody has asked for ranges of a certain size."""
        if self.size is None:
            return gap_end - start
        whole = length = self.range_size * (units if self.may_grow else 1)
        if self.worker_count > 1:
            share = remaining // (2 * self.worker_count)
            while length > share and length > self.range_size_min:
                length = max(self.range_size_min, length // 2 // self.granularity * self.granularity)
        length = min(length, whole - start % self.range_size)
        if most is not None and self.may_grow:
            length = min(length, self._whole_requests(most))
        return self._with_rest(start, gap_end, length)

    def again_length(self, start: int, end: int, most: float) -> int:
        """How much of a range that came back is leased again: no more than `most` bytes."""
        return self._with_rest(start, end, self._whole_requests(most))

    def _whole_requests(self, most: float) -> int:
        return max(self.lease_size_min, int(most) // self.lease_size_min * self.lease_size_min)

    def _with_rest(self, start: int, end: int, length: int) -> int:
        """A rest too short for a range of its own stays with the last one."""
        return end - start if end - start - length < self.granularity else length


def check_job(job: Job, source: EndpointDescription, destination: EndpointDescription) -> Plan:
    """How to do `job` between these two ends. Raises UserError with one line when it cannot be done."""
    _check_block_minimum(source)
    _check_block_minimum(destination)
    if job.options.mode == "compare":
        return _plan(job, _longer(source, destination), destination)
    if destination.read_only:
        raise UserError("the destination is read-only", destination.peer)
    if source.size is None:
        if job.options.checksum:
            advice = "copy it to a file, and have the checksum of that"
            raise UserError("a stream, whose size nobody knows, has no checksum", source.peer, advice)
        _check_stream(job, destination)
    else:
        _check_sizes(job, source, source.size, destination)
    if job.durable:
        _check_durable(job, source, destination)
    return _plan(job, source, destination)


def _longer(source: EndpointDescription, destination: EndpointDescription) -> EndpointDescription:
    """The source, with the size of what there is to compare. Raises UserError where a side cannot be read at places."""
    for side in (source, destination):
        if side.size is None or side.is_stream:
            raise UserError("only what can be read at any place can be compared", side.peer)
        _check_reachable(side, side.size)
    return msgspec.structs.replace(source, size=max(source.size or 0, destination.size or 0))


def _check_block_minimum(side: EndpointDescription) -> None:
    minimum = side.block_minimum
    if minimum < 1 or minimum & (minimum - 1):
        raise UserError(f"the minimum block size {minimum} is not a power of two", side.peer)


def _check_stream(job: Job, destination: EndpointDescription) -> None:
    if destination.size is None or job.destination_grows:
        return
    if destination.size == 0:
        raise UserError("the destination has no room: its size is 0", destination.peer)
    if destination.size < destination.block_minimum:
        raise UserError(
            f"the destination has no room: its size of {destination.size} bytes is less than its minimum block size "
            f"{destination.block_minimum}",
            destination.peer,
        )


def _check_sizes(job: Job, source: EndpointDescription, size: int, destination: EndpointDescription) -> None:
    _check_reachable(source, size)
    if destination.size is None or job.destination_grows:
        return
    if destination.size < size:
        raise UserError(
            f"the destination is smaller than the source: {destination.size} bytes, {size} are needed",
            destination.peer,
        )
    tail = size % destination.block_minimum
    if tail and size - tail + destination.block_minimum > destination.size:
        raise UserError(
            f"the tail of {tail} bytes cannot be written: the minimum block size is {destination.block_minimum} "
            f"and the size of {destination.size} bytes leaves no room for a whole block",
            destination.peer,
        )


def _check_reachable(side: EndpointDescription, size: int) -> None:
    tail = size % side.block_minimum
    if tail:
        raise UserError(
            f"the tail of {tail} bytes is unreachable: the size of {size} bytes is not a multiple of the minimum "
            f"block size {side.block_minimum}",
            side.peer,
        )


def _check_durable(job: Job, source: EndpointDescription, destination: EndpointDescription) -> None:
    for side in (source, destination):
        if side.size is None or side.is_stream:
            # `null:` has no size either, and keeps nothing that could be skipped.
            raise UserError("a copy can be resumed only between two ends that keep their bytes", side.peer)
    end = max(piece.end for piece in job.durable)
    for side in (source, destination):
        if side.size is not None and side.size < end:
            raise UserError(
                f"its size is {side.size} bytes, but the bytes up to {end} are said to be copied already", side.peer
            )


def _plan(job: Job, source: EndpointDescription, destination: EndpointDescription) -> Plan:
    stream = source.size is None or source.is_stream or destination.is_stream
    in_order = stream or job.options.synchronous
    alignment = max(source.block_minimum, destination.block_minimum)
    granularity = max(RANGE_BYTES_MIN, alignment)
    size = source.size
    bound = size if size is not None else OFFSET_MAX
    if size is None and destination.size is not None and not job.destination_grows:
        bound = destination.size - destination.size % destination.block_minimum  # what can be written of it
    wanted_range = None if job.range_size is None else _round_up(max(job.range_size, 1), granularity)
    connections = 1 if in_order else max(1, min(job.connections, CONNECTIONS_MAX))
    source_limit = _useful(connections if source.can_multi_conn else 1, bound, wanted_range, CONNECTION_BYTES_MIN)
    destination_limit = _useful(
        connections if destination.can_multi_conn else 1, bound, wanted_range, CONNECTION_BYTES_MIN
    )
    workers = min(max(1, job.workers), WORKERS_MAX, source_limit, destination_limit)
    worker_count = 1 if in_order else _useful(workers, bound, wanted_range, WORKER_BYTES_MIN)
    range_size = wanted_range or _range_size(bound, worker_count, granularity)
    plan = Plan(
        size=size,
        bound=bound,
        alignment=alignment,
        granularity=granularity,
        range_size=range_size,
        lease_size_min=min(range_size, _round_up(job.options.request_size, granularity)),
        may_grow=wanted_range is None,
        range_size_min=min(range_size, max(granularity, RANGE_BYTES_TAIL_MIN)),
        in_order=in_order,
        repeatable=not stream,
        single_writer=not destination.can_multi_conn,
        can_flush=destination.can_flush,
        source_limit=source_limit,
        destination_limit=destination_limit,
        worker_count=worker_count,
    )
    if not job.durable:
        return plan
    # Ranges are cut as they were; but the rest may be too little for all those workers.
    left = bound - plan.usable(job.durable).total
    return msgspec.structs.replace(
        plan, worker_count=min(worker_count, _useful(worker_count, left, wanted_range, WORKER_BYTES_MIN))
    )


def _useful(count: int, size: int, wanted_range: int | None, unit: int) -> int:
    """No more than `count`, and than pieces of `unit` bytes (of the range size, if the user chose a smaller one)."""
    if wanted_range is not None:
        unit = min(unit, wanted_range)
    return max(1, min(count, size // unit))


def _range_size(size: int, worker_count: int, granularity: int) -> int:
    """The default, halved until every worker has several ranges; never below what the tail is split to."""
    smallest = max(granularity, RANGE_BYTES_TAIL_MIN)
    length = max(smallest, RANGE_BYTES_DEFAULT)
    while length > smallest and length * worker_count * RANGES_PER_WORKER_MIN > size:
        length //= 2
    return length


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
