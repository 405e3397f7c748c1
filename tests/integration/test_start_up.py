"""What the processes of a copy load. It is what a small copy takes most of its time for."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from support.servers import nbdkit


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"data" * 1024)
    return path


def imports_of_a_copy(*words: str | Path) -> Counter[str]:
    """Every module that the coordinator and its only worker import, and in how many of the two."""
    script = "from nbdshard.cli.main import command; command()"
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script, "copy", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return Counter(line.rpartition("|")[2].strip() for line in lines)


def test_a_copy_imports_no_more_than_it_uses() -> None:
    with nbdkit("memory", "1M") as source, nbdkit("memory", "1M") as destination:
        loaded = imports_of_a_copy(source.uri, destination.uri)
    slow = {"asyncio", "logging", "multiprocessing", "rich", "shutil", "subprocess", "tempfile", "traceback"}
    other_subcommands = {
        "nbdshard.cli.checksum",
        "nbdshard.cli.coordinator",
        "nbdshard.cli.info",
        "nbdshard.cli.keygen",
        "nbdshard.cli.map",
        "nbdshard.cli.serve",
        "nbdshard.cli.volume",
    }
    for_networks = {"nbdshard.common.keys", "nbdshard.common.zap"}
    for_local_ends = {"nbdshard.worker.files", "nbdshard.worker.streams", "nbdshard.worker.null"}
    for_checksums = {"hashlib", "nbdshard.common.blkhash", "nbdshard.coordinator.checksum", "nbdshard.worker.leaves"}
    assert set(loaded) & (slow | other_subcommands | for_networks | for_local_ends | for_checksums) == set()
    assert {"nbdshard.coordinator.service", "nbdshard.worker.service"} < set(loaded)


def test_what_both_processes_of_a_copy_need_is_loaded_before_there_are_two(image: Path) -> None:
    loaded = imports_of_a_copy(image, "null:")
    ours_and_slow = ("nbdshard", "zmq", "msgspec", "msgpack", "dataclasses", "socket")
    assert [name for name, times in loaded.items() if times > 1 and name.startswith(ours_and_slow)] == []


def test_the_coordinator_loads_nothing_of_its_workers(image: Path) -> None:
    script = (
        "import sys; from nbdshard.cli.main import main; code = main(sys.argv[1:]); "
        "print(' '.join(sys.modules)); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, "copy", image, "null:"], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(ended.stdout.split())
    assert loaded & {"liburing", "nbdshard.worker", "nbdshard.common.ring", "nbdshard.common.nbd.client"} == set()
    assert "nbdshard.coordinator.service" in loaded
