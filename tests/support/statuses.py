"""A status and an outcome for what shows them."""

from __future__ import annotations

from msgspec.structs import replace

from nbdshard.common.messages import Counters
from nbdshard.coordinator.job import Outcome, Status, Verdict

MIB = 1 << 20
GIB = 1 << 30

STATUS = Status(
    size=1000, counters=Counters(), workers=2, source_connections=4, destination_connections=3, phase="copying"
)
OUTCOME = Outcome(
    verdict=Verdict.COMPLETE,
    error="",
    counters=Counters(copied=3 * GIB, zeroed=GIB, skipped=512 * MIB),
    size=4 * GIB + 512 * MIB,
    durable=True,
    flush_asked=True,
    workers=2,
    source_connections=4,
    destination_connections=4,
    rings=frozenset({"io_uring"}),
    unfenced=(),
    source_peer="nbd://a",
    destination_peer="nbd://b",
)


def done(count: int, size: int | None = 1000) -> Status:
    return replace(STATUS, size=size, counters=Counters(copied=count))
