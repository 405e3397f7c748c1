"""`nbdshard copy` as a command: operands, streams, progress, the summary line, signals, and nbdcopy's own words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.limits import DRAIN_SECONDS
from support import processes
from support.brakes import Brake
from support.command import Run, copy, started
from support.servers import nbdkit, private_folder
from support.waiting import wait_for

MIB = 1 << 20
SUMMARY = re.compile(
    r"nbdshard: \S+ \S+ copied, \S+ \S+ zeroed, \S+ \S+ skipped in \S+ s \(\S+ \S+/s\); "
    r"\d+ workers?; \d+\+\d+ connections; (\d+ % )?(spliced|buffered); (io_uring|epoll); flushed"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """5 MiB and 7 bytes: data, zeroes, a hole, data."""
    tmp_path.chmod(0o755)
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(hashlib.shake_256(b"one").digest(MIB) + bytes(MIB))
        file.seek(2 * MIB, os.SEEK_CUR)
        file.write(hashlib.shake_256(b"two").digest(MIB + 7))
    return path


def test_a_file_becomes_its_copy_and_one_line_sums_it_up(image: Path, tmp_path: Path) -> None:
    outcome = copy(image, tmp_path / "out").succeeded()
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert SUMMARY.fullmatch(line), line


def test_files_may_have_names_that_are_no_text(image: Path, tmp_path: Path) -> None:
    source, destination = (tmp_path / os.fsdecode(name) for name in (b"\xff", b"\xfe out"))
    image.rename(source)
    copy(source, destination).succeeded()
    assert destination.read_bytes() == source.read_bytes()


def test_servers_on_both_sides_are_started_and_stopped(tmp_path: Path) -> None:
    """`started` fails the test if one of them is left running."""
    tmp_path.chmod(0o755)
    out = tmp_path / "out"
    out.write_bytes(bytes(8 * MIB))
    copy("[", "nbdkit", "pattern", "8M", "]", "-C", "2", "[", "nbdkit", "file", out, "]").succeeded()
    with nbdkit("pattern", "8M") as server:
        subprocess.run(["nbdcopy", server.uri, tmp_path / "theirs"], check=True, timeout=60)
    assert out.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_options_of_a_bracketed_command_are_its_own(tmp_path: Path) -> None:
    command = ["[", "nbdkit", "-r", "-t", "2", "--filter=offset", "pattern", "8M", "offset=4M", "]"]
    copy("--", *command, tmp_path / "out").succeeded()
    assert (tmp_path / "out").stat().st_size == 4 * MIB
    assert (tmp_path / "out").read_bytes()[:16] == (4 * MIB).to_bytes(8, "big") + (4 * MIB + 8).to_bytes(8, "big")


def test_nbdcopys_words_do_the_same_for_us(image: Path, tmp_path: Path) -> None:
    words = ["-C", "2", "--requests=8", "--request-size=65536", "--queue-size=1048576", "-S", "4096", "--flush"]
    words += ["--threads=2", "--no-extents", "--", "[", "nbdkit", "-r", "file", str(image), "]"]
    copy(*words, tmp_path / "ours").succeeded()
    subprocess.run(["nbdcopy", *words, tmp_path / "theirs"], check=True, timeout=60)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("how", ["--synchronous", "--allocated", "--no-extents", "--no-flush", "--ring=epoll"])
def test_each_way_of_copying_gives_the_same_bytes(how: str, image: Path, tmp_path: Path) -> None:
    with nbdkit("file", str(image), flags=["-r"]) as server:
        copy(how, server.uri, tmp_path / "out").succeeded()
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_pipe_is_copied_in_and_out(image: Path) -> None:
    reading, writing = os.pipe()
    with image.open("rb") as file, started("copy", "-", "-", stdin=file.fileno(), stdout=writing) as run:
        os.close(writing)
        with open(reading, "rb") as pipe:
            assert pipe.read() == image.read_bytes()
        assert SUMMARY.match(run.wait().succeeded().err.replace("durability unknown", "flushed"))


def test_a_stream_into_a_server_keeps_what_lies_behind_it(image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * (8 * MIB))
    with nbdkit("file", str(disk)) as server, subprocess.Popen(["cat", image], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        with started("copy", "-", server.uri, stdin=cat.stdout.fileno()) as run:
            run.wait().succeeded()
    size = image.stat().st_size
    assert disk.read_bytes() == image.read_bytes() + b"x" * (8 * MIB - size)


def test_redirected_files_are_sources_and_destinations(image: Path, tmp_path: Path) -> None:
    with (
        image.open("rb") as source,
        (tmp_path / "out").open("wb") as out,
        started("copy", "-", "-", stdin=source.fileno(), stdout=out.fileno()) as run,
    ):
        run.wait().succeeded()
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_null_takes_everything_and_a_server_is_read_to_its_end() -> None:
    line = copy("[", "nbdkit", "pattern", "64M", "]", "null:").succeeded().last_line
    assert line.startswith("nbdshard: 64 MiB copied, 0 B zeroed, 0 B skipped in ")


def test_without_a_terminal_no_progress_is_shown() -> None:
    assert len(copy("[", "nbdkit", "pattern", "64M", "]", "null:").succeeded().err.splitlines()) == 1


def test_progress_on_a_descriptor_rises_to_100_as_nbdcopys_does(tmp_path: Path) -> None:
    with (tmp_path / "progress").open("wb") as file:
        number = file.fileno()
        copy(f"--progress={number}", "[", "nbdkit", "pattern", "256M", "]", "null:", pass_fds=[number]).succeeded()
    lines = (tmp_path / "progress").read_text().splitlines()
    percents = [int(line.removesuffix("/100")) for line in lines]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100


def test_progress_as_json_ends_with_done_and_every_byte() -> None:
    outcome = copy("--progress=json", "[", "nbdkit", "pattern", "64M", "]", "null:").succeeded()
    records = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]
    assert records[0]["phase"] == "opening"
    assert (records[-1]["phase"], records[-1]["bytes_done"], records[-1]["bytes_total"]) == ("done", 64 * MIB, 64 * MIB)
    assert SUMMARY.match(outcome.last_line)


def test_a_progress_that_was_asked_for_is_plain_lines_without_a_terminal() -> None:
    outcome = copy("-p", "[", "nbdkit", "pattern", "64M", "]", "null:").succeeded()
    assert any("100 %" in line for line in outcome.err.splitlines()), str(outcome)
    assert "\x1b" not in outcome.err
    assert "\r" not in outcome.err


def test_on_a_terminal_there_is_a_bar() -> None:
    with (
        private_folder() as folder,
        nbdkit("pattern", "64M", *(brake := Brake(folder, 32 << 20)).options, filters=["rate"]) as server,
    ):
        control, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "nbdshard.cli.main", "copy", server.uri, "null:"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the terminal's last user has left
            while piece := os.read(control, 65536):
                shown += piece
                if b"ETA" in shown:
                    brake.release()
        os.close(control)
        assert process.wait(60) == 0
    assert b"copying" in shown
    assert b"ETA" in shown
    assert b"workers" in shown
    assert b"\x1b[" in shown
    assert b"64 MiB copied" in shown


@contextlib.contextmanager
def under_way(rate: str, *options: str) -> Iterator[Run]:
    """A copy that would take long, once its first bytes are complete. Its server survives clients that vanish."""
    with nbdkit("pattern", "4G", f"rate={rate}", filters=["rate"], threads=1) as server:
        words = ["copy", "--progress=json", "--request-size=64k", *options, server.uri, "null:"]
        with started(*words) as run:

            def moved() -> bool:
                assert run.process.poll() is None, run.err()
                lines = [line for line in run.err().splitlines() if line.startswith("{") and line.endswith("}")]
                return any(json.loads(line)["bytes_done"] > 0 for line in lines)

            wait_for("the first bytes to be complete", moved)
            yield run


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda v: str(v)
)
def test_a_signal_stops_cleanly_and_says_how_far_it_got(number: signal.Signals, code: int) -> None:
    with under_way("80M", "-R", "4") as run:
        run.signal_group(number)
        outcome = run.wait()
    assert outcome.code == code
    assert re.match(r"nbdshard: stopped at \S+ MiB of 4 GiB \(\d+ %\): ", outcome.last_line), str(outcome)


def test_a_second_ctrl_c_stops_at_once() -> None:
    """Requests are out that would take minutes to finish."""
    with under_way("2M", "-R", "64", "--request-size=1M") as run:
        run.signal_group(signal.SIGINT)
        wait_for("the first Ctrl-C to be heard", lambda: '"phase": "stopping"' in run.err())
        run.signal_group(signal.SIGINT)
        outcome = run.wait(DRAIN_SECONDS)
    assert outcome.code == 130, str(outcome)


def test_verbose_says_what_is_being_done_on_standard_error(image: Path) -> None:
    outcome = copy("-v", image, "null:").succeeded()
    assert len(outcome.err.splitlines()) > 1
    assert outcome.out == ""


def test_a_worker_goes_by_its_own_name() -> None:
    with under_way("2M", "-T", "1") as run:
        (worker,) = run.workers()
        assert (processes.PROC / str(worker) / "comm").read_text() == "nbdshard worker\n"
        assert processes.command_line(worker).startswith("nbdshard worker --connect ipc://")
        assert " copy " in processes.command_line(run.pid)
