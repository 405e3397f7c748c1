"""Memory that a server had for a moment is not its own for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from nbdshard.server.heap import give_back_large_pieces

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "yes":
    give_back_large_pieces()
bytearray(16 << 20)  # freed at once: from now on, glibc by itself keeps pieces of that size
before = resident()
large, small = [], []
for _ in range(40):  # a heap gives back only what is at its end
    large.append(bytearray(b"x" * (1 << 20)))
    small.append(bytearray(b"x" * 5000))
large.clear()
print(resident() - before)
"""


@pytest.mark.parametrize("told", ["yes", "no"])
def test_large_pieces_are_given_back(told: str) -> None:
    command = [sys.executable, "-c", PROGRAM, told]
    kept = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert (kept < 8 << 20) == (told == "yes"), kept
