"""One row of the table, from empty ends to a proven copy.

First nbdcopy copies once, untimed: its memory is looked at, and a destination that keeps data has taken what memory it
needs. Then the timed rounds, and if there is time, `qemu-img compare` of what they left behind. At the end the proof:
nbdshard copies once more, to a new and empty destination, which is compared; its processes' memory is looked at. Where
zeroes are looked for, both empty destinations tell how much of them each of the two left as data.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks.commands import TOOLS, compare_command, copy_command, map_command
from benchmarks.ends import Place, opened, without_extents
from benchmarks.measure import CommandFailed, output, watched
from benchmarks.results import AFTER_ONE, AFTER_ROUNDS, IDENTICAL, NBDCOPY, NBDSHARD, Memory, Row, Series
from benchmarks.rows import Row as Task
from benchmarks.series import VARIANT_ROUNDS, Runner, alternate


class MapEntry(msgspec.Struct):
    """One line of `nbdshard map --totals --json`. `type`: the flags of base:allocation, 0 for data."""

    size: int
    type: int


@dataclass(slots=True)
class RowRun:
    """One run of `task`, with `size` bytes, in `folder`. `variants`: the further command lines that nbdshard knows."""

    task: Task
    size: int
    folder: Path
    variants: Sequence[tuple[str, ...]]
    memory: list[Memory] = field(default_factory=list)
    data_bytes: dict[str, int] = field(default_factory=dict)
    proofs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, rounds: int, deadline: float) -> Row:
        """Measure; rounds end at `deadline`. What a command fails at is told in the row."""
        with opened(self.task.source, self.size, self.folder, "source") as source:
            with self._destination() as destination:
                self._watch(NBDCOPY, source, destination)
                runners = self._runners(source, destination)
                series = alternate(runners, rounds * self.task.rounds_factor, deadline, destination.reset)
                if self.task.destination.keeps_data and time.monotonic() < deadline:
                    self._compare(AFTER_ROUNDS, source, destination)
            with self._destination() as destination:  # what an earlier copy left there would prove nothing
                if self._watch(NBDSHARD, source, destination) and self.task.destination.keeps_data:
                    self._compare(AFTER_ONE, source, destination)
        return self._row(series)

    def _destination(self) -> AbstractContextManager[Place]:
        return opened(self.task.destination, self.size, self.folder, "destination")

    def _runners(self, source: Place, destination: Place) -> list[Runner]:
        lines: list[tuple[str, tuple[str, ...]]] = [(tool, ()) for tool in TOOLS]
        lines += [(NBDSHARD, variant) for variant in self.variants]
        return [
            Runner(
                " ".join((tool, *more)),
                self._command(tool, source, destination, more),
                VARIANT_ROUNDS if more else 0,
                (*source.servers, *destination.servers),
            )
            for tool, more in lines
        ]

    def _command(self, tool: str, source: Place, destination: Place, more: Sequence[str] = ()) -> list[str]:
        zeroes = self.task.detects_zeroes
        return copy_command(tool, source.address, destination.address, detects_zeroes=zeroes, more=more)

    def _watch(self, tool: str, source: Place, destination: Place) -> bool:
        """Copy once to an empty destination, looking at the memory and at what is there then; whether it went well."""
        destination.reset()
        try:
            memory, remark = watched(tool, self._command(tool, source, destination))
        except CommandFailed as error:
            self.notes.append(str(error))
            return False
        self.memory.append(memory)
        if remark:
            self.notes.append(remark)
        if self.task.destination.keeps_data and self.task.detects_zeroes:
            self._count_data(tool, destination)
        return True

    def _count_data(self, tool: str, destination: Place) -> None:
        try:
            self.data_bytes[tool] = data_bytes(output(map_command(destination.address)))
        except CommandFailed as error:
            self.notes.append(str(error))

    def _compare(self, when: str, source: Place, destination: Place) -> None:
        try:
            with contextlib.ExitStack() as stack:
                if self.task.is_compared_whole:
                    source, destination = (stack.enter_context(without_extents(each)) for each in (source, destination))
                output(compare_command(source.address, destination.address))
            self.proofs[when] = IDENTICAL
        except CommandFailed as error:
            self.proofs[when] = f"not identical: {error}"

    def _row(self, series: list[Series]) -> Row:
        return Row(self.task.name, self.size, series, self.memory, self.data_bytes, self.proofs, self.notes)


def data_bytes(told: str) -> int:
    """How many bytes are data, by what `nbdshard map --totals --json` printed."""
    return sum(entry.size for entry in msgspec.json.decode(told, type=list[MapEntry]) if entry.type == 0)
