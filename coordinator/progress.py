"""Progress displays that need no terminal, and the summary line. All count completed bytes only.

A range that has to be copied again takes its bytes back out of the counters; `Meter` hides that: what is shown as done
never falls. The bar for terminals is in coordinator.bar, which imports rich.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from nbdshard.common.limits import (
    JSON_PROGRESS_SECONDS,
    LAST_PROGRESS_SECONDS,
    RATE_SAMPLES_MAX,
    RATE_WINDOW_SECONDS,
    UNREADABLE_NAMED_MAX,
    UNREADABLE_SHOWN_MAX,
)
from nbdshard.common.logs import write_in_time
from nbdshard.common.messages import Counters
from nbdshard.common.ranges import Range
from nbdshard.common.units import format_bytes, format_rate, format_seconds
from nbdshard.coordinator.job import Outcome, Status, Verdict

STDERR = 2
_NEVER = float("inf")
_END_PHASES = {
    Verdict.COMPLETE: "done",
    Verdict.DIFFERENT: "different",
    Verdict.FAILED: "failed",
    Verdict.STOPPED: "stopped",
    Verdict.PAUSED: "lost",  # not "paused", which is what the user had a job do that goes on
    Verdict.UNFENCED: "unfenced",
}

_ANSWERS = {Verdict.COMPLETE: True, Verdict.DIFFERENT: False}  # whether all that was written is what was read


class Meter:
    """Turns statuses into bytes done, rate and time left. Begins anew when what was copied is read back."""

    def __init__(self, now: float) -> None:
        self._start = now
        self._samples: deque[tuple[float, int]] = deque([(now, 0)], maxlen=RATE_SAMPLES_MAX)
        self._reads_back = False
        self.done = 0

    def take(self, status: Status, now: float) -> None:
        """Take in `status` at `now`."""
        done = status.done
        if status.verified is not None:
            done = status.verified
            if not self._reads_back:
                self._reads_back = True
                self.done = 0
                self._samples.clear()
                self._samples.append((now, 0))
        self.done = max(self.done, done)
        self._samples.append((now, max(self._samples[-1][1], status.moved)))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_WINDOW_SECONDS:
            self._samples.popleft()

    def elapsed(self, now: float) -> float:
        return max(now - self._start, 0.0)

    @property
    def rate(self) -> float:
        """Bytes per second over the last RATE_WINDOW_SECONDS."""
        (first, before), (last, done) = self._samples[0], self._samples[-1]
        return (done - before) / (last - first) if last > first else 0.0

    def seconds_left(self, size: int | None) -> float | None:
        """At the present rate; None while that says nothing."""
        if size is None or self.rate <= 0:
            return None
        return max(size - self.done, 0) / self.rate


class Display(Protocol):
    """What the coordinator's loop calls."""

    def due(self) -> float:
        """When `show` wants to be called again, by the loop's clock."""

    def show(self, status: Status, now: float) -> None:
        """Show `status`; cheap when nothing is due."""

    def end(self, status: Status, outcome: Outcome, now: float) -> None:
        """The last word. Called at most once."""

    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""


class NoDisplay:
    """Shows nothing."""

    def due(self) -> float:
        return _NEVER

    def show(self, status: Status, now: float) -> None:
        pass

    def end(self, status: Status, outcome: Outcome, now: float) -> None:
        pass

    def close(self) -> None:
        pass


class DelayedDisplay:
    """Shows nothing for the first `delay_seconds`, then becomes the display that `make(now)` makes.

    For the bar nobody asked for: a short copy must not wait for rich to be imported.
    """

    def __init__(self, start: float, delay_seconds: float, make: Callable[[float], Display]) -> None:
        self._start = start
        self._until = start + delay_seconds
        self._make = make
        self._display: Display | None = None

    def due(self) -> float:
        return self._until if self._display is None else self._display.due()

    def show(self, status: Status, now: float) -> None:
        if self._display is None and now >= self._until:
            self._display = self._make(self._start)
        if self._display is not None:
            self._display.show(status, now)

    def end(self, status: Status, outcome: Outcome, now: float) -> None:
        if self._display is not None:
            self._display.end(status, outcome, now)

    def close(self) -> None:
        if self._display is not None:
            self._display.close()


