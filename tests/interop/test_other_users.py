"""As a user without privileges: other limits for pipes, memory and rings, and no root to fall back on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import images
from support.command import copy, started
from support.servers import nbdkit, private_folder, qemu_nbd
from support.unprivileged import NOBODY, install_for_everybody, interpreter_for_nobody
from support.waiting import wait_for

SIZE = 10_000_001

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def as_nobody() -> Iterator[dict[str, Any]]:
    """How `copy` and `started` run the command as nobody."""
    interpreter = interpreter_for_nobody()
    if interpreter is None:
        pytest.skip("no Python of this version that an ordinary user can run")
    with private_folder() as folder:
        install_for_everybody(folder)
        yield {
            "user": NOBODY,
            "executable": [interpreter, "-P", "-m", "nbdshard.cli.main"],
            "env": {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        }


def test_it_is_nobody_who_runs_it(as_nobody: dict[str, Any]) -> None:
    with nbdkit("null", "1M") as server:
        server.suspend()
        with started("copy", server.uri, "null:", **as_nobody) as run:
            wait_for("the workers", lambda: run.workers())
            assert {os.stat(f"/proc/{pid}").st_uid for pid in run.processes()} == {NOBODY}


def test_nobody_copies_between_two_servers(tmp_path: Path, ring: str, as_nobody: dict[str, Any]) -> None:
    source = images.sparse_image(tmp_path / "source", SIZE)
    destination = images.filled_image(tmp_path / "destination", SIZE)
    with nbdkit("file", str(source), flags=["-r"]) as one, nbdkit("file", str(destination)) as two:
        copy("--ring", ring, "--workers", "4", one.uri, two.uri, **as_nobody).succeeded()
    images.assert_identical(source, destination)


def test_nobody_copies_a_file_to_a_file_of_its_own(ring: str, as_nobody: dict[str, Any]) -> None:
    with private_folder() as folder:
        source = images.sparse_image(folder / "source", SIZE)
        (folder / "own").mkdir()
        os.chown(folder / "own", NOBODY, NOBODY)
        copy("--ring", ring, source, folder / "own" / "copy", **as_nobody).succeeded()
        images.assert_identical(source, folder / "own" / "copy")
        assert (folder / "own" / "copy").stat().st_uid == NOBODY


def test_nobody_may_not_write_what_it_may_not_write(ring: str, as_nobody: dict[str, Any]) -> None:
    with private_folder() as folder:
        source = images.random_image(folder / "source", images.MIB)
        outcome = copy("--ring", ring, source, folder / "copy", **as_nobody)
        outcome.failed(1, saying=[str(folder / "copy"), "ermission denied"])
        assert not (folder / "copy").exists()


def test_nobodys_copy_stops_on_ctrl_c(tmp_path: Path, ring: str, as_nobody: dict[str, Any]) -> None:
    destination = images.empty_image(tmp_path / "destination", 64 * images.MIB)
    with (
        nbdkit("pattern", "64M", "rate=64M", filters=["rate"], threads=1) as one,
        qemu_nbd(destination) as two,
        started("copy", "--ring", ring, one.uri, two.uri, **as_nobody) as run,
    ):
        wait_for("the first write", lambda: images.allocated_bytes(destination) > 0)
        run.signal_group(signal.SIGINT)
        assert run.wait().code == 130
