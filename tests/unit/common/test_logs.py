"""The log: levels, names, and text from peers made harmless."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from nbdshard.common import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    logs.set_up("", logs.Level.WARNING)


def test_a_line_names_the_program_and_the_role(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("worker 1a2b", logs.Level.INFO)
    logs.info("hello")
    assert capfd.readouterr().err == "nbdshard worker 1a2b: hello\n"


def test_without_a_role_a_line_names_the_program(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("", logs.Level.WARNING)
    logs.error("it broke")
    assert capfd.readouterr().err == "nbdshard: it broke\n"


def test_levels_below_the_chosen_one_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("", logs.Level.WARNING)
    logs.debug("a")
    logs.info("b")
    logs.warning("c")
    assert capfd.readouterr().err == "nbdshard: c\n"


def test_what_was_asked_for_is_shown_at_every_level(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("", logs.Level.ERROR)
    logs.say("the summary")
    assert capfd.readouterr().err == "nbdshard: the summary\n"


def test_a_peer_cannot_forge_a_line_or_move_the_cursor(capfd: pytest.CaptureFixture[str]) -> None:
    logs.warning("from a peer: x\nnbdshard: all is well \x1b[2J\x00")
    assert capfd.readouterr().err == "nbdshard: from a peer: x\\nnbdshard: all is well \\x1b[2J\\x00\n"


def test_a_lone_surrogate_from_a_file_name_is_written_as_an_escape(capfd: pytest.CaptureFixture[str]) -> None:
    logs.warning("file \udcff")
    assert capfd.readouterr().err == "nbdshard: file \\udcff\n"


def test_a_long_line_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    logs.warning("x" * 5000)
    line = capfd.readouterr().err
    assert len(line) < 1000
    assert line.endswith("x...\n")


def test_under_systemd_a_line_carries_its_level(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{facts.st_dev}:{facts.st_ino}")
    logs.set_up("", logs.Level.WARNING)
    logs.warning("careful")
    assert capfd.readouterr().err == "<4>nbdshard: careful\n"


def test_a_pipe_that_nobody_reads_loses_the_line_instead_of_stopping_the_work() -> None:
    read_end, write_end = os.pipe()
    try:
        os.set_blocking(write_end, False)
        while True:
            try:
                os.write(write_end, b"x" * 4096)
            except BlockingIOError:
                break
        os.set_blocking(write_end, True)
        assert not logs.write_in_time(write_end, b"line\n", 0.0)
        os.read(read_end, 65536)
        assert logs.write_in_time(write_end, b"line\n", 0.0)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_pipe_whose_reader_has_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        assert not logs.write_in_time(write_end, b"line\n", 0.0)
    finally:
        os.close(write_end)
