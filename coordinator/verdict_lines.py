"""What is told of a comparison, to people and to programs. Pure; loaded where something was compared."""

from __future__ import annotations

from nbdshard.common.limits import DIFFERENCE_BYTES, DIFFERENCES_SHOWN_MAX
from nbdshard.common.units import format_bytes, format_rate, format_seconds
from nbdshard.coordinator.job import Comparison, Outcome, Verdict


def difference_lines(found: Comparison) -> list[str]:
    """Where the two sides differ: a line for each of the first ranges, and one for the others if there are any."""
    shown = found.differences[:DIFFERENCES_SHOWN_MAX]
    lines = [f"differ: offset {where.start}, {where.length} bytes" for where in shown]
    if found.is_cut or len(found.differences) > len(shown):
        lines.append(f"differ: and more behind these, {found.differing} bytes in all")
    return lines


def size_line(outcome: Outcome) -> str:
    """What is to be said of two sizes; "" where there is one only."""
    sizes = outcome.comparison.sizes if outcome.comparison is not None else None
    if sizes is None or sizes[0] == sizes[1]:
        return ""
    return (
        f"the sizes differ: {outcome.source_peer} has {sizes[0]} bytes, {outcome.destination_peer} {sizes[1]}; "
        "what only one of them has must be zeroes"
    )


def verdict_of_copy(outcome: Outcome) -> str:
    """The last word of a copy's summary: whether what was written is what was read."""
    found = outcome.comparison
    if found is None:
        return "not verified"
    if found.differing:
        return f"{differing(found)} differ from the source"
    return "verified" if outcome.verdict is Verdict.COMPLETE else f"{format_bytes(found.counters.total)} verified"


def comparison_summary(outcome: Outcome, seconds: float) -> str:
    """The one line about a comparison that ended: the answer, what it is about, how fast, by whom."""
    found = outcome.comparison
    counters = outcome.counters
    rate = counters.total / seconds if seconds > 0 else 0.0
    head = {
        Verdict.COMPLETE: "identical",
        Verdict.DIFFERENT: "different",
        Verdict.STOPPED: "stopped before the end",
        Verdict.PAUSED: "given up before the end",
    }.get(outcome.verdict, "failed")
    share = f"{format_bytes(counters.total)} of {format_bytes(outcome.size or 0)}"
    parts = [
        *([f"{differing(found)} differ"] if found is not None and found.differing else []),
        *([f"{share} done"] if outcome.verdict not in (Verdict.COMPLETE, Verdict.DIFFERENT) else []),
        f"{format_bytes(counters.compared)} compared, {format_bytes(counters.skipped)} zero on both sides in "
        f"{format_seconds(seconds)} ({format_rate(rate)})",
        "1 worker" if outcome.workers == 1 else f"{outcome.workers} workers",
        f"{outcome.source_connections}+{outcome.destination_connections} connections",
        *([", ".join(sorted(outcome.rings))] if outcome.rings else []),
    ]
    return f"{head}: {'; '.join(parts)}"


def as_json(outcome: Outcome, seconds: float) -> dict[str, object]:
    """The shape the manual page promises; keys may be added, never changed. Of a comparison that came to its end."""
    found = outcome.comparison
    assert found is not None and found.sizes is not None
    return {
        "identical": not found.differing,
        "source": {"name": outcome.source_peer, "size": found.sizes[0]},
        "destination": {"name": outcome.destination_peer, "size": found.sizes[1]},
        "bytes_compared": found.counters.compared,
        "bytes_zero": found.counters.skipped,
        "bytes_differing": found.differing,
        "block_bytes": DIFFERENCE_BYTES,
        "differences": [{"offset": where.start, "length": where.length} for where in found.differences],
        "differences_cut": found.is_cut,
        "seconds": round(seconds, 3),
    }


def differing(found: Comparison) -> str:
    """How much differs; whole blocks are counted."""
    return f"{found.differing} bytes (in blocks of {DIFFERENCE_BYTES})"
