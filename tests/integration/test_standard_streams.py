"""Standard streams that are closed or full: the copy is right, the line is clear, and no line lands in a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import pytest

from support.command import EXECUTABLE, Outcome, nbdshard, started
from support.servers import nbdkit
from support.waiting import wait_for

CONTENT = hashlib.shake_256(b"streams").digest((1 << 20) + 7)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


def redirected(redirection: str, *args: str | Path) -> Outcome:
    """`nbdshard ARGS` as a shell runs it with `redirection` behind it."""
    return nbdshard(*args, executable=("sh", "-c", f'exec "$0" "$@" {redirection}', EXECUTABLE))


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize(
    ("redirection", "option"),
    [(redirection, "-v") for redirection in (*CLOSED, ">/dev/full", "2>/dev/full")]
    + [
        (redirection, option) for redirection in ("2>&-", "2>/dev/full") for option in ("--progress", "--progress=json")
    ],
)
def test_a_copy_needs_no_standard_stream(image: Path, tmp_path: Path, redirection: str, option: str) -> None:
    """The destination is opened under the lowest free number: what is said must not be written there."""
    redirected(redirection, "copy", option, image, tmp_path / "out").succeeded()
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_copy_outlives_the_terminal_it_was_started_on(tmp_path: Path) -> None:
    """As one does that was put into the background and disowned."""
    control, terminal = os.openpty()
    shell = ("bash", "-c", f'exec "$0" "$@" 2>&{terminal}', EXECUTABLE)
    slow = ["[", "nbdkit", "--filter=delay", "pattern", "4M", "rdelay=20ms", "]"]
    try:
        with started(
            "copy",
            "-p",
            "--synchronous",
            "--request-size=64k",
            *slow,
            tmp_path / "out",
            executable=shell,
            pass_fds=[terminal],
        ) as run:
            os.close(terminal)
            wait_for("the copy to begin", lambda: b"copying" in os.read(control, 65536))
            os.close(control)
            run.wait().succeeded()
    finally:
        for descriptor in (control, terminal):
            with contextlib.suppress(OSError):
                os.close(descriptor)
    assert (tmp_path / "out").stat().st_size == 4 << 20


def test_a_failure_with_standard_error_closed_shows_in_the_exit_code(tmp_path: Path) -> None:
    outcome = redirected("2>&-", "copy", tmp_path / "missing", tmp_path / "out").failed()
    assert (outcome.out, outcome.err) == ("", "")
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_started_has_its_streams_although_ours_are_closed(image: Path, tmp_path: Path) -> None:
    redirected("<&- >&- 2>&-", "copy", "[", "nbdkit", "-r", "file", image, "]", tmp_path / "out").succeeded()
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.usefixtures("image")
@pytest.mark.parametrize(
    ("redirection", "source", "destination", "line"),
    [
        ("<&-", "-", "out", "nbdshard: -: standard input is closed"),
        (">&-", "image", "-", "nbdshard: -: standard output is closed"),
        ("0>other", "-", "out", "nbdshard: -: standard input is closed"),
    ],
)
def test_a_closed_stream_is_no_end_of_a_copy(
    tmp_path: Path, redirection: str, source: str, destination: str, line: str
) -> None:
    command = ("sh", "-c", f'cd {tmp_path} && exec "$0" "$@" {redirection}', EXECUTABLE)
    outcome = nbdshard("copy", source, destination, executable=command).failed()
    assert outcome.err == f"{line}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("redirection", "line"),
    [
        (">/dev/full", "nbdshard: standard output: cannot be written: No space left on device\n"),
        (">&-", "nbdshard: standard output: cannot be written: Bad file descriptor\n"),
    ],
)
@pytest.mark.parametrize("args", [("info",), ("info", "--list"), ("map",), ("map", "--json"), ("map", "--totals")])
def test_what_cannot_be_printed_is_told(redirection: str, line: str, args: tuple[str, ...]) -> None:
    with nbdkit("memory", "1M") as server:
        assert redirected(redirection, *args, server.uri).failed().err == line


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("copy", "--help"), ("copy", "--version")])
def test_help_that_cannot_be_printed_is_told(args: tuple[str, ...]) -> None:
    outcome = redirected(">/dev/full", *args).failed()
    assert outcome.err == "nbdshard: standard output: cannot be written: No space left on device\n"


def test_a_name_that_the_locale_cannot_write_is_printed_with_escapes() -> None:
    with nbdkit("memory", "1M", export="d%C3%BCsk") as server:
        outcome = nbdshard("info", server.uri, env={"PYTHONIOENCODING": "ascii"}).succeeded()
    assert "\nexport: d\\xfcsk\n" in outcome.out


def test_a_long_map_that_cannot_be_printed_is_told(tmp_path: Path) -> None:
    """More than a buffer full: the writing fails in the middle, not at the end."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        for number in range(1000):
            file.seek(number * 8192)
            file.write(b"data")
    outcome = redirected(">/dev/full", "map", path).failed()
    assert outcome.err == "nbdshard: standard output: cannot be written: No space left on device\n"
