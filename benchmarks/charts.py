"""The charts of a run: results in, file names and SVG out. Pure."""

from __future__ import annotations

from benchmarks.chart import Bars, Lines, bar_chart, line_chart
from benchmarks.judging import cpu_share, speed
from benchmarks.report import REQUESTS_CHART, ROWS_CHART, SCALING_CHART, TASKS
from benchmarks.results import NBDCOPY, NBDSHARD, QEMU_IMG, Point, Results, Row
from nbdshard.common.units import format_bytes

WALL = "wall time, seconds"
CPU = "CPU time, seconds"


def charts(results: Results) -> dict[str, str]:
    """By file name; one for each part that was run."""
    found = {}
    # A copy that is over before Python has started says nothing about copying.
    rows = [row for row in results.rows if row.of(NBDCOPY) and TASKS[row.name].figure.wall_seconds_max is None]
    if rows:
        found[ROWS_CHART] = _rows(rows)
    if results.scaling:
        found[SCALING_CHART] = _scaling(results.scaling)
    if results.requests:
        found[REQUESTS_CHART] = _requests(results.requests)
    return found


def _rows(rows: list[Row]) -> str:
    panels = [
        Bars("throughput: longer is better", [[speed(row, NBDCOPY), _qemu_speed(row)] for row in rows]),
        Bars("CPU: shorter is better", [[cpu_share(row, NBDCOPY), _qemu_cpu(row)] for row in rows]),
    ]
    return bar_chart(panels, [row.name for row in rows], (NBDSHARD, QEMU_IMG), "nbdcopy = 1")


def _qemu_speed(row: Row) -> float | None:
    qemu, nbdcopy = row.of(QEMU_IMG), row.of(NBDCOPY)
    return nbdcopy.wall / qemu.wall if qemu is not None and nbdcopy is not None else None


def _qemu_cpu(row: Row) -> float | None:
    qemu, nbdcopy = row.of(QEMU_IMG), row.of(NBDCOPY)
    return qemu.cpu / nbdcopy.cpu if qemu is not None and nbdcopy is not None and nbdcopy.cpu else None


def _scaling(points: list[Point]) -> str:
    workers = sorted({point.workers for point in points})
    connections = sorted({point.connections for point in points})
    found = {(point.workers, point.connections): point.series for point in points if point.series.samples}
    wall = [[found[key].wall if (key := (w, c)) in found else None for c in connections] for w in workers]
    cpu = [[found[key].cpu if (key := (w, c)) in found else None for c in connections] for w in workers]
    names = [f"{count} workers" if count > 1 else "1 worker" for count in workers]
    return line_chart([Lines(WALL, wall), Lines(CPU, cpu)], [str(count) for count in connections], names, "connections")


def _requests(points: list[Point]) -> str:
    measured = [point for point in points if point.series.samples]
    values = [[point.series.wall for point in measured], [point.series.cpu for point in measured]]
    sizes = [format_bytes(point.request_size) for point in measured]
    return line_chart([Lines("seconds", values)], sizes, ("wall time", "CPU time"), "request size")
