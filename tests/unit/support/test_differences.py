"""A test that fails has to say so, wherever it runs: the run of all of them depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
COMPARING = """
def test_that_fails():
    data = bytes(range(1, 251)) * 5000
    assert data == data[:600_000] + bytes(3000) + data[603_000:]
"""


def test_images_that_differ_are_told_at_once_where_everything_is_to_be_shown(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(COMPARING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "CI": "true", "BUILD_NUMBER": "1", "PYTHONPATH": str(TESTS)}
    run = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 1
    assert "At index 600000 diff" in run.stdout
    assert "Full diff" not in run.stdout
    assert "1 failed" in run.stdout
