"""A file as an export: what its kernel says once is never forgotten."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

import pytest

from nbdshard.server.backends.file import FileBackend
from nbdshard.server.exports import Exported, Exports


def test_a_write_back_that_failed_fails_every_flush_and_gives_another_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    backend = FileBackend(tmp_path / "image")
    exports = Exports({"disk": Exported(backend)}, uuid.uuid4())
    backend.flush()
    before = exports.find("disk")

    def fail(_number: int) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    for _ in range(3):  # the kernel tells it to the first one only
        with pytest.raises(OSError, match="a write-back failed: Input/output error"):
            backend.flush()
    after = exports.find("disk")
    assert before is not None
    assert after is not None
    assert before.hints.instance != after.hints.instance
    backend.close()
