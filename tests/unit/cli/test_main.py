"""cli/main.py: what every kind of outcome prints and exits with."""

from __future__ import annotations

import argparse
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator

import pytest

from nbdshard.cli import main as main_module
from nbdshard.cli.grammar import UsageError
from nbdshard.cli.main import main
from nbdshard.common.errors import BugError, ConnectionLost, IllegalEvent, UserError


class Double:
    """A subcommand's module whose `run` does what a test says."""

    def __init__(self, run: Callable[[Namespace], int]) -> None:
        self.run = run

    def build_parser(self, prog: str) -> argparse.ArgumentParser:
        return argparse.ArgumentParser(prog)


Run = Callable[[Callable[[], int]], int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the command line `nbdshard copy` with this in the place of the copy."""

    def go(what: Callable[[], int]) -> int:
        monkeypatch.setitem(main_module.SUBCOMMANDS, "copy", ("double", ""))
        monkeypatch.setitem(sys.modules, "double", Double(lambda _: what()))  # type: ignore[arg-type]
        return main(["copy"])

    return go


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize("code", [0, 1, 4, 130])
def test_the_subcommands_code_is_the_exit_code(run: Run, code: int) -> None:
    assert run(lambda: code) == code


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UsageError("no such option"), "nbdshard: no such option\n", 2),
        (UserError("is a directory", "/tmp"), "nbdshard: /tmp: is a directory\n", 1),
        (
            ConnectionLost("nbd://h", "reading", "connection reset by peer"),
            "nbdshard: nbd://h: connection lost while reading: connection reset by peer\n",
            1,
        ),
        (KeyboardInterrupt(), "nbdshard: interrupted\n", 130),
        (BrokenPipeError(), "", 141),
    ],
)
def test_every_error_is_one_line_and_a_code(
    run: Run, error: BaseException, line: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == code
    assert capfd.readouterr().err == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad"), "nbdshard: internal error: ValueError: bad"),
        (KeyError(), "nbdshard: internal error: KeyError: no text"),
        (BugError("two owners"), "nbdshard: internal error: BugError: two owners"),
        (
            IllegalEvent("copier", "EMPTY", "sent"),
            "nbdshard: internal error: IllegalEvent: copier has no transition for sent in state EMPTY",
        ),
    ],
)
def test_a_fault_of_ours_is_one_line_that_says_how_to_see_more(
    run: Run, error: Exception, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == 1
    assert capfd.readouterr().err == f"{line} (run with NBDSHARD_DEBUG=1 for the traceback)\n"


def test_the_traceback_is_shown_when_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NBDSHARD_DEBUG", "1")
    assert run(raising(ValueError("bad"))) == 1
    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_a_peers_text_cannot_forge_lines_or_terminal_commands(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(raising(UserError("no\nnbdshard: all is well\x1b[2J"))) == 1
    assert capfd.readouterr().err == "nbdshard: no\\nnbdshard: all is well\\x1b[2J\n"


def test_help_lists_every_subcommand(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    for name in ("copy", "coordinator", "worker", "serve", "volume", "info", "map", "keygen"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version_is_one_line(word: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capfd.readouterr().out.startswith("nbdshard 0.")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "no subcommand; try 'nbdshard --help'"),
        (
            ["cp"],
            "unknown subcommand 'cp'; known are copy, coordinator, worker, verify, serve, volume, info, map, checksum, "
            "ctl, jobs, keygen",
        ),
        (
            ["--cp"],
            "unknown option '--cp'; known are copy, coordinator, worker, verify, serve, volume, info, map, checksum, "
            "ctl, jobs, keygen",
        ),
        (["copy", "--nosuch", "a", "b"], "unrecognized arguments: --nosuch; try 'nbdshard copy --help'"),
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capfd.readouterr().err == f"nbdshard: {line}\n"


def test_the_command_ends_with_its_code_and_all_it_wrote() -> None:
    """It does not wait for the interpreter to be taken apart; what is in its buffers has to leave all the same."""
    script = """
import sys
from argparse import ArgumentParser
from nbdshard.cli import main
from nbdshard.common.errors import UserError

class Double:
    def build_parser(self, prog):
        return ArgumentParser(prog)

    def run(self, args):
        print("written before the fault")
        raise UserError("a fault")

sys.argv = ["nbdshard", "double"]
sys.modules["double"] = Double()
main.SUBCOMMANDS["double"] = ("double", "")
main.command()
print("never reached")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "written before the fault\n", "nbdshard: a fault\n")
