"""server/layers/log.py"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.chain import Wanted, open_backend
from support.journals import small_disk

BLOCK = Range(4096, 8192)


def logged(path: Path, layers: str = "log", more: str = "") -> Backend:
    return open_backend(Wanted("disk", "raw", f"{layers}:memory:1M?log={path}{more}"))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def filled_up(folder: Path) -> Path:
    """A file there that takes all the room of its disk."""
    path = folder / "ballast"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def test_a_request_has_a_line_when_it_begins_and_one_when_it_ends(tmp_path: Path) -> None:
    backend = logged(tmp_path / "log")
    backend.write(BLOCK, memoryview(bytes(4096)))
    backend.flush()
    backend.close()
    begin, end, flush, _ = lines_of(tmp_path / "log")
    about = {"export": "disk", "process": os.getpid(), "id": 0, "operation": "write", "offset": 4096, "length": 4096}
    assert begin == {**about, "event": "begin", "time": begin["time"]}
    assert end == {**about, "event": "end", "time": end["time"], "seconds": end["seconds"]}
    assert (flush["id"], flush["operation"]) == (1, "flush")


def test_an_error_is_named(tmp_path: Path) -> None:
    backend = logged(tmp_path / "log", "log:error", "&error=ENOSPC")
    with pytest.raises(OSError):
        backend.read(BLOCK)
    backend.close()
    assert lines_of(tmp_path / "log")[-1]["error"] == "ENOSPC"


def test_lines_go_to_standard_error_where_no_file_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    open_backend(Wanted("disk", "raw", "log:memory:1M")).flush()
    assert [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()] == ["begin", "end"]


def test_requests_do_not_fail_with_a_full_disk_and_what_is_missing_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", kib=1024) as folder:
        backend = logged(folder / "log")
        ballast = filled_up(folder)
        for _ in range(200):
            backend.flush()
        ballast.unlink()
        backend.flush()
        backend.close()
        texts = (folder / "log").read_text().splitlines()
    assert capfd.readouterr().err.count("a line of the log could not be written: ") == 1
    (lost,) = (at for at, text in enumerate(texts) if "lost" in text)
    assert json.loads(texts[lost])["lost"] > 0
    assert [json.loads(text)["event"] for text in texts[lost + 1 :]] == ["begin", "end"]


def test_nobody_waits_for_a_reader_of_the_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        backend = logged(tmp_path / "pipe")
        for _ in range(2000):  # far more than a pipe holds
            backend.flush()
        backend.close()
    finally:
        os.close(reader)


def test_a_log_that_cannot_be_opened_is_told_before_anything_is_served() -> None:
    with pytest.raises(UserError, match="log=/nowhere/at/all: cannot be opened: No such file or directory"):
        logged(Path("/nowhere/at/all"))
