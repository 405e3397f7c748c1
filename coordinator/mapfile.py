"""A job as GNU ddrescue's mapfile, for ddrescuelog(1), ddrescueview(1) and ddrescue itself. Pure.

::

    # comments
    0x00100000     ?               1          the position, what is being done (+ finished), and the pass
    0x00000000  0x00100000  +                 position, size and status of every block; they adjoin each other
    0x00100000  0x00000200  -

The statuses used are `+` finished (durable here), `-` bad (the source's blocks that stayed unreadable), `?` not tried.
The ddrescue manual, "Mapfile structure", describes the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbdshard.common.ranges import Range, RangeSet
from nbdshard.coordinator.journal_facts import JobFacts


def mapfile(facts: JobFacts, durable: Iterable[Range], unreadable: Iterable[Range] = ()) -> str:
    """The mapfile's text. What is both durable and unreadable is shown as bad: zeroes were written in its place.

    Raises ValueError when a range goes beyond the job's size.
    """
    blocks = _blocks(facts.size, RangeSet(durable), RangeSet(unreadable))
    untried = next((piece for piece, status in blocks if status == "?"), None)
    position, doing = (untried.start, "?") if untried is not None else (0, "+")
    destinations = [f"# Destination: {_printable(end.named)}" for end in facts.destinations]
    lines = [
        "# Mapfile. Created by nbdshard",
        f"# Job: {_printable(facts.uuid)}",
        f"# Source: {_printable(facts.source.named)}",
        *destinations,
        "# current_pos  current_status  current_pass",
        f"0x{position:08X}     {doing}               1",
        "#      pos        size  status",
        *(f"0x{piece.start:08X}  0x{piece.length:08X}  {status}" for piece, status in blocks),
    ]
    return "\n".join(lines) + "\n"


def _blocks(size: int, finished: RangeSet, bad: RangeSet) -> list[tuple[Range, str]]:
    """Every byte of the job once, in order."""
    for piece in bad:
        finished.remove(piece)
    known = sorted([*((piece, "+") for piece in finished), *((piece, "-") for piece in bad)])
    if known and known[-1][0].end > size:
        raise ValueError(f"{known[-1][0]} is not within the job's {size} bytes")
    if size == 0:
        return []
    tried = RangeSet(piece for piece, _ in known)
    return sorted([*known, *((piece, "?") for piece in tried.gaps(Range(0, size)))])


def _printable(text: str) -> str:
    """`text` on one line, and in UTF-8: what a name has of other characters is shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
