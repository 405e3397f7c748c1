"""What the page says about the machine: its processor, memory and kernel, and the versions of everything compared."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks.results import Machine
from nbdshard.common.limits import KIB

TOP: Final = Path(__file__).parents[1]
ASK_SECONDS: Final = 10.0
PROGRAMS: Final[Mapping[str, str]] = {  # and the Debian packages they are in
    "nbdcopy": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "nbdkit": "nbdkit",
    "fio": "fio",
}
PACKAGES: Final = ("liburing", "pyzmq", "msgpack", "msgspec")
_VERSION: Final = re.compile(r"\d+(\.\d+)+")


def missing_program() -> str:
    """One line about a program that is not there; "" when all are."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"{program} is missing; it is in the package {package}"
    return ""


def describe() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=cpu_model(Path("/proc/cpuinfo").read_text()),
        cores=len(os.sched_getaffinity(0)),
        memory=meminfo(Path("/proc/meminfo").read_text(), "MemTotal"),
        kernel=os.uname().release,
        system=system_name(_read("/etc/os-release")),
        versions=_versions(),
        commit=_said("git", "-C", str(TOP), "describe", "--always", "--dirty"),
        load_before=os.getloadavg()[0],
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def memory_available() -> int:
    """Bytes that can be used without swapping."""
    return meminfo(Path("/proc/meminfo").read_text(), "MemAvailable")


def stolen_and_all() -> tuple[int, int]:
    """Clock ticks of all processors since boot: those the host gave to others, and all."""
    return cpu_ticks(Path("/proc/stat").read_text())


def cpu_ticks(stat: str) -> tuple[int, int]:
    """The same from the text of /proc/stat (proc(5)): user nice system idle iowait irq softirq steal ..."""
    ticks = [int(word) for word in stat.splitlines()[0].split()[1:9]]
    return ticks[7], sum(ticks)


def cpu_model(cpuinfo: str) -> str:
    """The model name in /proc/cpuinfo, where the architecture has one."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else os.uname().machine


def meminfo(text: str, field: str) -> int:
    """A field of /proc/meminfo, in bytes; 0 if it is not there."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * KIB if found else 0


def system_name(os_release: str) -> str:
    """The distribution's name for itself (os-release(5))."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)"?$', os_release, re.MULTILINE)
    return found[1] if found else "unknown"


def version_in(text: str) -> str:
    """The first version number in what a program prints about itself."""
    found = _VERSION.search(text)
    return found[0] if found else "unknown"


def _versions() -> dict[str, str]:
    versions = {"nbdshard": metadata.version("nbdshard")}
    versions |= {program: version_in(_said(program, "--version")) for program in PROGRAMS}
    versions["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # liburing is for x86-64 only
            versions[package] = "absent"
    return versions


def _said(*command: str) -> str:
    """What `command` prints; "" when it cannot be asked."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
