"""Small charts as SVG: bars beside a reference, and lines. Pure.

Nothing is painted behind them, and every colour is of middling brightness: they can be read on white and on black.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Final

COLOURS: Final = ("#3b82f6", "#d97706", "#16a34a", "#a855f7")
INK: Final = "#808a96"  # text and axes
TICKS_MIN: Final = 4
BAR_MAX: Final = 3.0

_PANEL_WIDTH: Final = 380
_GAP: Final = 40
_LABELS_WIDTH: Final = 130
_TOP: Final = 62  # legend and title
_BAR: Final = 11
_PLOT_HEIGHT: Final = 210
_BOTTOM: Final = 44


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of bars side by side with a line at 1: `values[group][series]`, None where there is none.

    A bar is drawn no longer than BAR_MAX, so that one far out does not flatten the others; its number tells.
    """

    title: str
    values: Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Lines:
    """One line for each series over labelled places, from 0 up: `values[series][place]`, None where there is none."""

    title: str
    values: Sequence[Sequence[float | None]]


def bar_chart(panels: Sequence[Bars], groups: Sequence[str], series: Sequence[str], reference: str) -> str:
    """`panels` beside one another, all with the same groups and series; `reference` says what the line at 1 is."""
    pitch = len(series) * _BAR + 12
    height = _TOP + len(groups) * pitch + _BOTTOM
    body = _legend(series)
    for index, label in enumerate(groups):
        middle = _TOP + index * pitch + len(series) * _BAR / 2
        body.append(_text(_LABELS_WIDTH - 8, middle + 4, label, "end"))
    for number, panel in enumerate(panels):
        left = _LABELS_WIDTH + number * (_PANEL_WIDTH - _LABELS_WIDTH / 2 + _GAP)
        width = _PANEL_WIDTH - _LABELS_WIDTH / 2
        body += _bars(panel, left, width, pitch, len(groups), reference)
    total = _LABELS_WIDTH + len(panels) * (_PANEL_WIDTH - _LABELS_WIDTH / 2 + _GAP)
    return _svg(total, height, body)


def line_chart(panels: Sequence[Lines], places: Sequence[str], series: Sequence[str], axis: str) -> str:
    """`panels` beside one another, all with the same places and series; `axis` says what the places are."""
    body = _legend(series)
    for number, panel in enumerate(panels):
        body += _lines(panel, _GAP + number * (_PANEL_WIDTH + _GAP), places, axis)
    return _svg(len(panels) * (_PANEL_WIDTH + _GAP) + _GAP, _TOP + _PLOT_HEIGHT + _BOTTOM, body)


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to at least `most`, at least TICKS_MIN steps of 1, 2 or 5 times a power of ten."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10.0 ** floor(log10(most / TICKS_MIN))
    step = max(factor * power for factor in (1, 2, 5) if factor * power * TICKS_MIN <= most * (1 + 1e-9))
    return [round(number * step, 9) for number in range(ceil(most / step - 1e-9) + 1)]


def _bars(panel: Bars, left: float, width: float, pitch: int, groups: int, reference: str) -> list[str]:
    known = [value for group in panel.values for value in group if value is not None]
    scale = ticks(min(BAR_MAX, max([1.0, *known])))
    per_unit = width / scale[-1]
    bottom = _TOP + groups * pitch
    body = [_text(left, _TOP - 10, panel.title, "start", bold=True)]
    for tick in scale:
        x = left + tick * per_unit
        body.append(_line(x, _TOP - 2, x, bottom, 0.25))
        body.append(_text(x, bottom + 14, f"{tick:g}", "middle"))
    for index, group in enumerate(panel.values):
        for place, value in enumerate(group):
            if value is None:
                continue
            y = _TOP + index * pitch + place * _BAR
            length = min(value, BAR_MAX) * per_unit
            body.append(
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{length:.1f}" height="{_BAR - 2}" rx="1.5" '
                f'fill="{COLOURS[place]}"><title>{value:.2f}</title></rect>'
            )
            body.append(_text(left + length + 4, y + 8, f"{value:.2f}", "start", size=9))
    x = left + per_unit
    body.append(_line(x, _TOP - 2, x, bottom, 1.0))
    body.append(_text(x, bottom + 30, reference, "middle"))
    return body


def _lines(panel: Lines, left: float, places: Sequence[str], axis: str) -> list[str]:
    known = [value for values in panel.values for value in values if value is not None]
    scale = ticks(max(known, default=1.0))
    per_unit = _PLOT_HEIGHT / scale[-1]
    bottom = _TOP + _PLOT_HEIGHT
    step = _PANEL_WIDTH / len(places)
    body = [_text(left, _TOP - 14, panel.title, "start", bold=True)]
    for tick in scale:
        y = bottom - tick * per_unit
        body.append(_line(left, y, left + _PANEL_WIDTH, y, 1.0 if tick == 0 else 0.25))
        body.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    for index, place in enumerate(places):
        body.append(_text(left + (index + 0.5) * step, bottom + 16, place, "middle"))
    body.append(_text(left + _PANEL_WIDTH / 2, bottom + 34, axis, "middle"))
    for number, values in enumerate(panel.values):
        colour = COLOURS[number]
        spots = [
            (left + (index + 0.5) * step, bottom - value * per_unit, value)
            for index, value in enumerate(values)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{value:.2f}</title></circle>'
            for x, y, value in spots
        ]
    return body


def _legend(series: Sequence[str]) -> list[str]:
    body, x = [], float(_GAP)
    for name, colour in zip(series, COLOURS, strict=False):
        body.append(f'<rect x="{x:.0f}" y="10" width="11" height="11" rx="2" fill="{colour}"/>')
        body.append(_text(x + 17, 20, name, "start"))
        x += 17 + 7.5 * len(name) + 20
    return body


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False, size: int = 12) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{INK}" stroke-opacity="{opacity}"/>'


def _svg(width: float, height: float, body: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    style = f'font-family="system-ui, sans-serif" fill="{INK}"'
    return "\n".join([f'{head} height="{height:.0f}" {style}>', *body, "</svg>"]) + "\n"
