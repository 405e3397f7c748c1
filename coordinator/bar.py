"""The progress bar on standard error, drawn by rich. Imported only when a bar is wanted."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from nbdshard.common import logs
from nbdshard.common.limits import DISPLAY_SECONDS
from nbdshard.common.units import format_bytes, format_rate, format_seconds
from nbdshard.coordinator.job import Outcome, Status, Verdict
from nbdshard.coordinator.progress import Meter

BESIDE_FIGURES_COLUMNS: Final = 8  # of the terminal: the spinner, the shortest bar, and what parts them


class BarDisplay:
    """A bar with bytes, rate, time left and workers; a spinner while the size is unknown.

    Redrawn from the loop (rich's own thread is off), which must not wait for a terminal stopped by Ctrl-S: then nothing
    is drawn. On what is no terminal, or a dumb one, rich draws nothing until the end, so a line is written there for
    each tenth instead.
    """

    def __init__(self, now: float, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._meter = Meter(now)
        self._due = now
        self._tenths = -1
        self._closed = False
        self._animated = self._console.is_interactive
        columns = (
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=self._console, auto_refresh=False, transient=True, expand=True)
        self._task = self._progress.add_task("opening", total=None, figures="")

    def due(self) -> float:
        return self._due

    def show(self, status: Status, now: float) -> None:
        if now < self._due:
            return
        self._due = now + DISPLAY_SECONDS
        self._meter.take(status, now)
        self._draw(status)

    def end(self, status: Status, outcome: Outcome, now: float) -> None:
        if outcome.verdict is Verdict.COMPLETE and not self._animated:
            self._meter.take(status, now)
            self._draw_line(status, "done", format_bytes(self._meter.done))
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._animated:  # elsewhere it was not started, and would end with an empty line
                with suppress(OSError):  # the terminal has gone
                    self._progress.stop()

    def _draw(self, status: Status) -> None:
        figures = self._figures(status)
        phase = status.phase
        if status.waiting_for:
            phase = "waiting"
            patience = f"{format_seconds(status.waiting_seconds)} of {format_seconds(status.waiting_seconds_max)}"
            figures = f"{patience}  {status.waiting_for}"
        if not self._animated:
            self._draw_line(status, phase, figures)
            return
        if self._closed or not self._takes_more():
            return
        room = self._console.width - len(phase) - BESIDE_FIGURES_COLUMNS
        if len(figures) > room > 0:  # rich would take as much away from the phase
            figures = figures[: room - 1] + "…"
        self._progress.update(
            self._task, description=phase, total=status.size, completed=self._meter.done, figures=figures
        )
        try:
            self._progress.start()  # the first time
            self._progress.refresh()
        except OSError:  # the terminal has gone, and a copy that outlives it goes on
            self.close()

    def _takes_more(self) -> bool:
        try:
            return logs.takes_more(self._console.file.fileno())
        except io.UnsupportedOperation:  # not a file of the system's
            return True

    def _draw_line(self, status: Status, phase: str, figures: str) -> None:
        tenths = self._meter.done * 10 // status.size if status.size else 0
        if tenths > self._tenths:
            self._tenths = tenths
            percent = self._meter.done * 100 // status.size if status.size else 0
            logs.say(f"{phase} {percent} %, {figures}")

    def _figures(self, status: Status) -> str:
        done = format_bytes(self._meter.done)
        parts = [f"{done}/{format_bytes(status.size)}" if status.size is not None else done]
        parts.append(format_rate(self._meter.rate))
        left = self._meter.seconds_left(status.size)
        if left is not None:
            parts.append(f"ETA {format_seconds(left)}")
        parts.append("1 worker" if status.workers == 1 else f"{status.workers} workers")
        return "  ".join(parts)
