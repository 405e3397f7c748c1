"""What a server has written to files and not synced yet, by the system calls that strace(1) has seen it make.

strace writes a call's line before the process goes on, so whatever led to an answer is in the trace when the answer is
there. A file is dirty from a write to it until fdatasync or fsync; a directory from the coming or going of a name in it
until fsync. What is dirty when the machine stops may be lost.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from support.command import EXECUTABLE

_WRITES = ("pwrite64", "pwritev", "pwritev2", "write", "writev", "fallocate", "ftruncate", "splice", "copy_file_range")
_NAMES = ("openat", "unlink", "unlinkat", "rename", "renameat", "renameat2", "link", "linkat", "mkdir", "mkdirat")
_SYNCS = ("fsync", "fdatasync")
_LINE = re.compile(r"(?P<pid>\d+) +(?P<call>\w+)\((?P<rest>.*)")
_RESUMED = re.compile(r"(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)")
_DESCRIPTOR = re.compile(r"\d+<(?P<path>/[^>]*)>")
_AT = re.compile(r'(?:(?:\d+|AT_FDCWD)<(?P<folder>/[^>]*)>, )?"(?P<name>[^"]*)"')
_UNFINISHED = " <unfinished ...>"


def traced(calls: Path) -> tuple[str, ...]:
    """The command `nbdshard`, which leaves a trace of what it does to files in `calls`."""
    wanted = ",".join((*_WRITES, *_NAMES, *_SYNCS))
    options = ("-f", "-qq", "-y", "-s", "4096", "-e", f"trace={wanted}", "-e", "signal=none")
    return ("strace", *options, "-o", str(calls), EXECUTABLE)


class Trace:
    """The trace in `calls`, of what happens in `folder`, but for those names in it that are `besides`, and NAME.*."""

    def __init__(self, calls: Path, folder: Path, besides: Collection[str] = ()) -> None:
        self.dirty: set[str] = set()
        self.synced = 0  # how often something stopped being dirty
        self._calls = calls.open()
        self._folder = str(folder)
        self._besides = [str(folder / name) for name in besides]
        self._begun: dict[str, str] = {}  # calls that have not ended, by process
        self._rest = ""

    def read(self) -> set[str]:
        """What is dirty after all that is in the trace by now."""
        *lines, self._rest = (self._rest + self._calls.read()).split("\n")
        for line in lines:
            self._take(line)
        return self.dirty

    def close(self) -> None:
        self._calls.close()

    def _take(self, line: str) -> None:
        if (resumed := _RESUMED.fullmatch(line)) is not None:
            line = self._begun.pop(resumed["pid"], "") + resumed["rest"]
        found = _LINE.fullmatch(line)
        if found is None:
            return
        if line.endswith(_UNFINISHED):
            self._begun[found["pid"]] = line.removesuffix(_UNFINISHED)
            return
        asked, _, answer = found["rest"].rpartition(") = ")
        if not answer.startswith("-"):
            self._done(found["call"], asked)

    def _done(self, call: str, asked: str) -> None:
        if call in _SYNCS:
            (path,) = (match["path"] for match in _DESCRIPTOR.finditer(asked))
            self.synced += path in self.dirty
            self.dirty.discard(path)
        elif call in _WRITES:
            written = list(_DESCRIPTOR.finditer(asked))
            if written and (call not in ("splice", "copy_file_range") or len(written) > 1):
                self._add(written[-1]["path"])
            elif written:
                self._add(written[0]["path"])
        elif call != "openat" or "O_CREAT" in asked:
            places = [Path(match["folder"] or "/") / match["name"] for match in _AT.finditer(asked)]
            for place in places:
                if not self._is_beside(str(place)):
                    self._add(str(place.parent))
            if call.startswith("rename") and str(places[0]) in self.dirty:
                self.dirty.discard(str(places[0]))
                self._add(str(places[1]))
            if call.startswith("unlink"):
                self.dirty.discard(str(places[0]))

    def _add(self, path: str) -> None:
        if path.startswith(self._folder) and not self._is_beside(path) and not path.endswith(" (deleted)"):
            self.dirty.add(path)

    def _is_beside(self, path: str) -> bool:
        return any(path == each or path.startswith(f"{each}.") for each in self._besides)
