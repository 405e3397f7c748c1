"""The journal's table of leaf digests: a row for each run of leaves side by side that are not zeroes.

Where a durable range has no row its leaves are zeroes: only whole ones, as the digest of a short last one is always
stored. A row holds 32 bytes for each 64 KiB of data, so all rows together take 1/2048 of it: 9.8 GB for 20 TB.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from nbdshard.common.limits import LEAF_BYTES
from nbdshard.common.messages import LeafRun
from nbdshard.common.ranges import Range
from nbdshard.coordinator.journal_tally import Tally


def read(connection: sqlite3.Connection, where: Range) -> list[LeafRun]:
    """The digests of the leaves that begin in `where`, in order. Raises sqlite3.Error."""
    return [LeafRun(start, digests) for start, digests in _slices(_touching(connection, where), where)]


def put(connection: sqlite3.Connection, runs: Iterable[LeafRun], tally: Tally) -> Tally:
    """Add `runs`, where there are none. In a transaction; raises sqlite3.Error."""
    for run in runs:
        connection.execute("INSERT INTO leaves VALUES (?, ?)", (run.start, run.digests))
        tally = tally.plus_leaves(run.start, run.digests)
    return tally


def cut(connection: sqlite3.Connection, piece: Range, tally: Tally) -> Tally:
    """Take out the digests of all leaves that `piece` has bytes of. In a transaction; raises sqlite3.Error."""
    before, behind = piece.start - piece.start % LEAF_BYTES, piece.end + -piece.end % LEAF_BYTES
    for start, digests in _touching(connection, piece):
        connection.execute("DELETE FROM leaves WHERE start_byte = ?", (start,))
        tally = tally.minus_leaves(start, digests)
        end = start + len(digests) // 32 * LEAF_BYTES
        for first, last in ((start, before), (behind, end)):
            if first < last:
                kept = _slices([(start, digests)], Range(first, last))
                tally = put(connection, (LeafRun(*row) for row in kept), tally)
    return tally


def load(connection: sqlite3.Connection) -> tuple[Tally, int]:
    """What the table has, and where the first byte of its last leaf ends. Raises ValueError, sqlite3.Error."""
    tally, last = Tally(), 0
    for start, digests in connection.execute("SELECT start_byte, digests FROM leaves ORDER BY start_byte"):
        if not isinstance(digests, bytes) or not digests or len(digests) % 32 or start < last or start % LEAF_BYTES:
            raise ValueError(f"the digests from {start} on are out of order")
        tally = tally.plus_leaves(start, digests)
        last = start + len(digests) // 32 * LEAF_BYTES
    return tally, last - LEAF_BYTES + 1 if last else 0


def _touching(connection: sqlite3.Connection, where: Range) -> list[tuple[int, bytes]]:
    """Rows that have leaves with bytes of `where`. They do not overlap: of those before it only the last one can."""
    rows: list[tuple[int, bytes]] = connection.execute(
        "SELECT start_byte, digests FROM leaves WHERE start_byte < :end AND start_byte >= "
        "coalesce((SELECT max(start_byte) FROM leaves WHERE start_byte <= :start), 0) ORDER BY start_byte",
        {"start": where.start, "end": where.end},
    ).fetchall()
    return [(start, digests) for start, digests in rows if start + len(digests) // 32 * LEAF_BYTES > where.start]


def _slices(rows: Iterable[tuple[int, bytes]], where: Range) -> Iterable[tuple[int, bytes]]:
    """What the rows have of the leaves that begin in `where`."""
    for start, digests in rows:
        first = max(0, -(-(where.start - start) // LEAF_BYTES))
        end = min(len(digests) // 32, -(-(where.end - start) // LEAF_BYTES))
        if first < end:
            yield start + first * LEAF_BYTES, digests[first * 32 : end * 32]
