"""The page: results in, Markdown out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from benchmarks import judging
from benchmarks.commands import TOOLS, shown
from benchmarks.results import AFTER_ONE, AFTER_ROUNDS, NBDCOPY, NBDSHARD, QEMU_IMG, Point, Results, Row, Sample, Series
from benchmarks.rows import NBDKIT, ROWS, SERVED_WORKS
from benchmarks.series import SLOW_FACTOR, SLOW_ROUNDS, VARIANT_ROUNDS
from nbdshard.common.limits import CHECKPOINT_SECONDS, CONNECTIONS_DEFAULT, REQUEST_BYTES_DEFAULT
from nbdshard.common.units import format_bytes

ROWS_CHART: Final = "benchmarks-rows.svg"
SCALING_CHART: Final = "benchmarks-scaling.svg"
REQUESTS_CHART: Final = "benchmarks-requests.svg"
NONE: Final = "-"
NO_NUMBERS: Final = "no numbers"

TASKS: Final = {task.name: task for task in ROWS}


def page(results: Results, notes: str) -> str:
    """The whole page; `notes`, kept by hand, stand at its end as they are."""
    sections = [
        _head(results),
        _machine(results),
        _rows(results),
        _servers(results),
        _variants(results),
        _left_behind(results),
        _memory(results),
        _scaling(results),
        _requests(results),
        _checkpoints(results),
        _serving(results),
        _control_plane(results),
        _how(results),
        notes.strip(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(results: Results) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`, all but the section of notes, which comes from `benchmarks-notes.md`. "
        "Every number is from one run on one machine, the tools taking turns.",
    ]
    if results.quick:
        lines += ["", "**A quick run: small sizes, few rounds. Good for seeing that it works, not for conclusions.**"]
    lines += [f"\n{note}" for note in results.notes]
    return "\n".join(lines)


def _machine(results: Results) -> str:
    machine = results.machine
    load = f"{machine.load_before:.2f} processes running in the minute before"
    facts = [
        ("processor", f"{machine.cpu}, {machine.cores} cores"),
        ("memory", format_bytes(machine.memory)),
        ("system", f"{machine.system}, Linux {machine.kernel}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("commit", machine.commit or "unknown"),
        ("date", f"{machine.date}; the run took {results.seconds / 60:.1f} minutes"),
        ("quiet", f"{load}; {results.steal:.1%} of the CPU went to other guests of the host"),
    ]
    return "## The machine\n\n" + table(("", ""), facts)


# -- the rows ----------------------------------------------------------------------------------------------------------


def _rows(results: Results) -> str:
    if not results.rows:
        return ""
    head = ("work", "size", "rounds", *TOOLS)
    speed_lines: list[Sequence[str]] = []
    cpu_lines: list[Sequence[str]] = []
    for row in results.rows:
        task = TASKS[row.name]
        begin = (f"**{row.name}**: {task.title}", format_bytes(row.size), str(_rounds(row)))
        if row.skipped:
            speed_lines.append((*begin, f"not run: {row.skipped}"))
            continue
        speed = judging.judge_speed(row, task.figure)
        ratios = (_times(judging.speed(row, NBDCOPY)), _times(judging.speed(row, QEMU_IMG)))
        speed_lines.append((*begin, *_cells(row, _wall), *ratios, speed.asked, str(speed)))
        cpu = judging.judge_cpu(row, task.figure)
        ratios = (_times(judging.cpu_share(row, NBDCOPY)), _times(judging.cpu_share(row, QEMU_IMG)))
        cpu_lines.append((*begin, *_cells(row, _cpu), *ratios, cpu.asked, str(cpu)))
    failures = [
        f"{row.name}: {series.name} failed: {series.failed}"
        for row in results.rows
        for series in row.series
        if series.failed
    ]
    failures += [f"{row.name}: {note}" for row in results.rows for note in row.notes]
    parts = [
        "## Beside nbdcopy and qemu-img",
        f"![Throughput and CPU against nbdcopy]({ROWS_CHART})",
        "Wall time in seconds, median (least to most). The ratios say how many times as fast nbdshard is; what was "
        "asked for are those to nbdcopy / to qemu-img.",
        table((*head, "x nbdcopy", "x qemu-img", "asked for", ""), speed_lines),
        "CPU time in seconds, user and system, of all processes of the command. The ratios say how many times the "
        "others' CPU nbdshard takes.",
        table((*head, "x nbdcopy", "x qemu-img", "asked for", ""), cpu_lines),
        bullets(failures),
    ]
    return "\n\n".join(part for part in parts if part)


def _servers(results: Results) -> str:
    cores = results.machine.cores
    lines = []
    for row in results.rows:
        if (bound := judging.speed_bound(row, cores)) is None:
            continue
        found = [row.of(tool) for tool in TOOLS]
        taken = ["-" if series is None else f"{series.servers:.2f}" for series in found]
        shares = ["-" if series is None else f"{judging.busy(series, cores):.0%}" for series in found]
        lines.append((row.name, *taken, *shares, _times(bound)))
    if not lines:
        return ""
    head = ("work", *(f"beside {tool}" for tool in TOOLS), *(f"busy, {tool}" for tool in TOOLS), "x nbdcopy at most")
    return "\n\n".join(
        [
            "## What the servers took",
            "CPU time in seconds, user and system, of the servers at both ends while each tool copied, medians; how "
            "busy that and the tool's own kept the machine's cores; and how many times as fast as nbdcopy a copy could "
            "be whose client took none, beside servers that take what they took beside nbdshard.",
            table(head, lines),
        ]
    )


def _variants(results: Results) -> str:
    lines = []
    for row in results.rows:
        ours = row.of(NBDSHARD)
        others = [series for series in row.series if series.name not in TOOLS]
        if ours is None or not others:
            continue
        lines.append((row.name, "", *_both(ours), "1.00", "", ""))
        for series in others:
            judgement = judging.judge_variant(row, series)
            ratio = _times(series.wall / ours.wall if series.samples else None)
            options = f"`{series.name.removeprefix(NBDSHARD).strip()}`"
            lines.append(("", options, *_both(series), ratio, judgement.asked, str(judgement)))
    if not lines:
        return ""
    head = ("work", "options", "wall", "CPU", "time, default", "asked for", "")
    return "## nbdshard with other options\n\n" + table(head, lines)


def _left_behind(results: Results) -> str:
    lines = []
    for row in results.rows:
        if row.skipped:
            continue
        left = [_bytes(row.data_bytes.get(tool)) for tool in (NBDSHARD, NBDCOPY)]
        proofs = [row.proofs.get(when, NONE) for when in (AFTER_ROUNDS, AFTER_ONE)]
        lines.append((row.name, *proofs, *left))
    if not lines:
        return ""
    text = (
        "## What the copies left behind\n\n"
        "What `qemu-img compare` said, outside the timing, of the destination after the timed rounds (if there was "
        "time), and of an empty one after one more copy by nbdshard; nbdkit null keeps nothing. Where zeroes are "
        "looked for: how much of an empty destination was data after one copy, by `nbdshard map --totals`.\n\n"
    )
    head = ("work", "after the rounds", "after one copy", f"data, {NBDSHARD}", f"data, {NBDCOPY}")
    return text + table(head, lines)


def _memory(results: Results) -> str:
    lines = []
    for row in results.rows:
        by_name = {memory.name: memory for memory in row.memory}
        ours = by_name.get(NBDSHARD)
        if ours is None:
            continue
        workers = ", ".join(format_bytes(peak) for peak in sorted(ours.workers, reverse=True)) or NONE
        peer = by_name.get(NBDCOPY)
        lines.append((row.name, format_bytes(ours.main), workers, _bytes(peer.main or None if peer else None)))
    if not lines:
        return ""
    text = (
        "## Memory\n\n"
        "The most that was resident in each process, shared libraries included, in one run that was not timed.\n\n"
    )
    return text + table(("work", "coordinator", "each worker", NBDCOPY), lines)


# -- scaling -----------------------------------------------------------------------------------------------------------


def _scaling(results: Results) -> str:
    if not results.scaling:
        return ""
    workers = sorted({point.workers for point in results.scaling})
    connections = sorted({point.connections for point in results.scaling})
    found = {(point.workers, point.connections): point for point in results.scaling}
    lines = [
        (f"{count} workers" if count > 1 else "1 worker", *(_point(found.get((count, each))) for each in connections))
        for count in workers
    ]
    head = ("", *(f"{count} connections" if count > 1 else "1 connection" for count in connections))
    parts = [
        "## Workers and connections",
        f"![Time and CPU by workers and connections]({SCALING_CHART})",
        f"The first row's ends, `-S 0`; wall time / CPU time in seconds, medians of {_most_rounds(results.scaling)}. "
        "Connections are shared by the workers, so there are at least as many.",
        table(head, lines),
        best_of(results.scaling, _default(results), _by_workers),
    ]
    return "\n\n".join(parts)


def _requests(results: Results) -> str:
    if not results.requests:
        return ""
    lines = [(format_bytes(point.request_size), *_both(point.series)) for point in results.requests]
    parts = [
        "## Request sizes",
        f"![Time and CPU by request size]({REQUESTS_CHART})",
        f"The first row's ends, `-S 0`, {results.requests[0].workers} workers, {results.requests[0].connections} "
        f"connections; seconds, medians of {_most_rounds(results.requests)}.",
        table(("request size", "wall", "CPU"), lines),
        best_of(results.requests, _default(results), _by_request),
    ]
    return "\n\n".join(parts)


def _checkpoints(results: Results) -> str:
    lines: list[Sequence[str]] = []
    for cost in results.checkpoints:
        judgement = judging.judge_checkpoints(cost)
        share, by_default = (
            NO_NUMBERS if each is None else f"{each:+.1%}"
            for each in (cost.share, judging.checkpoints_by_default(cost))
        )
        size = format_bytes(cost.size)
        lines.append((size, "at the end only", *_both(cost.never)))
        lines.append(
            (size, f"every {cost.seconds:g} s", *_both(cost.often), share, by_default, judgement.asked, str(judgement))
        )
    if not lines:
        return ""
    text = (
        "## Checkpoints\n\n"
        "nbdkit pattern to nbdkit file on a disk (in /var/tmp), `-S 0`, with a journal; every copy ends with a flush "
        f"of all of it. Checkpoints come every {CHECKPOINT_SECONDS:g} s by default; here they come more often, or none "
        "would fall into so short a copy.\n\n"
    )
    head = ("size", "flushed and journaled", "wall", "CPU", "more time", "by default", "asked for", "")
    return text + table(head, lines)


def _serving(results: Results) -> str:
    lines: list[Sequence[str]] = []
    works = {work.name: work for work in SERVED_WORKS}
    for found in results.serving:
        work = works[found.name]
        for series in found.series:
            is_peer = series.name == NBDKIT
            begin = (f"**{work.name}**: {work.title}", format_bytes(found.size)) if is_peer else ("", "")
            taken = f"{series.servers:.2f}" if series.samples else NO_NUMBERS
            judged: tuple[str, ...] = ()
            if not is_peer:
                judgement = judging.judge_server(found, series.name, work.servers[series.name])
                judged = (_times(found.speed(series.name)), judgement.asked, str(judgement))
            lines.append((*begin, series.name, _spread(series, _wall), taken, *judged))
    if not lines:
        return ""
    text = (
        "## The server\n\n"
        "The same clients of `nbdshard serve` and of nbdkit's file plugin, in turns: files in shared memory, unix "
        "sockets, seconds of wall time. The ratios say how many times as fast as beside nbdkit a client was.\n\n"
    )
    all_series = [(found.name, each) for found in results.serving for each in found.series]
    failures = [f"{name}: {each.name}: {each.failed}" for name, each in all_series if each.failed]
    head = ("work", "size", "server", "wall", "CPU of the server", "x nbdkit", "asked for", "")
    return "\n\n".join(part for part in (text + table(head, lines), bullets(failures)) if part)


def best_of(points: Sequence[Point], default: tuple[int, int, int], name: Callable[[Point], str]) -> str:
    """A sentence: the fastest of `points`, and how far `default` (workers, connections, request size) is from it."""
    measured = {(one.workers, one.connections, one.request_size): one for one in points if one.series.samples}
    chosen = measured.get(default)
    if chosen is None:
        return "The default was not measured."
    best = min(measured.values(), key=lambda point: point.series.wall)
    more = chosen.series.wall / best.series.wall - 1
    return (
        f"The fastest here: {name(best)}, {best.series.wall:.2f} s. The default is {name(chosen)}: "
        f"{chosen.series.wall:.2f} s, {more:.0%} more."
    )


def _default(results: Results) -> tuple[int, int, int]:
    """What nbdshard takes on that machine when it is told nothing: a worker for each core that has a connection."""
    return min(results.machine.cores, CONNECTIONS_DEFAULT), CONNECTIONS_DEFAULT, REQUEST_BYTES_DEFAULT


def _by_workers(point: Point) -> str:
    return f"{point.workers} workers and {point.connections} connections"


def _by_request(point: Point) -> str:
    return f"requests of {format_bytes(point.request_size)}"


def _most_rounds(points: Sequence[Point]) -> int:
    return max(len(point.series.samples) for point in points)


# -- the control plane -------------------------------------------------------------------------------------------------


def _control_plane(results: Results) -> str:
    parts = []
    if results.leases:
        lines: list[Sequence[str]] = []
        for rate in results.leases:
            judgement = judging.judge_leases(rate)
            used = f"{rate.cpu / rate.wall:.0%} of a core, {rate.cpu / rate.leases * 1e6:.0f} us a lease"
            measured = (rate.transport, str(rate.workers), f"{rate.leases:,}", f"{rate.per_second:,.0f}", used)
            lines.append((*measured, judgement.asked, str(judgement)))
        head = ("transport", "workers", "leases", "leases/s", "CPU of the coordinator", "asked for", "")
        parts.append(
            "One coordinator, the real one, with workers that answer every lease at once, over ZeroMQ:\n\n"
            + table(head, lines)
        )
    if results.scheduler:
        judgement = judging.judge_scheduler(results.scheduler)
        lines = [
            (f"{cost.ranges:,}", f"{cost.events:,}", f"{cost.microseconds:.1f}", format_bytes(cost.resident_peak))
            for cost in results.scheduler
        ]
        asked = f"Asked for: {judgement.asked}: {judgement}." if str(judgement) else f"Asked for: {judgement.asked}."
        parts.append(
            f"The scheduler alone, whole jobs with {results.scheduler[0].workers:,} workers:\n\n"
            + table(("ranges", "events", "us an event", "peak memory"), lines)
            + f"\n\n{asked}"
        )
    return "\n\n".join(["## The control plane", *parts]) if parts else ""


# -- how ---------------------------------------------------------------------------------------------------------------


def _how(results: Results) -> str:
    zero = [f"`{shown(tool, detects_zeroes=False)}`" for tool in TOOLS]
    return "\n".join(
        [
            "## How it was measured",
            "",
            f"1. Whole commands, from before the process is made until its exit: {', '.join(zero)}; where zeroes are "
            "looked for, the same without `-S 0`. Nothing else is tuned.",
            f"2. The tools take turns, {results.rounds} rounds where time allows, each round begun by another tool; "
            "the servers run on, and a destination file is emptied before each run. A tool that takes more than "
            f"{SLOW_FACTOR:g} times as long as the others does so in {SLOW_ROUNDS} rounds only, and nbdshard with "
            f"other options takes part in {VARIANT_ROUNDS}.",
            "3. CPU is user and system time by wait4(2), of the command, its threads, the kernel's threads that work "
            "for its ring, and all its processes, which it waits for; the servers' is not in it.",
            "4. Sources and destinations are in memory or made up by nbdkit, files in /dev/shm (a tmpfs): no disk "
            'takes part, and flushes cost a round trip; but for the copies of "Checkpoints".',
            "5. Memory and proofs come from further runs that are not timed: nbdcopy's before the rounds, nbdshard's "
            "after them, to a new and empty destination.",
        ]
    )


# -- cells -------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; short lines are filled up."""
    rows = [[*line, *[""] * (len(head) - len(line))] for line in lines]
    marks = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(head), marks, *rows))


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _cells(row: Row, what: Callable[[Sample], float]) -> list[str]:
    return [_spread(row.of(tool), what) for tool in TOOLS]


def _both(series: Series) -> tuple[str, str]:
    return _spread(series, _wall), _spread(series, _cpu)


def _spread(series: Series | None, what: Callable[[Sample], float]) -> str:
    if series is None or not series.samples:
        return NO_NUMBERS
    values = [what(sample) for sample in series.samples]
    middle = series.wall if what is _wall else series.cpu
    return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


def _point(point: Point | None) -> str:
    if point is None or not point.series.samples:
        return NONE
    return f"{point.series.wall:.2f} / {point.series.cpu:.2f}"


def _rounds(row: Row) -> int:
    return max((len(series.samples) for series in row.series), default=0)


def _wall(sample: Sample) -> float:
    return sample.wall


def _cpu(sample: Sample) -> float:
    return sample.cpu


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _bytes(count: int | None) -> str:
    return format_bytes(count) if count is not None else NONE
