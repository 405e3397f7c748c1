"""Block devices, which only root can make."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMAND_SECONDS = 30.0


@contextmanager
def loop_device(backing: Path) -> Iterator[Path]:
    """A loop device over the file `backing`; the test is skipped where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("only root can make loop devices")
    try:
        device = _run("losetup", "--find", "--show", backing)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    try:
        yield Path(device)
    finally:
        _run("losetup", "--detach", device)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_SECONDS).stdout.strip()
