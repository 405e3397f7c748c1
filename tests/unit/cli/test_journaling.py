"""cli/journaling.py: the command that is printed to go on with a copy is one that a shell understands."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from nbdshard.cli.copy import build_parser
from nbdshard.cli.journaling import export_command, resume_command

OWN = ["copy", "--resume", "--journal", "/tmp/j"]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An executable that this process is."""
    folder = tmp_path / "own bin"
    folder.mkdir()
    path = folder / "nbdshard"
    path.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setenv("PATH", os.defpath)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["-C", "2", "a file", "it's"], ["-C", "2", "a file", "it's"]),
        (["--journal", "j", "a", "b"], ["a", "b"]),
        (["--journal=j", "a", "--resume", "b"], ["a", "b"]),
        (["--jour", "j", "a", "b"], ["a", "b"]),
        (["a", "b", "--j=j", "--resum", "--forc"], ["a", "b"]),
        (["--request-size", "1M", "--requests=2", "a", "b"], ["--request-size", "1M", "--requests=2", "a", "b"]),
        (["[", "serve", "--journal", "x", "--resume", "]", "--journal", "j", "b"],
         ["[", "serve", "--journal", "x", "--resume", "]", "b"]),
        (["--journal", "j", "--", "--resume", "b"], ["--", "--resume", "b"]),
    ],
)  # fmt: skip
def test_the_command_is_that_of_the_copy_with_its_journal(words: list[str], expected: list[str]) -> None:
    command = resume_command(["copy", *words], "/tmp/j")
    assert shlex.split(command)[1:] == [*OWN, *expected]
    args = build_parser("nbdshard copy").parse_words(shlex.split(command)[2:])
    assert (args.resume, args.force_resume, args.journal, len(args.operands)) == (True, False, "/tmp/j", 2)


@pytest.mark.usefixtures("program")
def test_a_password_of_a_server_in_brackets_is_not_in_it() -> None:
    words = ["copy", "[", "nbdshard", "serve", "-e", "x", "raw", "s3:http://me:secret@host/b/x", "]", "b@c"]
    command = shlex.split(resume_command(words, "/tmp/j"))
    assert command[-3:] == ["s3:http://***@host/b/x", "]", "b@c"]


def test_a_program_that_a_shell_does_not_find_is_told_by_its_path(program: Path) -> None:
    assert shlex.split(resume_command(["copy", "a", "b"], "/tmp/j")) == [str(program), *OWN, "a", "b"]
    assert shlex.split(export_command("/tmp/j")) == [str(program), "jobs", "export", "/tmp/j"]


def test_a_program_that_a_shell_finds_is_told_by_its_name(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program.parent))
    assert shlex.split(resume_command(["copy", "a", "b"], "/tmp/j")) == ["nbdshard", *OWN, "a", "b"]


def test_another_program_of_that_name_is_not_meant(
    program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nbdshard").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(export_command("/tmp/j"))[0] == str(program)


def test_a_module_is_told_with_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/there/cli/main.py"])
    assert shlex.split(export_command("/tmp/j"))[:3] == [sys.executable, "-m", "nbdshard.cli.main"]


def test_what_had_to_be_forced_has_to_be_forced_again() -> None:
    command = shlex.split(resume_command(["copy", "--force-resume", "--journal", "j", "a", "b"], "/tmp/j", forced=True))
    assert command[1:] == ["copy", "--force-resume", "--journal", "/tmp/j", "a", "b"]
