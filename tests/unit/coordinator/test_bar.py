"""The progress bar, drawn by rich into a string."""

from __future__ import annotations

import contextlib
import io
import os
import select
import termios
from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from rich.console import Console

from nbdshard.coordinator.bar import BarDisplay
from nbdshard.coordinator.job import Status, Verdict
from support.statuses import OUTCOME
from support.statuses import done as done_of

MIB = 1 << 20


def terminal(width: int = 140) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(
        file=out, force_terminal=True, force_interactive=True, width=width, color_system=None, legacy_windows=False
    ), out


def done(count: int, size: int | None = 100 * MIB) -> Status:
    return done_of(count, size)


def test_the_bar_shows_bytes_rate_time_left_and_workers() -> None:
    console, out = terminal()
    display = BarDisplay(0.0, console)
    display.show(done(0), 0.0)
    display.show(done(25 * MIB), 5.0)
    display.close()
    shown = out.getvalue()
    assert "copying" in shown
    assert "25 MiB/100 MiB  5 MiB/s  ETA 15.0 s  2 workers" in shown


def test_an_unknown_size_has_neither_end_nor_time_left() -> None:
    console, out = terminal()
    display = BarDisplay(0.0, console)
    display.show(done(25 * MIB, size=None), 5.0)
    display.close()
    assert "25 MiB  5 MiB/s  2 workers" in out.getvalue()
    assert "ETA" not in out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_what_is_waited_for_is_told_however_narrow_the_terminal_is(width: int) -> None:
    console, out = terminal(width)
    display = BarDisplay(0.0, console)
    lost = f"destination nbd+unix:///?socket=/run/{'d' * 100}: nobody listens"
    display.show(replace(done(0), waiting_for=lost, waiting_seconds=2.5, waiting_seconds_max=600.0), 1.0)
    display.close()
    assert "waiting " in out.getvalue()
    assert "2.50 s of 10 min 00 s  destination nbd" in out.getvalue()


def test_the_bar_is_not_drawn_more_often_than_it_is_due() -> None:
    console, out = terminal()
    display = BarDisplay(0.0, console)
    display.show(done(0), 0.0)
    drawn = out.getvalue()
    display.show(done(MIB), 0.1)
    assert out.getvalue() == drawn
    assert display.due() == pytest.approx(0.2)
    display.close()


def test_the_bar_goes_and_the_cursor_comes_back_at_the_end() -> None:
    console, out = terminal()
    display = BarDisplay(0.0, console)
    display.show(done(MIB), 1.0)
    display.end(done(100 * MIB), OUTCOME, 2.0)
    shown = out.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    assert shown.endswith("\x1b[2K")  # the line it stood on is clean
    display.close()
    assert out.getvalue() == shown


@contextlib.contextmanager
def real_terminal() -> Iterator[tuple[Console, int, int]]:
    """A console on a terminal, and the terminal's two ends: what is drawn on the second can be read from the first."""
    control, end = os.openpty()
    try:
        with contextlib.suppress(OSError), open(end, "w", closefd=False) as file:
            yield Console(file=file, force_terminal=True, force_interactive=True, width=80), control, end
    finally:
        os.close(end)
        with contextlib.suppress(OSError):
            os.close(control)


def shows(control: int, wanted: bytes) -> bool:
    """Whether `wanted` is drawn; the kernel hands a terminal's output over in portions, and not at once."""
    seen = b""
    while wanted not in seen and select.select([control], [], [], 10)[0]:
        seen += os.read(control, 65536)
    return wanted in seen


def test_a_terminal_stopped_by_ctrl_s_does_not_hold_up_the_copy() -> None:
    """If it did this test would hang: a terminal takes no byte while it is stopped."""
    with real_terminal() as (console, control, end):
        display = BarDisplay(0.0, console)
        display.show(done(0), 0.0)
        assert shows(control, b"copying")
        termios.tcflow(end, termios.TCOOFF)
        for second in range(1, 100):
            display.show(done(second * MIB), float(second))
        termios.tcflow(end, termios.TCOON)
        display.show(done(99 * MIB), 100.0)
        assert shows(control, b"99 MiB/100 MiB")
        display.close()


def test_a_copy_outlives_the_terminal_it_was_started_on() -> None:
    with real_terminal() as (console, control, _):
        display = BarDisplay(0.0, console)
        display.show(done(0), 0.0)
        os.close(control)
        display.show(done(MIB), 1.0)
        display.show(done(2 * MIB), 2.0)
        display.end(done(100 * MIB), OUTCOME, 3.0)


def test_what_is_no_terminal_gets_no_other_line(capfd: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    display = BarDisplay(0.0, Console(file=out, force_terminal=False))
    display.show(done(MIB), 1.0)
    display.end(done(100 * MIB), OUTCOME, 10.0)
    assert out.getvalue() == ""
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_dumb_terminal_gets_lines(capfd: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    display = BarDisplay(0.0, Console(file=out, force_terminal=True, force_interactive=False))
    display.show(done(35 * MIB), 1.0)
    display.close()
    assert out.getvalue() == ""
    assert capfd.readouterr().err.startswith("nbdshard: copying 35 %")


def test_what_is_no_terminal_gets_a_line_for_each_tenth(capfd: pytest.CaptureFixture[str]) -> None:
    display = BarDisplay(0.0, Console(file=io.StringIO(), force_terminal=False))
    for second, count in enumerate([0, 5, 9, 10, 11, 35, 40]):
        display.show(done(count * MIB), float(second))
    display.end(done(100 * MIB), OUTCOME, 10.0)
    written = capfd.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in written] == [
        "nbdshard: copying 0 %",
        "nbdshard: copying 10 %",
        "nbdshard: copying 35 %",
        "nbdshard: copying 40 %",
        "nbdshard: done 100 %",
    ]


def test_a_copy_that_failed_is_not_called_done(capfd: pytest.CaptureFixture[str]) -> None:
    display = BarDisplay(0.0, Console(file=io.StringIO(), force_terminal=False))
    display.end(done(100 * MIB), replace(OUTCOME, verdict=Verdict.FAILED), 10.0)
    assert capfd.readouterr().err == ""
