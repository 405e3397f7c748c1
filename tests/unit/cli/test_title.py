"""cli/title.py: what ps(1) shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbdshard.cli import title

SCRIPT = """
import sys
from nbdshard.cli.title import show_as
show_as("a worker of ours", sys.argv[1:])
for name in ("comm", "cmdline"):
    print(open(f"/proc/self/{name}").read().rstrip("\\n\\0").split("\\0"))
print(sys.argv[1:])
"""


def shown(*words: str) -> list[str]:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True, timeout=60)
    return ran.stdout.splitlines()


def test_the_name_and_the_words_take_the_place_of_the_command_line() -> None:
    assert shown("nbdshard", "worker", "--name", "1a 2b") == [
        "['a worker of our']",  # the kernel keeps 15 characters
        "['nbdshard', 'worker', '--name', '1a 2b']",
        "['nbdshard', 'worker', '--name', '1a 2b']",
    ]


def test_what_does_not_fit_is_cut() -> None:
    """It ends where the command line ended: what comes after it is the environment, which has to stay."""
    script = """
from nbdshard.cli.title import show_as
before = [open(f"/proc/self/{name}").read() for name in ("cmdline", "environ")]
show_as("x", ["word" * 1000])
after = [open(f"/proc/self/{name}").read() for name in ("cmdline", "environ")]
room = len(before[0])
print(after[0] == ("word" * 1000)[:room - 1] + "\\0", after[1] == before[1])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "True True\n"


def test_nothing_is_changed_where_proc_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    before = Path("/proc/self/cmdline").read_bytes()
    monkeypatch.setattr(title, "open", refuse, raising=False)
    title.show_as("x", ["y"])
    assert Path("/proc/self/cmdline").read_bytes() == before
