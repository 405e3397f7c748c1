"""server/layers/stats.py"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.layers import stats
from support import served

BLOCK = Range(4096, 8192)


def counted(conn: str) -> Backend:
    return open_backend(Wanted("disk", "raw", conn))


def operations(text: str) -> dict[str, Any]:
    found = json.loads(text)
    assert found["export"] == "disk" and found["seconds"] >= 0
    return dict(found["operations"])


def test_requests_bytes_and_times_are_counted_by_their_kind(tmp_path: Path) -> None:
    backend = counted(f"stats:memory:1M?stats={tmp_path}/stats")
    for _ in range(3):
        backend.write(BLOCK, memoryview(bytes(4096)))
    backend.read(BLOCK)
    backend.flush()
    backend.close()
    found = operations((tmp_path / "stats").read_text())
    counts = {name: (each["count"], each["errors"], each["bytes"]) for name, each in found.items()}
    assert {name: each for name, each in counts.items() if each[0]} == {
        "write": (3, 0, 3 * 4096),
        "read": (1, 0, 4096),
        "flush": (1, 0, 0),
    }
    assert found["write"]["seconds"] >= found["write"]["seconds_max"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


def test_what_fails_moves_no_bytes() -> None:
    backend = counted("stats:error:memory:1M?error-count=1")
    assert isinstance(backend, stats.Stats)
    with pytest.raises(OSError):
        backend.read(BLOCK)
    backend.read(BLOCK)
    found = operations(backend.report().decode())["read"]
    assert (found["count"], found["errors"], found["bytes"]) == (2, 1, 4096)


def test_a_file_can_be_read_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "STATS_SECONDS", 0.0)
    backend = counted(f"stats:memory:1M?stats={tmp_path}/stats")
    backend.read(BLOCK)
    assert operations((tmp_path / "stats").read_text())["read"]["count"] == 1
    backend.close()


def test_requests_do_not_fail_with_the_place_of_the_file_and_it_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stats, "STATS_SECONDS", 0.0)
    folder = tmp_path / "folder"
    folder.mkdir()
    backend = counted(f"stats:memory:1M?stats={folder}/stats")
    shutil.rmtree(folder)
    backend.read(BLOCK)
    backend.read(BLOCK)
    backend.close()
    assert capfd.readouterr().err.count("the statistics could not be written: No such file or directory") == 1


def test_without_a_file_they_are_told_when_the_server_ends() -> None:
    with served.serving("stats:memory:1M") as server:
        server.run.process.send_signal(signal.SIGTERM)
        assert server.run.wait().code == 0
        (line,) = (line for line in server.run.err().splitlines() if '"operations"' in line)
    assert operations(line[line.index("{") :])["flush"]["count"] == 1  # the server's own, at its end


def test_a_file_in_no_directory_is_told_before_anything_is_served() -> None:
    with pytest.raises(UserError, match="stats=/nowhere/at/all: there is no such directory"):
        counted("stats:memory:1M?stats=/nowhere/at/all")
    with pytest.raises(UserError, match="stats=/: is a directory, where a file is to be written"):
        counted("stats:memory:1M?stats=/")
