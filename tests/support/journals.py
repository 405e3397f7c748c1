"""A journal's facts in few words, and processes that hold one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.limits import MIB
from nbdshard.common.messages import EndpointAddress, EndpointDescription
from nbdshard.common.ranges import Range
from nbdshard.coordinator.journal import Journal
from nbdshard.coordinator.journal_facts import JobFacts, JournaledEnd, LocalFile, ResultOptions

UUID = "6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e11"
SIZE = 1000 * MIB
PROCESS_SECONDS = 30.0

HOLD = """
import os, sys
from nbdshard.coordinator.journal import Journal
journal = Journal.open(sys.argv[1])
print("open", flush=True)
sys.stdin.read(1)
journal.close()
"""
LOOK = """
import sys
from nbdshard.coordinator.journal import Journal
found = Journal.read(sys.argv[1])
print(found.state.value, found.epoch, found.durable_bytes >> 20, found.holder, flush=True)
"""


def facts(size: int = SIZE) -> JobFacts:
    """A copy from a server to a local file."""
    uri = "nbd://source.example/disk"
    source = JournaledEnd(uri, EndpointAddress("nbd", uri), EndpointDescription(uri, size), export="disk")
    path = "/srv/images/disk.img"
    address = EndpointAddress("file", path, "2049:77")
    local = LocalFile(device=2049, inode=77, mtime_ns=1_700_000_000_123_456_789)
    destination = JournaledEnd("disk.img", address, EndpointDescription(path, size), local=local)
    return JobFacts(UUID, size, source, [destination], ResultOptions(allocated=True))


def mib(start: int, end: int) -> Range:
    """[start, end) in MiB."""
    return Range(start * MIB, end * MIB)


def durable_bytes(journal: Path) -> int:
    """What the journal has; 0 while there is none."""
    try:
        return Journal.read(str(journal)).durable_bytes
    except UserError:
        return 0


@contextlib.contextmanager
def program(text: str, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program with pipes as its standard input and output, gone when the block ends."""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait(PROCESS_SECONDS)


def answer(process: subprocess.Popen[bytes]) -> str:
    """The next line that the program prints."""
    assert process.stdout is not None
    return process.stdout.readline().decode().rstrip("\n")


def held_by_others(program_text: str, path: str) -> str:
    with program(program_text, path) as process:
        return answer(process)


@contextlib.contextmanager
def small_disk(folder: Path, kib: int = 256) -> Iterator[Path]:
    """A file system of so many KiB."""
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)]
        subprocess.run(command, check=True, stderr=subprocess.PIPE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
