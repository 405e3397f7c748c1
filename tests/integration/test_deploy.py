"""The files in deploy/ do what deploy/README.md says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.command import EXECUTABLE
from support.images import assert_identical, random_image
from support.servers import nbdkit

TOP = Path(__file__).parents[2]
PROFILE = TOP / "deploy/container/seccomp.json"


def copy_under_profile(
    source: str, destination: Path, *without: str, more: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    options = [word for name in without for word in ("--without", name)]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "support.seccomp",
            str(PROFILE),
            *options,
            "--",
            EXECUTABLE,
            "copy",
            "-v",
            *more,
            source,
            str(destination),
        ],
        cwd=TOP / "tests",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("without", "ring"),
    [((), "; io_uring; flushed"), (("io_uring_setup",), "; epoll; flushed")],
    ids=["with-io_uring", "without-io_uring"],
)
def test_a_copy_runs_under_the_seccomp_profile(tmp_path: Path, without: tuple[str, ...], ring: str) -> None:
    image = random_image(tmp_path / "source.img", 9 << 20)
    with nbdkit("file", str(image)) as server:
        run = copy_under_profile(server.uri, tmp_path / "copy.img", *without)
    assert run.returncode == 0, run.stderr
    assert ring in run.stderr
    assert_identical(image, tmp_path / "copy.img")


def test_servers_of_a_copy_run_under_the_seccomp_profile(tmp_path: Path) -> None:
    image, raw = random_image(tmp_path / "source.img", 9 << 20), tmp_path / "raw.img"
    raw.touch()
    os.truncate(raw, 9 << 20)
    (tmp_path / "volume").mkdir()
    chunked = ["[", EXECUTABLE, "serve", "-e", "x", "sharded", f"file:{tmp_path}/volume/?size=9M", "]"]
    several = ["[", EXECUTABLE, "serve", "-e", "x", "raw", f"file:{raw}", "--processes", "2", "]"]
    for ends in ([image, *chunked], [*chunked, *several]):
        command = [sys.executable, "-m", "support.seccomp", PROFILE, "--", EXECUTABLE, "copy", *ends]
        run = subprocess.run(command, cwd=TOP / "tests", capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stderr
    assert_identical(image, raw)


def test_a_refused_io_uring_is_explained_in_one_log_line(tmp_path: Path) -> None:
    with nbdkit("memory", "1M") as server:
        run = copy_under_profile(server.uri, tmp_path / "copy.img", "io_uring_setup")
    assert "ring: epoll (io_uring is refused: EPERM; a seccomp profile forbids it)" in run.stderr


def test_an_io_uring_that_was_asked_for_and_is_refused_is_told_in_one_line(tmp_path: Path) -> None:
    with nbdkit("memory", "1M") as server:
        run = copy_under_profile(server.uri, tmp_path / "copy.img", "io_uring_setup", more=["--ring=io_uring"])
    reason = "io_uring is refused: EPERM; a seccomp profile forbids it"
    assert (run.returncode, run.stderr) == (1, f"nbdshard: --ring io_uring: {reason}; use --ring epoll\n")
    assert not (tmp_path / "copy.img").exists()


def test_the_profile_is_of_the_form_container_runtimes_read() -> None:
    profile = json.loads(PROFILE.read_text())
    names = [name for rule in profile["syscalls"] for name in rule["names"]]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert len(names) == len(set(names))
    assert {"io_uring_setup", "io_uring_enter", "io_uring_register"} <= set(names)
    assert not {"mount", "ptrace", "bpf", "init_module", "keyctl", "perf_event_open"} & set(names)


def test_systemd_accepts_the_units() -> None:
    units = sorted((TOP / "deploy/systemd").iterdir())
    assert len(units) == 4
    run = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
