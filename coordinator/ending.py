"""How a job ends: the verdict, the one line for the user, and the outcome. Pure texts and data."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

from nbdshard.common.messages import Counters, EndpointDescription, ErrorReport
from nbdshard.common.ranges import Range
from nbdshard.coordinator.crew import Crew
from nbdshard.coordinator.job import Comparison, Job, Outcome, Verdict

_NAMED_MAX: Final = 5  # workers named in one line; `Outcome.unfenced` has them all


class Ending(msgspec.Struct):
    """The end of a job under way: decided once, carried out by `deadline` (monotonic seconds) at the latest."""

    verdict: Verdict
    error: str
    reason: str  # for the workers
    reached: Counters  # when it was decided: what comes back while the workers drain does not count against it
    deadline: float
    at_once: bool = False


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: it may come from another machine."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def error_line(error: ErrorReport) -> str:
    """The line for the user of a failure that a worker met."""
    text = one_line(error.text)
    if text:
        return text
    where = " ".join(part for part in (error.side or "", one_line(error.peer)) if part)
    what = error.errno_name or f"a {error.kind} error without a text"
    at = f" at offset {error.offset}, {error.length} bytes" if error.offset is not None else ""
    return f"{where}: {what}{at}" if where else f"{what}{at}"


def stopped_line(done: int, size: int | None) -> str:
    return f"stopped after {done} bytes" if size is None else f"stopped after {done} of {size} bytes"


def unfenced_line(error: str, names: Collection[str]) -> str:
    """What is added to (or said instead of) the error when workers were not heard to close their connections."""
    named = ", ".join(sorted(names)[:_NAMED_MAX])
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    who = f"{named}{more} was not heard to close its connections and may still write to the destination"
    if len(names) > 1:
        who = f"{named}{more} were not heard to close their connections and may still write to the destination"
    return f"{error}; {who}" if error else f"every byte was copied, but {who}"


def make_outcome(
    job: Job,
    ending: Ending,
    crew: Crew,
    ends: tuple[EndpointDescription, EndpointDescription] | None,
    *,
    size: int | None,
    resumed: int,
    unreadable: tuple[Range, ...],
    is_undurable: bool,
    checksum: str,
    comparison: Comparison | None = None,
) -> Outcome:
    """The outcome of a job that nobody works on any more.

    `resumed`: bytes that an earlier run had made durable. `unreadable`: what the source could not read.
    `is_undurable`: a server without FLUSH took part of it.
    `comparison`: what was found where something was compared.
    """
    unfenced = tuple(sorted(crew.unfenced.values()))
    return Outcome(
        verdict=Verdict.UNFENCED if unfenced else ending.verdict,
        error=unfenced_line(ending.error, unfenced) if unfenced else ending.error,
        counters=ending.reached,
        size=size,
        durable=ending.verdict in (Verdict.COMPLETE, Verdict.DIFFERENT) and job.options.flush and not is_undurable,
        flush_asked=job.options.flush,
        workers=crew.took_part_count,
        source_connections=crew.source_connections_most,
        destination_connections=crew.destination_connections_most,
        rings=frozenset(crew.rings),
        unfenced=unfenced,
        source_peer=ends[0].peer if ends is not None else job.source.address,
        destination_peer=ends[1].peer if ends is not None else job.destinations[0].address,
        resumed=resumed,
        unreadable=unreadable,
        checksum=checksum,
        comparison=comparison,
    )