class PercentDisplay:
    """Lines `N/100` to a descriptor, as nbdcopy's --progress=FD: whenever N changes, 100/100 only after success."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._meter = Meter(0.0)
        self._shown = -1

    def due(self) -> float:
        return _NEVER  # the loop turns with every report of a worker; that is often enough

    def show(self, status: Status, now: float) -> None:
        if status.size is None:
            return
        self._meter.take(status, now)
        percent = self._meter.done * 100 // status.size if status.size else 0
        if status.verifies:  # the second half of the way
            percent = percent // 2 + (50 if status.verified is not None else 0)
        self._say(min(percent, 99), 0.0)

    def end(self, status: Status, outcome: Outcome, now: float) -> None:
        if outcome.verdict is Verdict.COMPLETE:
            self._say(100, LAST_PROGRESS_SECONDS)

    def close(self) -> None:
        pass

    def _say(self, percent: int, patience_seconds: float) -> None:
        if percent > self._shown and write_in_time(self._descriptor, f"{percent}/100\n".encode(), patience_seconds):
            self._shown = percent


class JsonDisplay:
    """One JSON object a second to standard error, and a last one whose `phase` says how it ended."""

    def __init__(self, now: float, descriptor: int = STDERR) -> None:
        self._descriptor = descriptor
        self._meter = Meter(now)
        self._due = now

    def due(self) -> float:
        return self._due

    def show(self, status: Status, now: float) -> None:
        if now >= self._due:
            self._due = now + JSON_PROGRESS_SECONDS
            self._meter.take(status, now)
            self._write(status, status.phase, status.workers, status.connections, now, 0.0)

    def end(self, status: Status, outcome: Outcome, now: float) -> None:
        self._meter.take(status, now)
        connections = max(outcome.source_connections, outcome.destination_connections)
        phase = _END_PHASES[outcome.verdict]
        self._write(status, phase, outcome.workers, connections, now, LAST_PROGRESS_SECONDS, outcome)

    def close(self) -> None:
        pass

    def _write(
        self,
        status: Status,
        phase: str,
        workers: int,
        connections: int,
        now: float,
        patience_seconds: float,
        outcome: Outcome | None = None,
    ) -> None:
        import json

        left = self._meter.seconds_left(status.size)
        record: dict[str, object] = {
            "phase": phase,
            "bytes_total": status.size,
            "bytes_done": self._meter.done,
            "bytes_copied": status.counters.copied,
            "bytes_zeroed": status.counters.zeroed,
            "bytes_skipped": status.counters.skipped,
            "bytes_spliced": status.counters.spliced,
            "bytes_resumed": status.resumed,
            "bytes_unreadable": status.unreadable_bytes,
            "bytes_compared": status.counters.compared,
            "bytes_verified": status.verified,
            "verified": None if outcome is None or not status.verifies else _ANSWERS.get(outcome.verdict),
            "rate_bytes_per_second": round(self._meter.rate),
            "eta_seconds": None if left is None else round(left, 1),
            "elapsed_seconds": round(self._meter.elapsed(now), 3),
            "workers": workers,
            "connections": connections,
            "waiting_for": status.waiting_for or None,
            "waiting_seconds": round(status.waiting_seconds, 1) if status.waiting_for else None,
            "rate_limit_bytes_per_second": status.pace.limit,
            "checksum": (outcome is not None and outcome.checksum) or None,
        }
        if outcome is not None:
            shown = outcome.unreadable[:UNREADABLE_SHOWN_MAX]
            record["unreadable_places"] = len(outcome.unreadable)
            record["unreadable"] = [{"offset": where.start, "length": where.length} for where in shown]
        write_in_time(self._descriptor, json.dumps(record).encode() + b"\n", patience_seconds)


def summary(outcome: Outcome, seconds: float) -> str:
    """The one line about a job that ended: what became of the bytes, how fast, by whom, and how safe it is."""
    counters = outcome.counters
    rate = counters.total / seconds if seconds > 0 else 0.0
    head = {
        Verdict.COMPLETE: "",
        Verdict.DIFFERENT: "different: ",
        Verdict.FAILED: "failed: ",
        Verdict.STOPPED: f"stopped at {_share(outcome)}: ",
        Verdict.PAUSED: f"paused at {_share(outcome)}: ",
        Verdict.UNFENCED: "not safe to use yet: ",
    }[outcome.verdict]
    parts = [
        f"{format_bytes(counters.copied)} copied, {format_bytes(counters.zeroed)} zeroed, "
        f"{format_bytes(counters.skipped)} skipped in {format_seconds(seconds)} ({format_rate(rate)})",
        *([f"{format_bytes(outcome.resumed)} resumed"] if outcome.resumed else []),
        _count(outcome.workers, "worker"),
        f"{outcome.source_connections}+{outcome.destination_connections} connections",
    ]
    if counters.copied:
        parts.append(_data_path(counters))
    if outcome.unreadable:
        parts.append(_unreadable(outcome.unreadable))
    if outcome.rings:
        parts.append(", ".join(sorted(outcome.rings)))
    if outcome.verdict in (Verdict.COMPLETE, Verdict.DIFFERENT):
        parts.append(_durability(outcome))
    if outcome.comparison is not None:
        from nbdshard.coordinator.verdict_lines import verdict_of_copy

        parts.append(verdict_of_copy(outcome))
    return head + "; ".join(parts)


def _unreadable(places: tuple[Range, ...]) -> str:
    """How much is lost, and where: the user has to know which files to look at."""
    size = sum(where.length for where in places)
    named = ", ".join(f"{where.length} at offset {where.start}" for where in places[:UNREADABLE_NAMED_MAX])
    more = f" and {len(places) - UNREADABLE_NAMED_MAX} more" if len(places) > UNREADABLE_NAMED_MAX else ""
    return f"{size} bytes unreadable in {_count(len(places), 'place')}, zeroes instead ({named}{more})"


def _data_path(counters: Counters) -> str:
    """How the payload went, of what is known to be copied."""
    if counters.spliced == 0:
        return "buffered"
    if counters.spliced == counters.copied:
        return "spliced"
    return f"{counters.spliced * 100 // counters.copied} % spliced"


def _share(outcome: Outcome) -> str:
    if outcome.size is None:
        return format_bytes(outcome.done)
    percent = outcome.done * 100 // outcome.size if outcome.size else 0
    return f"{format_bytes(outcome.done)} of {format_bytes(outcome.size)} ({percent} %)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _durability(outcome: Outcome) -> str:
    if not outcome.flush_asked:
        return "not flushed"
    return "flushed" if outcome.durable else "durability unknown: the destination has no flush"
